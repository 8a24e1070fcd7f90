"""Number grids: tensors in, codes and scales out. Knows neither models nor files."""

from calib.quantizers.affine import (
    AffineSpec,
    bits_per_weight,
    decode,
    encode,
    fake_quantize,
    fake_quantize_dynamic,
    grouped,
    minmax,
    qparams,
)
from calib.quantizers.dual_binary import DualBinarySpec
from calib.quantizers.float8 import FLOAT8, Float8Spec
from calib.quantizers.levels import LevelSpec
from calib.quantizers.pack import pack, pack_trits, packed_width, trits_width, unpack, unpack_trits
from calib.quantizers.ranges import tensor_range, weight_range
from calib.quantizers.weight import AnyWeight, InputSpec, WeightSpec, describe_weight, input_spec, weight_spec

__all__ = [
    "FLOAT8",
    "AffineSpec",
    "AnyWeight",
    "DualBinarySpec",
    "Float8Spec",
    "InputSpec",
    "LevelSpec",
    "WeightSpec",
    "bits_per_weight",
    "decode",
    "describe_weight",
    "encode",
    "fake_quantize",
    "fake_quantize_dynamic",
    "grouped",
    "input_spec",
    "minmax",
    "pack",
    "pack_trits",
    "packed_width",
    "qparams",
    "tensor_range",
    "trits_width",
    "unpack",
    "unpack_trits",
    "weight_range",
    "weight_spec",
]
