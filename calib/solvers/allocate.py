"""Which format each layer takes under a budget of bytes: an integer program."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from calib.errors import InputError


def allocate(cost: ArrayLike, size: ArrayLike, budget: float) -> list[int]:
    """The choice of each layer [layers] with the least total cost whose sizes together stay within the budget.

    cost, size [layers, choices]: what each choice costs (any additive measure of error) and takes. Solved exactly
    (scipy.optimize.milp, HiGHS). Raises InputError where even the smallest choices exceed the budget, and for figures
    that are not finite.
    """
    costs, sizes = np.asarray(cost, dtype=float), np.asarray(size, dtype=float)
    layers, choices = costs.shape
    if sizes.shape != costs.shape or not (np.isfinite(costs).all() and np.isfinite(sizes).all()):
        raise InputError(
            f"costs {costs.shape} and sizes {sizes.shape} are not alike, or not finite", "give one of each"
        )
    least = sizes.min(axis=1).sum()
    if least > budget:
        raise InputError(f"the smallest formats take {least:.0f}, more than the budget of {budget:.0f}", "raise it")
    rows = np.repeat(np.arange(layers), choices)
    one_each = csr_array((np.ones(layers * choices), (rows, np.arange(layers * choices))))
    scale = max(float(costs.max()), 1e-300)  # the solver's tolerances are absolute
    found = milp(
        costs.ravel() / scale,
        integrality=np.ones(layers * choices),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes.reshape(1, -1), ub=budget)],
        options={"mip_rel_gap": 1e-6},
    )
    if found.x is None:
        raise InputError(f"no allocation was found ({found.message})", "raise the budget")
    return [int(i) for i in found.x.reshape(layers, choices).argmax(axis=1)]
