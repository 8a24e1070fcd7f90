"""A linear kept as two: y = up(down(x)), each a Linear or a QuantLinear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calib.nn.linear import CalledAsWeight, QuantLinear


class LowRankLinear(CalledAsWeight, nn.Module):
    """``down`` in -> rank without bias, ``up`` rank -> out with the bias of the linear that this stands for.

    It saves memory where rank (out + in) < out in.
    """

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = down, up

    @classmethod
    def of(cls, b: Tensor, a: Tensor, bias: Tensor | None, dtype: torch.dtype) -> LowRankLinear:
        """From B [out, r], A [r, in] and bias [out], in floats."""
        return cls(float_linear(a, None, dtype), float_linear(b, bias, dtype))

    @property
    def in_features(self) -> int:
        return int(self.down.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        return int(self.up.out_features)  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        return int(self.down.out_features)  # type: ignore[arg-type]

    @property
    def bias(self) -> Tensor | None:
        bias: Any = self.up.bias
        return bias

    def merged(self) -> Tensor:
        """B A [out, in], of float factors."""
        assert isinstance(self.down, nn.Linear) and isinstance(self.up, nn.Linear)
        return (self.up.weight.detach().double() @ self.down.weight.detach().double()).to(self.up.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        return y


def float_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A frozen Linear that holds weight [out, in] and bias [out]."""
    out, n = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(n, out, bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().to(dtype).contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype).clone(), requires_grad=False)
    return linear.eval()


def changed_linears(root: nn.Module) -> dict[str, QuantLinear | LowRankLinear]:
    """Every linear below ``root`` that calib put in the place of another, by name; factors belong to their whole."""
    found: dict[str, QuantLinear | LowRankLinear] = {}
    for name, module in root.named_modules():
        if isinstance(module, LowRankLinear) or (
            isinstance(module, QuantLinear) and name.rpartition(".")[0] not in found
        ):
            found[name] = module
    return found
