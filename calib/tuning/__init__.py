"""Recovery training: what calibration alone cannot bring back, by blocks or end to end."""

from calib.tuning.loop import Tuning, tune
from calib.tuning.objective import checkpointed, next_token_loss, objective
from calib.tuning.qat import Training, TunedLinear
from calib.tuning.recipe import LOSSES, PRESETS, TRAINABLE, Terms, TuneRecipe, tune_recipe
from calib.tuning.reconstruct import FoldableSite, Reconstruction, reconstruct

__all__ = [
    "LOSSES",
    "PRESETS",
    "TRAINABLE",
    "FoldableSite",
    "Reconstruction",
    "Terms",
    "Training",
    "TuneRecipe",
    "TunedLinear",
    "Tuning",
    "checkpointed",
    "next_token_loss",
    "objective",
    "reconstruct",
    "tune",
    "tune_recipe",
]
