"""What a candidate scale costs: mean over tokens of the summed squared output error, as it will be deployed.

Where both sides are integers (weights symmetric per channel or tensor, inputs per tensor or per token) products are
int8 GEMMs: their int32 sums are exact and rescaled in fp32, so losses are those of the float simulation to the rounding
of its accumulation. Buffers are reused from one candidate to the next: fresh pages would cost more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from calib.quantizers import AffineSpec, AnyWeight, fake_quantize, fake_quantize_dynamic, qparams, weight_range
from calib.quantizers.product import LONGEST, int_mm_refusal
from calib.solvers.grid import rounded

CACHED = 1 << 18  # elements treated at a time by a chain of in-place operations
PRODUCT = 1 << 22  # outputs computed at a time
RANK_ROWS, RANK_OUTPUTS, RANK_PRODUCTS = 256, 128, 1 << 27
LARGEST = 8  # one in so many rows and outputs of a subsample is there because it is large


def quantize_input(x: Tensor, spec: AffineSpec | None, lo: Tensor, hi: Tensor) -> Tensor:
    """Fake-quantize rows x [..., n]; lo, hi [n]: channel extremes over all calibration rows, for static grids."""
    if spec is None:
        return x
    if spec.dynamic:
        return fake_quantize_dynamic(x, spec)
    return fake_quantize(x, *qparams(lo.amin(), hi.amax(), spec), spec)


def quantize_weight(weight: Tensor, spec: AnyWeight) -> Tensor:
    """Fake-quantize weight [m, n] with min-max ranges, or the published scales (no clipping inside a search)."""
    if not isinstance(spec, AffineSpec):
        codes, *params = rounded(weight, spec.with_(range="published"))
        return spec.decode(codes, *params)
    plain = spec.with_(range="minmax")
    return fake_quantize(weight, *qparams(*weight_range(weight, plain), plain), plain)


def takes_integers(inputs: AffineSpec | None, weights: AnyWeight, weight: Tensor) -> bool:
    """True where the products of these formats with weight [m, n] are sums of int8 products, exact on this machine."""
    if inputs is None or not isinstance(weights, AffineSpec) or not (inputs.integer and weights.integer):
        return False
    if not weights.symmetric or weights.granularity not in ("channel", "tensor"):
        return False
    rows = inputs.granularity == ("token" if inputs.dynamic else "tensor")
    fits = weight.device.type == "cpu" and weight.shape[1] <= LONGEST
    return rows and fits and not int_mm_refusal(weights.qmax)


class WeightCodes:
    """Codes of W diag(s) for one s after another. After a call: codes int8 [m, n], step fp32 [m], total fp32 [m], the
    exact sums of the codes' rows.
    """

    def __init__(self, weight: Tensor, spec: AffineSpec) -> None:
        m, n = weight.shape
        self.spec = spec
        self.codes = torch.empty(m, n, dtype=torch.int8)
        self.step, self.total = torch.empty(m), torch.empty(m)
        self._buffer = torch.empty(min(m, max(1, CACHED // n)), n)
        self._ceiling = weight.abs().amax(0) if spec.granularity == "tensor" else None

    def __call__(self, weight: Tensor, scale: Tensor) -> WeightCodes:
        if self._ceiling is not None:
            top = (self._ceiling * scale).amax()
            self.step.copy_(qparams(-top, top, self.spec)[0])
        for start in range(0, len(weight), len(self._buffer)):
            at = slice(start, min(start + len(self._buffer), len(weight)))
            moved = torch.mul(weight[at], scale, out=self._buffer[: at.stop - start])
            if self._ceiling is None:
                self.step[at] = qparams(moved.amin(1), moved.amax(1), self.spec)[0]
            moved.div_(self.step[at, None]).round_()  # a min-max range holds every value: nothing to clamp
            torch.sum(moved, 1, out=self.total[at])
            self.codes[at] = moved
        return self


class InputCodes:
    """Codes of x / s, rows at a time; lo, hi [n]: x's channel extremes over all calibration rows (static ranges)."""

    def __init__(self, spec: AffineSpec, lo: Tensor, hi: Tensor, scale: Tensor) -> None:
        self.spec, self.scale = spec, scale
        if not spec.dynamic:
            self.step, self.zero = (
                p.float().reshape(1) for p in qparams((lo / scale).amin(), (hi / scale).amax(), spec)
            )

    def __call__(self, x: Tensor, codes: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero point ([1] or [t, 1], fp32) of x [t, n], whose codes go into codes int8 [t, n]."""
        spec, steps, zeros = self.spec, [], []
        for start in range(0, len(x), len(buffer)):
            rows = x[start : start + len(buffer)]
            moved = torch.div(rows, self.scale, out=buffer[: len(rows)])
            if spec.dynamic:
                step, zero = qparams(moved.amin(1, keepdim=True), moved.amax(1, keepdim=True), spec)
                steps.append(step)
                zeros.append(zero.float())
            else:
                steps, zeros = [self.step], [self.zero]
            moved.div_(steps[-1])  # two divisions: the codes are then those of quantizers, ties included
            if not spec.symmetric:
                moved.add_(zeros[-1])
            codes[start : start + len(rows)] = spec.snap(moved)
        return torch.cat(steps), torch.cat(zeros)


Encoded: TypeAlias = tuple[Tensor, Tensor, Tensor]  # codes int8 [t, n], step and zero point fp32 [1] or [t, 1]


class Scratch:
    """Buffers by name that grow to the largest shape asked of them."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, columns], contents unspecified; valid until the same name is asked for again."""
        held = self._held.get(name)
        if held is None or held.numel() < rows * columns:
            held = self._held[name] = torch.empty(rows * columns, dtype=dtype)
        return held[: rows * columns].view(rows, columns)


def encoded(x: Tensor, codes: InputCodes, scratch: Scratch) -> Encoded:
    """Codes int8 [t, n] of rows x [t, n], in a buffer, their step and their zero point ([1] or [t, 1])."""
    rows, n = x.shape
    out = scratch("codes", rows, n, torch.int8)
    step, zero = codes(x, out, scratch("input", min(rows, max(1, CACHED // n)), n))
    return out, step, zero


def product(x: Encoded, weight: WeightCodes, scratch: Scratch, name: str = "product") -> Tensor:
    """fp32 [t, m], in a buffer of that name: encoded rows times the encoded weight, rescaled."""
    codes, step, zero = x
    m = len(weight.codes)
    out, block = scratch(name, len(codes), m), max(64, PRODUCT // m)
    whole = weight.step * step if step.dim() == 1 else weight.step
    offset = weight.total * zero if zero.dim() == 1 and zero.item() else None
    for start in range(0, len(codes), block):
        at = slice(start, min(start + block, len(codes)))
        sums = scratch("sums", at.stop - start, m, torch.int32)
        y = out[at].copy_(torch._int_mm(codes[at], weight.codes.t(), out=sums))
        if zero.dim() > 1:
            y.addr_(zero[at, 0], weight.total, alpha=-1)
        elif offset is not None:
            y.sub_(offset)
        y.mul_(whole)
        if step.dim() > 1:
            y.mul_(step[at])
    return out


class LinearObjective:
    """loss(s) = mean_t sum_o |(x W^T - Q_a(x / s) Q_w(W s)^T)|^2 for the Linears that read one tensor.

    x [T, n]: shifted rows. weight [m, n]: all consumers stacked. lo, hi [n]: shifted channel extremes. Everything fp32;
    the bias cancels. rotate: an orthonormal map of rows, applied to x / s and W s before they are quantized; a static
    range is then the rotated rows'. Source: OS+ (arXiv 2304.09145) eq. 9, for a site whose next step is not a
    matmul of its outputs. integer: int8 products where the formats allow them; False simulates in floats.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        lo: Tensor,
        hi: Tensor,
        inputs: AffineSpec | None,
        weights: AnyWeight,
        rotate: Callable[[Tensor], Tensor] | None = None,
        integer: bool = True,
    ) -> None:
        self.x, self.weight, self.lo, self.hi = x.float(), weight.detach().float(), lo, hi
        self.inputs, self.weights, self.rotate = inputs, weights, rotate
        self.integer = integer and takes_integers(inputs, weights, weight)
        self.share: Tensor | None = None  # [T, m]: in a subsample, the square roots of its elements' weights
        self._target: Tensor | None = None
        self._codes: WeightCodes | None = None
        self._scratch = Scratch()

    def sampled(self, rows: int, outputs: int | None = None) -> LinearObjective:
        """The same objective on at most ``rows`` rows and ``outputs`` outputs, for ranking; itself if it is no larger.

        The largest rows and outputs are in it, each for itself, and evenly spaced ones for all others: where a few
        tokens carry massive activations they make most of the loss. All outputs stay where one range spans them.
        """
        x, weight, energy = self.x, self.weight, None
        row_share, output_share = torch.ones(len(x), 1), torch.ones(len(weight))
        if len(x) > rows:
            at, share = _stratified(_squares(x), rows)
            x, row_share = x[at], share[:, None]
        if outputs is not None and len(weight) > outputs and self.weights.granularity != "tensor":
            energy = x.square().mul_(row_share).mean(0)
            at, output_share = _stratified(_squares(weight, energy), outputs)
            weight = weight[at]
        if x is self.x and weight is self.weight:
            return self
        part = LinearObjective(x, weight, self.lo, self.hi, self.inputs, self.weights, self.rotate, self.integer)
        part.share = (row_share * output_share * (len(self.weight) / len(weight))).sqrt_()  # a sum over outputs
        return part

    def few(self) -> LinearObjective:
        """The subsample that a search ranks on: 256 rows; for 8-bit weights 128 outputs, or more of narrow ones."""
        outputs = max(RANK_OUTPUTS, RANK_PRODUCTS // (RANK_ROWS * self.x.shape[1]))
        return self.sampled(RANK_ROWS, outputs if self.weights.bits == 8 else None)

    def __call__(self, scale: Tensor) -> float:
        if self._target is None:
            self._target = self.x @ self.weight.T
        return (self._integer if self.integer else self._float)(scale) / len(self.x)

    def _float(self, scale: Tensor) -> float:
        x, weight = self.x / scale, self.weight * scale
        lo, hi = self.lo / scale, self.hi / scale
        if self.rotate is not None:
            x, weight = self.rotate(x), self.rotate(weight)
            lo, hi = x.amin(0), x.amax(0)
        x = quantize_input(x, self.inputs, lo, hi)
        assert self._target is not None
        error = torch.addmm(self._target, x, quantize_weight(weight, self.weights).T, beta=-1)
        return float(
            (error if self.share is None else error.mul_(self.share)).square_().sum(1).sum(dtype=torch.float64)
        )

    def _integer(self, scale: Tensor) -> float:
        x, weight, lo, hi = self.x, self.weight, self.lo, self.hi
        assert self._target is not None and self.inputs is not None
        if self.rotate is not None:  # afterwards s is in the rows and the weight
            x, weight = self.rotate(x / scale), self.rotate(weight * scale)
            lo, hi, scale = x.amin(0), x.amax(0), torch.ones_like(scale)
        if self._codes is None or self.rotate is not None:
            assert isinstance(self.weights, AffineSpec)
            self._codes = WeightCodes(weight, self.weights)
        self._codes(weight, scale)
        codes, total = InputCodes(self.inputs, lo, hi, scale), 0.0
        block = max(64, PRODUCT // len(weight))
        for start in range(0, len(x), block):
            at = slice(start, start + block)
            error = product(encoded(x[at], codes, self._scratch), self._codes, self._scratch).sub_(self._target[at])
            if self.share is not None:
                error.mul_(self.share[at])
            total += float(error.square_().sum())  # pairwise: a dot product loses digits
        return total


def _squares(x: Tensor, energy: Tensor | None = None) -> Tensor:
    """[T]: sums over the columns of x^2 [T, n], weighted by energy [n] where it is given."""
    out, block = torch.empty(len(x)), max(1, CACHED // x.shape[1])
    for start in range(0, len(x), block):
        squares = x[start : start + block].square()
        out[start : start + block] = squares.sum(1) if energy is None else squares @ energy
    return out


def _stratified(size: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Indices [wanted] of the largest and of evenly spaced others; how many of all each stands for, mean 1."""
    count, largest = len(size), wanted // LARGEST
    order = size.sort(descending=True, stable=True).indices
    spread = torch.linspace(0, count - largest - 1, wanted - largest).round().long()
    share = torch.full((wanted,), (count - largest) / (wanted - largest))
    share[:largest] = 1.0
    return torch.cat([order[:largest], order[largest:].sort().values[spread]]), share * (wanted / count)
