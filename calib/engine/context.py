"""The objective of sites whose outputs meet before the next Linear: attention context, act(gate) * up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.model import Site
from calib.quantizers import AffineSpec, AnyWeight
from calib.solvers import quantize_input, quantize_weight
from calib.solvers.objective import Encoded, InputCodes, Scratch, WeightCodes, encoded, product, takes_integers

Loss = Callable[[Tensor], float]
Rotate = Callable[[Tensor], Tensor]


class _Reached(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class ContextObjective:
    """Runs the module around a site on recorded calls, up to the input of the next Linear.

    loss(s) = mean over unmasked tokens of the summed squared difference between that input computed from float and from
    quantized consumers (OS+ eq. 9 with the attention or gating as f; arXiv 2304.09145). few: the first calls, on which
    alone candidates are ranked.
    """

    def __init__(
        self,
        block: nn.Module,
        site: Site,
        runs: Sequence[Callable[[], Any]],
        masks: Sequence[Tensor | None],
        few: int = 1,
    ) -> None:
        assert site.context is not None
        self.module = block.get_submodule(site.context)
        self.consumers = [block.get_submodule(path) for path in site.consumers]
        self.stops = [block.get_submodule(path) for path in site.stops]
        self.masks = masks
        self.calls = [self._record(run) for run in runs]
        self.few, self.buffers = few, _Buffers()

    def _record(self, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            raise _Reached((args, kwargs))

        handle = self.module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            run()
        except _Reached as reached:
            args, kwargs = reached.value
            return args, kwargs
        finally:
            handle.remove()
        raise RuntimeError("the context module did not run")

    def _outputs(self, part: slice) -> Iterator[Tensor]:
        """Of each call of a part; an output is valid until the next one is asked for."""

        def stop(module: nn.Module, args: Any) -> None:
            raise _Reached(args[0])

        handles = [module.register_forward_pre_hook(stop) for module in self.stops]
        try:
            for args, kwargs in self.calls[part]:
                try:
                    result = self.module(*args, **kwargs)
                    out = result if isinstance(result, Tensor) else result[0]
                except _Reached as reached:
                    out = reached.value
                yield out
        finally:
            for handle in handles:
                handle.remove()

    def prepare(
        self,
        shift: Tensor | None,
        lo: Tensor,
        hi: Tensor,
        inputs: AffineSpec | None,
        weights: Sequence[AnyWeight],
        rotate: Rotate | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Loss, Loss]:
        """loss(s) of the few calls and of all, for inputs shifted by z; lo, hi [n]: their channel extremes; weights:
        the format of each consumer. rotate: applied to x / s and W s before they are quantized; a static range is then
        that of the shifted ``rows`` [T, n], rotated.
        """
        targets: dict[str, list[Tensor]] = {}  # made when first asked for: most variants are ranked on few calls only
        known: dict[bytes, tuple[float, int]] = {}  # what the few calls gave, by scale: it is part of what all give
        shared = _SharedInput(shift, lo, hi, inputs, self.buffers, rotate, rows)
        consumers = [
            _Consumer(linear, shift, inputs, spec, self.buffers, rotate)
            for linear, spec in zip(self.consumers, weights, strict=True)
        ]

        def measured(scale: Tensor, part: slice) -> tuple[float, int]:
            """Summed error and its tokens."""
            with torch.no_grad(), contextlib.ExitStack() as undo:
                target = targets.setdefault(str(part), [])
                if not target:
                    target.extend(out.clone() for out in self._outputs(part))
                shared.rescale(scale)
                for consumer in consumers:
                    consumer.linear.forward = consumer.quantized(scale, shared)  # type: ignore[method-assign, assignment]
                    undo.callback(delattr, consumer.linear, "forward")
                total, count = 0.0, 0
                for got, want, mask in zip(self._outputs(part), target, self.masks[part], strict=True):
                    error = (got - want).float().square_().sum(-1)
                    keep = error if mask is None or mask.shape != error.shape else error[mask]
                    total, count = total + float(keep.sum()), count + keep.numel()
                return total, count

        def of_few(scale: Tensor) -> tuple[float, int]:
            key = scale.cpu().numpy().tobytes()
            if key not in known:
                known[key] = measured(scale, slice(0, self.few))
            return known[key]

        def few(scale: Tensor) -> float:
            total, count = of_few(scale)
            return total / max(count, 1)

        def many(scale: Tensor) -> float:
            total, count = of_few(scale)
            more, others = measured(scale, slice(self.few, None))
            return (total + more) / max(count + others, 1)

        return few, many


class _Buffers:
    """What one candidate writes and the next overwrites."""

    def __init__(self) -> None:
        self.scratch = Scratch()
        self._codes: dict[nn.Module, WeightCodes] = {}

    def codes_of(self, linear: nn.Linear, spec: AffineSpec) -> WeightCodes:
        if linear not in self._codes:
            self._codes[linear] = WeightCodes(linear.weight, spec)
        return self._codes[linear]


class _SharedInput:
    """The input of a site's consumers, quantized once for all that take the same tensor."""

    def __init__(
        self,
        shift: Tensor | None,
        lo: Tensor,
        hi: Tensor,
        inputs: AffineSpec | None,
        buffers: _Buffers,
        rotate: Rotate | None,
        rows: Tensor | None,
    ) -> None:
        self.shift, self.inputs, self.buffers, self.rotate, self.rows = shift, inputs, buffers, rotate, rows
        self.whole, self.ones = (lo, hi), torch.ones_like(lo)

    def rescale(self, scale: Tensor) -> None:
        """For the next candidate."""
        self.scale = scale
        self.lo, self.hi = (end / scale for end in self.whole)
        if self.rotate is not None and self.rows is not None and self.inputs is not None and not self.inputs.dynamic:
            self.lo, self.hi = torch.aminmax(self.rotate(self.rows / scale), dim=0)
        self._of: Tensor | None = None  # held, so that its address stays its own
        self._made: Tensor | Encoded | None = None

    def floats(self, x: Tensor) -> Tensor:
        """x as the consumers see it, in floats."""
        if self._of is not x:
            moved = (x if self.shift is None else x - self.shift) / self.scale
            moved = moved if self.rotate is None else self.rotate(moved)
            self._made = quantize_input(moved, self.inputs, self.lo, self.hi)
            self._of = x
        assert isinstance(self._made, Tensor)
        return self._made

    def codes(self, x: Tensor) -> Encoded:
        """x [..., n] as rows of codes, valid until the next input is asked for."""
        if self._of is not x:
            assert self.inputs is not None
            rows = (x if self.shift is None else x - self.shift).reshape(-1, x.shape[-1])
            codes = InputCodes(self.inputs, *self.whole, self.scale)
            if self.rotate is not None:
                rows, codes = self.rotate(rows / self.scale), InputCodes(self.inputs, self.lo, self.hi, self.ones)
            self._made = encoded(rows, codes, self.buffers.scratch)
            self._of = x
        assert isinstance(self._made, tuple)
        return self._made


class _Consumer:
    """A Linear of the site, quantized anew for every candidate."""

    def __init__(
        self,
        linear: nn.Module,
        shift: Tensor | None,
        inputs: AffineSpec | None,
        weights: AnyWeight,
        buffers: _Buffers,
        rotate: Rotate | None,
    ) -> None:
        assert isinstance(linear, nn.Linear)
        self.linear, self.weights, self.buffers, self.rotate = linear, weights, buffers, rotate
        self.bias: Tensor | None = linear.bias
        if shift is not None:
            added = linear.weight @ shift
            self.bias = added if self.bias is None else self.bias + added
        self.integer = takes_integers(inputs, weights, linear.weight)
        self.ones = torch.ones(linear.in_features)

    def quantized(self, scale: Tensor, shared: _SharedInput) -> Callable[[Tensor], Tensor]:
        """The forward that stands in for the Linear's own; its result is overwritten by its next one."""
        if not self.integer:
            weight = quantize_weight(self._moved(scale), self.weights)
            return lambda x: F.linear(shared.floats(x), weight, self.bias)
        assert isinstance(self.weights, AffineSpec)
        if self.rotate is None:
            codes = self.buffers.codes_of(self.linear, self.weights)(self.linear.weight, scale)
        else:
            moved = self._moved(scale)
            codes = WeightCodes(moved, self.weights)(moved, self.ones)

        def forward(x: Tensor) -> Tensor:
            y = product(shared.codes(x), codes, self.buffers.scratch, f"product {id(self.linear)}")
            if self.bias is not None:
                y.add_(self.bias)
            return y.view(*x.shape[:-1], -1).to(x.dtype)

        return forward

    def _moved(self, scale: Tensor) -> Tensor:
        weight = self.linear.weight * scale
        return weight if self.rotate is None else self.rotate(weight)
