"""Recovery training: what calibration alone cannot bring back, by blocks or end to end."""

from calib.tuning.loop import Tuning, next_token_loss, tune
from calib.tuning.reconstruct import Reconstruction, reconstruct

__all__ = ["Reconstruction", "Tuning", "next_token_loss", "reconstruct", "tune"]
