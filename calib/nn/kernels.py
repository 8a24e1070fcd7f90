"""What runs: the one place that chooses a kernel for a packed QuantLinear on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from calib.nn.linear import QuantLinear

Kernel = Callable[[Tensor], Tensor]


def select(module: QuantLinear) -> Kernel:
    """The fastest kernel that serves the module's format here; falls back to transient dequantize + F.linear."""
    return _dequantize(module)


def describe() -> dict[str, str]:
    """Format -> the kernel that serves it on this machine, and why."""
    return {"any": "dequantize: transient float weight, F.linear"}


def _dequantize(module: QuantLinear) -> Kernel:
    def run(x: Tensor) -> Tensor:
        return F.linear(module.input(x), module.dequantize().to(x.dtype), module.bias)

    run.kernel_name = "dequantize"  # type: ignore[attr-defined]
    return run
