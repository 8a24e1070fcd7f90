"""Weights decoded to float a tile of rows at a time, so that no float copy outlives one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from calib.nn.linear import QuantLinear

TILE = 1 << 20  # weights at a time: the tile stays in cache


def tiles(module: QuantLinear) -> Iterator[slice]:
    """Rows of the weight to decode at a time: what stays in cache; on other devices all of them."""
    out = module.out_features
    step = out if module.weight_scale.device.type != "cpu" else max(16, TILE // max(module.in_features, 1))
    for start in range(0, out, step):
        yield slice(start, min(start + step, out))


def tiled(module: QuantLinear) -> Callable[[Tensor], Tensor]:
    """x [M, in] -> x W^T + b in x's dtype; the module must outlive it."""
    owner = weakref.ref(module)  # a cycle would keep dead models in memory

    def matmul(x: Tensor) -> Tensor:
        module = owner()
        assert module is not None
        y = x.new_empty(len(x), module.out_features)
        for rows in tiles(module):
            y[:, rows] = x @ module.dequantize(rows).to(x.dtype).t()
        return y if module.bias is None else y.add_(module.bias.to(x.dtype))

    return matmul
