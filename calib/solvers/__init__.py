"""The mathematics: tensors in, tensors out. Knows no modules and no files."""

from calib.solvers.allocate import allocate
from calib.solvers.awq import awq_scale, search_power
from calib.solvers.basis import (
    TRUNCATIONS,
    Bases,
    InputStatistics,
    bases,
    choose_ranks,
    evened,
    refit,
    svd_llm_bases,
    uniform_ranks,
)
from calib.solvers.compensate import COMPENSATIONS, error_bases, loftq
from calib.solvers.gptq import Pairs, gptq
from calib.solvers.grid import bias_correction, rounded, weight_params
from calib.solvers.objective import LinearObjective, quantize_input, quantize_weight
from calib.solvers.os_plus import Search, midpoint, rank_coarse, scale_for, search_exhaustive, search_fast
from calib.solvers.smoothquant import smoothing_scale
from calib.solvers.turn import LearnedTurn, learn_turn

__all__ = [
    "COMPENSATIONS",
    "TRUNCATIONS",
    "Bases",
    "InputStatistics",
    "LearnedTurn",
    "LinearObjective",
    "Pairs",
    "Search",
    "allocate",
    "awq_scale",
    "bases",
    "bias_correction",
    "choose_ranks",
    "error_bases",
    "evened",
    "gptq",
    "learn_turn",
    "loftq",
    "midpoint",
    "quantize_input",
    "quantize_weight",
    "rank_coarse",
    "refit",
    "rounded",
    "scale_for",
    "search_exhaustive",
    "search_fast",
    "search_power",
    "smoothing_scale",
    "svd_llm_bases",
    "uniform_ranks",
    "weight_params",
]
