"""What a candidate scale costs: mean over tokens of the summed squared output error, as it will be deployed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calib.quantizers import AffineSpec, fake_quantize, fake_quantize_dynamic, qparams, weight_range


def quantize_input(x: Tensor, spec: AffineSpec | None, lo: Tensor, hi: Tensor) -> Tensor:
    """Fake-quantize rows x [..., n]; lo, hi [n]: channel extremes over all calibration rows, for static grids."""
    if spec is None:
        return x
    if spec.dynamic:
        return fake_quantize_dynamic(x, spec)
    return fake_quantize(x, *qparams(lo.amin(), hi.amax(), spec), spec)


def quantize_weight(weight: Tensor, spec: AffineSpec) -> Tensor:
    """Fake-quantize weight [m, n] with min-max ranges at the spec's granularity (no clipping inside a search)."""
    plain = spec.with_(range="minmax")
    return fake_quantize(weight, *qparams(*weight_range(weight, plain), plain), plain)


class LinearObjective:
    """loss(s) = mean_t sum_o |(x W^T - Q_a(x / s) Q_w(W s)^T)|^2 for the Linears that read one tensor.

    x [T, n]: shifted rows. weight [m, n]: all consumers stacked. lo, hi [n]: shifted channel extremes. Everything fp32;
    the bias cancels. rotate: an orthonormal map of rows, applied to x / s and W s before they are quantized; a static
    range is then the rotated rows'. Source: OS+ (arXiv 2304.09145) eq. 9, for a site whose next step is not a
    matmul of its outputs.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        lo: Tensor,
        hi: Tensor,
        inputs: AffineSpec | None,
        weights: AffineSpec,
        rotate: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.x, self.weight, self.lo, self.hi = x.float(), weight.float(), lo, hi
        self.inputs, self.weights, self.rotate = inputs, weights, rotate
        self._target: Tensor | None = None

    def __call__(self, scale: Tensor) -> float:
        x, weight = self.x / scale, self.weight * scale
        lo, hi = self.lo / scale, self.hi / scale
        if self.rotate is not None:
            x, weight = self.rotate(x), self.rotate(weight)
            lo, hi = x.amin(0), x.amax(0)
        x = quantize_input(x, self.inputs, lo, hi)
        if self._target is None:
            self._target = self.x @ self.weight.T
        error = torch.addmm(self._target, x, quantize_weight(weight, self.weights).T, beta=-1)
        return float(error.square_().sum(1).mean())
