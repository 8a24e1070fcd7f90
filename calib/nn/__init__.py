"""Modules that hold results. How they were found is not known here."""

from calib.nn.activation import ActivationQuantizer
from calib.nn.attention import AttentionFormat, attention_modules, route_attention
from calib.nn.basis_linear import BasisLinear
from calib.nn.describe import describe_linear, linear_group, quant_linear
from calib.nn.hadamard import best_block, block_hadamard, hadamard_matrix
from calib.nn.kv_cache import Int8Cache, use_int8_cache
from calib.nn.linear import CalledAsWeight, QuantLinear
from calib.nn.low_rank import LowRankLinear, changed_linears, float_linear
from calib.nn.prefix import Prefix, StatelessCache
from calib.nn.replay import Replay
from calib.nn.side_branch import SideBranch

__all__ = [
    "ActivationQuantizer",
    "AttentionFormat",
    "BasisLinear",
    "CalledAsWeight",
    "Int8Cache",
    "LowRankLinear",
    "Prefix",
    "QuantLinear",
    "Replay",
    "SideBranch",
    "StatelessCache",
    "attention_modules",
    "best_block",
    "block_hadamard",
    "changed_linears",
    "describe_linear",
    "float_linear",
    "hadamard_matrix",
    "linear_group",
    "quant_linear",
    "route_attention",
    "use_int8_cache",
]
