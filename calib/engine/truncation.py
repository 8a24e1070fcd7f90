"""Which rank every layer gets where low_rank truncates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from calib.engine.factors import LowRankWork, budget_of
from calib.engine.survey import Survey
from calib.engine.trial import Ranks
from calib.methods import LowRank
from calib.model import Plan

Ways = Callable[[Survey], Mapping[str, Ranks]]


def truncation(
    model: nn.Module, plan: Plan, method: LowRank, look: Callable[[Ways | None], Survey]
) -> tuple[LowRankWork, list[str]]:
    """Ranks of all planned linears under the recipe's budget, and what there is to say of them. look: surveys the model
    and tries the ways that it is given; called where the method needs to know."""
    names = plan.quantized()
    shapes = [plan.entries[name].shape for name in names]
    budget = budget_of(model, plan, method.recipe)

    def chosen(even: float, found: Survey) -> dict[str, int | None]:
        energies = [found.energies[name] for name in names] if method.selects else []
        worth = [found.worth[name] for name in names] if found.worth else None
        return dict(zip(names, method.ranks(even, shapes, energies, worth, budget), strict=True))

    def several(found: Survey) -> Mapping[str, Ranks]:
        ways: dict[str, dict[str, int | None]] = {}
        for even in method.ways:
            if (ranks := chosen(even, found)) not in ways.values():
                ways[str(even)] = ranks
        return ways

    looks = method.selects or method.variant == "fwsvd"
    found = look(several if len(method.ways) > 1 else None) if looks else Survey()
    even, notes = method.ways[0], list(found.notes)
    if found.trial:
        best = min(found.trial, key=found.trial.__getitem__)
        told = ", ".join(f"{way}: {value:.4g}" for way, value in found.trial.items())
        notes.append(f"ranks are {best} of the way from global to even: answers move least ({told})")
        even = float(best)
    return LowRankWork(method, chosen(even, found), found.fisher), notes
