"""Checkpoints and their verification: calib's own format, compressed-tensors, and what reads them back."""
