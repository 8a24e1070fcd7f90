"""Recovery training: what calibration alone cannot bring back."""

from calib.tuning.reconstruct import Reconstruction, reconstruct

__all__ = ["Reconstruction", "reconstruct"]
