"""Basel in the place of the block loop: the whole model is trained at once, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib.engine.factors import STAYS_DENSE, budget_of
from calib.engine.survey import survey
from calib.methods import Basel, LowRank
from calib.model import Batch, Plan, Resident


def trained(
    model: nn.Module,
    plan: Plan,
    method: Basel,
    batches: Sequence[Batch],
    *,
    folder: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Run Basel on the planned linears; the plan and the returned report say what became of them. folder: keeps the
    state of the training, from which a killed run goes on."""
    recipe, names = method.recipe, plan.quantized()
    with torch.no_grad():
        found = survey(model, plan, LowRank(recipe, "svd"), batches, Resident(), list, recipe.seed)
    plan.notes += found.notes
    worth = {name: found.worth.get(name, 1.0) for name in names}
    budget = budget_of(model, plan, recipe)
    report = method.run(model, names, batches, worth, budget, folder=folder, progress=progress)
    for name, rank in report["ranks"].items():
        entry = plan.entries[name]
        entry.rank = rank
        if rank is None:
            entry.status, entry.reason = "excluded", STAYS_DENSE
        else:
            entry.bits *= rank * sum(entry.shape) / (entry.shape[0] * entry.shape[1])
    return {"sites": {}, "block_error": {}, "prefix": [], **report}
