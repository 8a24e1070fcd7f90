"""What quantization does to one linear's output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.nn import LowRankLinear, QuantLinear

ROWS = 256  # of a site's sample, that the errors of its linears are measured on


@torch.no_grad()
def sqnr(module: QuantLinear | LowRankLinear, linear: nn.Linear, sample: Tensor) -> float:
    """10 log10(E|y|^2 / E|y - y'|^2) in dB: y the float linear's output, y' that of the module in its place.

    sample [t, in] and linear are behind the site's transform, which both outputs have in common; at most 256 of the
    rows are used.
    """
    rows = sample[:: -(-len(sample) // ROWS)]
    bias = None if linear.bias is None else linear.bias.to(rows.dtype)
    want = F.linear(rows, linear.weight.to(rows.dtype), bias).double()
    error = (_behind_transform(module, rows).double() - want).square().sum()
    return float(10 * (want.square().sum() / error.clamp(min=1e-30)).clamp(min=1e-30).log10())


def _behind_transform(module: nn.Module, rows: Tensor) -> Tensor:
    """A finished linear's output on rows that are transformed already."""
    if isinstance(module, LowRankLinear):
        return torch.as_tensor(module.up(_behind_transform(module.down, rows)))
    if not isinstance(module, QuantLinear):
        assert isinstance(module, nn.Linear)  # a float factor
        return torch.as_tensor(module(rows.to(module.weight.dtype)))
    bias = None if module.bias is None else module.bias.to(rows.dtype)
    y = F.linear(module.input.on_grid(rows), module.dequantize().to(rows.dtype), bias)
    return y if module.side is None else y + module.side(rows)
