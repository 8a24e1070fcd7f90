"""Does a result hold what its plan says: every planned linear changed, nothing else, and nothing unsaid?"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from calib.model import Plan, apply_rewrites
from calib.nn import LowRankLinear, changed_linears
from calib.result import Result

ENOUGH = 64  # weights that are never all within half a step of each other


def audit(model: nn.Module, result: Result) -> list[str]:
    """What a result changed beyond its plan or left undone, a line each; empty where all is as the plan says.

    model: the float model as it was before, which is left as it is. Held against the plan: each planned linear is
    replaced and its values are rounded, each fold that is claimed was proven, parameters of no planned linear and of
    no proven fold's producer are what they were bit for bit, each linear left in float has a reason, and names that
    shared a tensor still do.
    """
    stock = copy.deepcopy(model)
    apply_rewrites(stock, result.plan.rewrites)
    checks = (_planned, _unplanned, _unsaid, _untied)
    return [line for check in checks for line in check(stock, result)]


def _planned(stock: nn.Module, result: Result) -> Iterator[str]:
    done, planned = changed_linears(result.model), set(result.plan.quantized())
    yield from (f"{name} is planned and was left as it was" for name in sorted(planned - done.keys()))
    yield from (f"{name} is in no plan and was replaced" for name in sorted(done.keys() - planned))
    for name in sorted(planned & done.keys()):
        module, weight = done[name], stock.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        if isinstance(module, LowRankLinear) or not bool(weight.any()):
            continue
        alike = weight.numel() < ENOUGH or bool((weight == weight[:, :1]).all())  # their codes may well be one
        if module.weight_spec.integer and not alike and len(module.codes().unique()) < 2:
            yield f"{name} holds a single code"
        if torch.equal(module.dequantize().to(weight.dtype), weight) and module.input.spec is None:
            yield f"{name} holds the weights that it had"


def _unplanned(stock: nn.Module, result: Result) -> Iterator[str]:
    """Parameters that changed and may not have."""
    planned = {name + "." for name in changed_linears(result.model)}
    free = _folded(result)
    before = dict(stock.state_dict())
    for key, value in result.model.state_dict().items():
        owner = key.rpartition(".")[0]
        if any(key.startswith(name) for name in planned) or owner in free or key.startswith("calib_"):
            continue
        if key not in before:
            yield f"{key} is in no plan and was added"
        elif not torch.equal(value.float(), before[key].to(value.dtype).float()):
            yield f"{key} is in no plan and was changed"


def _folded(result: Result) -> set[str]:
    """Modules that took part in a fold which was proven: who absorbed it, and who reads what was folded (a router, left
    in float, reads what its experts do)."""
    found = set()
    for block in result.plan.blocks.values():
        for site in block.sites:
            record = result.report["sites"].get(f"{block.name}.{site.name}", {})
            moved = any(result.plan.entries[f"{block.name}.{p}"].status == "transformed" for p in site.consumers)
            if site.producer is not None and moved and record.get("proof") is not None:
                found |= {f"{block.name}.{path}" for path in (site.producer.path, *site.consumers)}
    return found


def _unsaid(stock: nn.Module, result: Result) -> Iterator[str]:
    """Linears without a word on them, and folds without a proof."""
    plan: Plan = result.plan
    linears = {name for name, module in stock.named_modules() if isinstance(module, nn.Linear)}
    yield from (f"{name} is not in the plan" for name in sorted(linears - plan.entries.keys()))
    for name, entry in plan.entries.items():
        if entry.status == "excluded" and not entry.reason:
            yield f"{name} is excluded without a reason"
    sites = result.report["sites"]
    for block in plan.blocks.values():
        for site in block.sites:
            entries = [plan.entries[f"{block.name}.{path}"] for path in site.consumers]
            record = sites.get(f"{block.name}.{site.name}", {})
            if any(each.status == "transformed" for each in entries) and record.get("proof") is None:
                yield f"{block.name}.{site.name} is transformed without a proof"


def _untied(stock: nn.Module, result: Result) -> Iterator[str]:
    now = dict(result.model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in stock.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and name in now and other in now and not torch.equal(now[name], now[other]):
            yield f"{name} and {other} were one tensor and differ"
