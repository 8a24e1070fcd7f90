"""Parameters and codes of a weight in any format, and the bias that makes good what rounding moves the mean output."""

from __future__ import annotations

import torch
from torch import Tensor

from calib.errors import InputError, NumericsError
from calib.quantizers import AffineSpec, AnyWeight, DualBinarySpec, qparams, weight_range
from calib.solvers.dual_binary import dual_scale
from calib.solvers.levels import level_codes, level_scale

BLOCK = 1 << 18  # elements searched at a time: the candidates then run in cache
LARGEST = 65504.0  # of fp16


def weight_params(weight: Tensor, spec: AnyWeight, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point (int32 zeros where the format has none) of weight [out, in].

    importance [in]: second moments of the inputs, weights of the squared errors where the format's range is ``mse``.
    Raises NumericsError on NaN, infinity, or scales beyond fp16 where it is what the format keeps; InputError on groups
    that do not divide the inputs.
    """
    if isinstance(spec, AffineSpec):
        return qparams(*weight_range(weight, spec, importance), spec)
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise NumericsError("a weight holds NaN or infinity", "repair the checkpoint, or exclude the layer")
    if importance is not None and importance.shape != weight.shape[1:]:
        raise InputError(
            f"importance {tuple(importance.shape)} for {weight.shape[1]} inputs", "give one value an input"
        )
    find = dual_scale if isinstance(spec, DualBinarySpec) else level_scale
    rows = weight.split(max(1, BLOCK // max(weight.shape[1], 1)))
    scale = torch.cat([find(part, spec, importance) for part in rows])  # type: ignore[arg-type]
    if float(weight.abs().amax()) > LARGEST or not bool(torch.isfinite(scale).all()):
        raise NumericsError(f"a weight is beyond {LARGEST:.0f}, and its scale is kept in fp16", "exclude the layer")
    return scale, torch.zeros_like(scale[..., :1], dtype=torch.int32)


def rounded(weight: Tensor, spec: AnyWeight, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (int8), scale and zero point of weight [out, in] without error feedback."""
    scale, zero_point = weight_params(weight, spec, importance)
    if isinstance(spec, (AffineSpec, DualBinarySpec)):
        return spec.encode(weight, scale, zero_point), scale, zero_point
    return level_codes(weight.float(), scale, spec), scale, zero_point


def bias_correction(weight: Tensor, quantized: Tensor, rows: Tensor) -> Tensor:
    """What to add to the bias, [out]: the b that makes the sum over rows x of ||(W - What) x - b||^2 / ||W x||^2 least.

    weight and its quantized values [out, in], rows [T, in]. It is the mean of (W - What) x, each row weighed by one
    over its output's energy: in a plain mean a few massive tokens move the bias that all others then carry.
    """
    w, x = weight.double(), rows.double()
    weighed = 1 / (x @ w.T).square().sum(1).clamp(min=1e-12)
    return (w - quantized.double()) @ ((weighed @ x) / weighed.sum())
