"""The mathematics: tensors in, tensors out. Knows no modules and no files."""

from calib.solvers.awq import awq_scale, search_power
from calib.solvers.gptq import gptq
from calib.solvers.objective import LinearObjective, quantize_input, quantize_weight
from calib.solvers.os_plus import Search, midpoint, rank_coarse, scale_for, search_exhaustive, search_fast
from calib.solvers.smoothquant import smoothing_scale

__all__ = [
    "LinearObjective",
    "Search",
    "awq_scale",
    "gptq",
    "midpoint",
    "quantize_input",
    "quantize_weight",
    "rank_coarse",
    "scale_for",
    "search_exhaustive",
    "search_fast",
    "search_power",
    "smoothing_scale",
]
