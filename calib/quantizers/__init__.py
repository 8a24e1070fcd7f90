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
from calib.quantizers.pack import pack, packed_width, unpack
from calib.quantizers.ranges import tensor_range, weight_range

__all__ = [
    "AffineSpec",
    "bits_per_weight",
    "decode",
    "encode",
    "fake_quantize",
    "fake_quantize_dynamic",
    "grouped",
    "minmax",
    "pack",
    "packed_width",
    "qparams",
    "tensor_range",
    "unpack",
    "weight_range",
]
