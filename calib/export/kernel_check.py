"""This machine's kernels against the arithmetic that defines a linear, on the inputs that a real forward gives them.

Integer kernels give the same bits, or nearly: on a machine that rescales in another order, sums differ by 1e-7,
sooner or later an activation next to a rounding boundary takes the neighbouring code, and from there on a low-bit
network differs like one whose embeddings carry that noise (SmolLM2-135M, static W8A8: 0.04 of the logit range).
Linear by linear the two can be compared closely.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from calib.nn import QuantLinear


@contextlib.contextmanager
def comparing(model: nn.Module) -> Iterator[dict[str, float]]:
    """While it runs in mode 'fake': name -> largest difference of the packed output, of its largest value."""
    differences: dict[str, float] = {}
    busy = False

    def compare(name: str, module: QuantLinear, x: Tensor, fake: Tensor) -> None:
        nonlocal busy
        if busy or not fake.numel():
            return
        busy, before = True, module.mode
        try:
            packed = module.set_mode("packed")(x)
        finally:
            module.set_mode(before)
            busy = False
        error = float((packed - fake).abs().max()) / max(float(fake.abs().max()), 1e-30)
        differences[name] = max(error, differences.get(name, 0.0))

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):

            def hook(m: Any, args: Any, out: Any, name: str = name) -> None:
                compare(name, m, args[0], out)

            hooks.append(module.register_forward_hook(hook))
    try:
        yield differences
    finally:
        for handle in hooks:
            handle.remove()
