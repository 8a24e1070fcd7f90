"""What a method is given and gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from calib.quantizers import AnyWeight
from calib.recipe import Recipe
from calib.solvers import Pairs

Loss = Callable[[Tensor], float]


@dataclass(eq=False)
class SiteView:
    """One site's statistics, as a method sees them; n channels, tied channels already equal.

    lo, hi [n]: extremes over all calibration rows. weight_absmax [n]: over all consumers. mean_abs [n]: of a sample.
    objective(shift, hadamard) gives two losses of a scale, on few rows and on many. can_shift, can_scale, can_rotate:
    whether something takes a (z, s), or a rotation, here. largest_block: of a rotation; beyond it none is as cheap.
    noise: how much further off the loss on few rows may be than it is seen to be; keep: how many candidates are worth
    the loss on many.
    """

    name: str
    kind: str
    lo: Tensor
    hi: Tensor
    weight_absmax: Tensor
    mean_abs: Tensor
    can_shift: bool
    can_scale: bool
    objective: Callable[[Tensor | None, int], tuple[Loss, Loss]]
    can_rotate: bool = False
    largest_block: int = 128
    noise: float = 0.05
    keep: int = 16


@dataclass(eq=False)
class ShiftScale:
    """A site's solution: z and s, each [n] or None, then a block Hadamard (1: none); detail goes into the report."""

    shift: Tensor | None = None
    scale: Tensor | None = None
    hadamard: int = 1
    detail: dict[str, Any] = field(default_factory=dict)


class SiteMethod(Protocol):
    """Finds (z, s) of one site."""

    name: str

    def solve(self, site: SiteView, recipe: Recipe) -> ShiftScale: ...


class WeightMethod(Protocol):
    """Rounds weight [m, n]; gram [n, n] is X^T X of its input, pairs how that differs from the float model's where the
    method is ``paired``. Codes, scale, zero point.
    """

    name: str
    paired: bool

    def quantize(
        self, weight: Tensor, gram: Tensor, spec: AnyWeight, recipe: Recipe, pairs: Pairs | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...
