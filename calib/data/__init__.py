"""Calibration text to token batches, and the labelled files that evaluation reads."""

from __future__ import annotations

from calib.data.builtin import builtin_documents
from calib.data.read import read_documents, read_labelled, read_pairs, read_text
from calib.data.tokens import TokenData, batch_rows, calibration_data, encode_rows, sequence_limit

__all__ = [
    "TokenData",
    "batch_rows",
    "builtin_documents",
    "calibration_data",
    "encode_rows",
    "read_documents",
    "read_labelled",
    "read_pairs",
    "read_text",
    "sequence_limit",
]
