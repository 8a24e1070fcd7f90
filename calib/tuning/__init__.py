"""One small training loop, for what cannot be had without gradients."""

from calib.tuning.loop import Tuning, next_token_loss, tune

__all__ = ["Tuning", "next_token_loss", "tune"]
