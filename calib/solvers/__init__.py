"""The mathematics: tensors in, tensors out. Knows no modules and no files."""

from calib.solvers.allocate import allocate
from calib.solvers.gptq import gptq
from calib.solvers.grid import bias_correction, rounded, weight_params
from calib.solvers.objective import LinearObjective, quantize_input, quantize_weight
from calib.solvers.os_plus import Search, midpoint, rank_coarse, scale_for, search_exhaustive, search_fast
from calib.solvers.smoothquant import smoothing_scale

__all__ = [
    "LinearObjective",
    "Search",
    "allocate",
    "bias_correction",
    "gptq",
    "midpoint",
    "quantize_input",
    "quantize_weight",
    "rank_coarse",
    "rounded",
    "scale_for",
    "search_exhaustive",
    "search_fast",
    "smoothing_scale",
    "weight_params",
]
