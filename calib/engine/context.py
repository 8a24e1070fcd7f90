"""The objective of sites whose outputs meet before the next Linear: attention context, act(gate) * up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.model import Site
from calib.quantizers import AffineSpec
from calib.solvers import quantize_input, quantize_weight

Loss = Callable[[Tensor], float]


class _Reached(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class ContextObjective:
    """Runs the module around a site on recorded calls, up to the input of the next Linear.

    loss(s) = mean over unmasked tokens of the summed squared difference between that input computed from float and from
    quantized consumers (OS+ eq. 9 with the attention or gating as f; arXiv 2304.09145).
    """

    def __init__(
        self, block: nn.Module, site: Site, runs: Sequence[Callable[[], Any]], masks: Sequence[Tensor | None]
    ) -> None:
        assert site.context is not None
        self.module = block.get_submodule(site.context)
        self.consumers = [block.get_submodule(path) for path in site.consumers]
        self.stops = [block.get_submodule(path) for path in site.stops]
        self.masks = masks
        self.calls = [self._record(run) for run in runs]

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

    def _outputs(self) -> list[Tensor]:
        def stop(module: nn.Module, args: Any) -> None:
            raise _Reached(args[0])

        outputs = []
        handles = [module.register_forward_pre_hook(stop) for module in self.stops]
        try:
            for args, kwargs in self.calls:
                try:
                    result = self.module(*args, **kwargs)
                    outputs.append(result if isinstance(result, Tensor) else result[0])
                except _Reached as reached:
                    outputs.append(reached.value)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def prepare(
        self, shift: Tensor | None, lo: Tensor, hi: Tensor, inputs: AffineSpec | None, weights: AffineSpec
    ) -> Loss:
        """loss(s) for inputs shifted by z; lo, hi [n]: their channel extremes."""
        target: list[Tensor] = []  # computed when first asked for: most variants are ranked on few tokens only

        def loss(scale: Tensor) -> float:
            with torch.no_grad(), contextlib.ExitStack() as undo:
                if not target:
                    target.extend(self._outputs())
                seen: dict[int, Tensor] = {}

                def quantized(x: Tensor) -> Tensor:  # consumers share their input: quantize it once
                    if id(x) not in seen:
                        moved = x if shift is None else x - shift
                        seen[id(x)] = quantize_input(moved / scale, inputs, lo / scale, hi / scale)
                    return seen[id(x)]

                for consumer in self.consumers:
                    assert isinstance(consumer, nn.Linear)
                    weight: Tensor = consumer.weight
                    bias: Tensor | None = consumer.bias
                    if shift is not None:
                        added = weight @ shift
                        bias = added if bias is None else bias + added
                    deployed = quantize_weight(weight * scale, weights)
                    forward = lambda x, w=deployed, b=bias: F.linear(quantized(x), w, b)  # noqa: E731
                    consumer.forward = forward  # type: ignore[method-assign]
                    undo.callback(delattr, consumer, "forward")
                total = count = 0.0
                for got, want, mask in zip(self._outputs(), target, self.masks, strict=True):
                    error = (got - want).float().square().sum(-1)
                    keep = error if mask is None or mask.shape != error.shape else error[mask]
                    total, count = total + float(keep.sum()), count + keep.numel()
                return total / max(count, 1)

        return loss
