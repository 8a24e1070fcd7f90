"""Sites of a block: producer -> tensor -> consumers, proposed from one recorded forward.

A proposal may be wrong: every fold proves itself on real input before it is kept (transforms/fold.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from calib.model.trace import MULTIPLY, RELU, Op, Step, Trace, paths_to, replay_channels, tensors_in

SiteKind = Literal["norm", "vo", "updown", "fc", "input"]


@dataclass(frozen=True)
class Gain:
    """A norm's affine: output = n(x) * (offset + weight) + bias."""

    offset: float
    weight: str
    bias: str | None


@dataclass(frozen=True, eq=False)
class Producer:
    """What makes a site's tensor and can absorb a scale (always) and a shift.

    index [n]: the producer's output channel that arrives in each of the n channels of the site.
    """

    path: str
    index: Tensor
    gain: Gain | None  # a norm; None: a Linear
    shift: bool  # the path adds: a constant moved into the producer arrives unchanged


@dataclass(eq=False)
class Site:
    """One activation tensor that feeds Linears; paths are relative to the block."""

    kind: SiteKind
    groups: list[list[str]]  # consumers that take the identical tensor, one list a tensor (experts: several)
    features: int
    producer: Producer | None = None
    context: str | None = None  # module that maps the site's tensor to the inputs of ``stops``
    stops: list[str] = field(default_factory=list)
    note: str = ""  # why no producer absorbs it
    head: int = 1  # the largest rotation's block that folds between value and output projection, proven
    routers: list[str] = field(default_factory=list)  # consumers whose output chooses experts

    @property
    def consumers(self) -> list[str]:
        return [path for group in self.groups for path in group]

    @property
    def name(self) -> str:
        first, *rest = self.groups[0]
        return "+".join([first, *(path.rpartition(".")[2] for path in rest)]) + ("+..." if len(self.groups) > 1 else "")


def affine_gain(module: nn.Module, x: Tensor) -> Gain | None:
    """The affine form of a norm-like leaf, found by probing its weight with 0 and 1; None where it has none."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or x.shape[-1] != weight.shape[0]:
        return None
    bias = getattr(module, "bias", None)
    parameters = {name: p.detach() for name, p in module.named_parameters(recurse=False)}

    def at(value: Tensor) -> Tensor:
        out = functional_call(module, {**parameters, "weight": value}, (x,))
        return out if isinstance(out, Tensor) else out[0]

    with torch.no_grad():
        y0, y1, y = at(torch.zeros_like(weight)).float(), at(torch.ones_like(weight)).float(), at(weight).float()
        unit, base = y1 - y0, y0 - (0.0 if bias is None else bias.float())
        if y.shape[-1] != weight.shape[0] or not torch.allclose(y0 + weight.float() * unit, y, rtol=1e-3, atol=1e-3):
            return None
        if bool((base.abs() <= 1e-5 * unit.abs().amax()).all()):
            return Gain(0.0, "weight", None if bias is None else "bias")
        if torch.allclose(base, unit, rtol=1e-3, atol=1e-4):
            return Gain(1.0, "weight", None if bias is None else "bias")
    return None


def _group_by_input(trace: Trace, apart: set[str]) -> list[list[Op]]:
    groups: dict[int, list[Op]] = {}
    for op in trace.module_ops(nn.Linear):
        if op.path not in apart:
            groups.setdefault(id(op.args[0]), []).append(op)
    return list(groups.values())


def _run_again(trace: Trace) -> dict[str, Op]:
    """The Linears that run more than once in a forward, on tensors of different making; one of their runs each."""
    runs: dict[str, list[Op]] = {}
    for op in trace.module_ops(nn.Linear):
        runs.setdefault(op.path, []).append(op)
    found = {}
    for path, ops in runs.items():
        makers = [_producer(trace, op.args[0]) for op in ops] if len(ops) > 1 else []
        names = {None if isinstance(maker, str) else (maker[0].path, maker[1]) for maker in makers}
        if None in names or len(names) > 1:
            found[path] = ops[0]
    return found


def _producer(trace: Trace, tensor: Tensor) -> tuple[Op, int, list[Step], Tensor, Gain | None] | str:
    """The one module behind a tensor, or why there is none."""
    blocked = "no norm or linear reaches it through foldable ops"
    for op, output, steps in paths_to(trace, tensor):
        assert op.module is not None
        gain = None
        if not isinstance(op.module, nn.Linear):
            gain = affine_gain(op.module, op.args[0] if op.args else tensors_in(op.kwargs)[0])
            if gain is None:
                continue
        index = replay_channels(op.outputs[output].shape, tensor.device, steps)
        if index is None:
            blocked = f"channels of {op.path} are mixed on the way"
            continue
        return op, output, steps, index, gain
    return blocked


def find_sites(trace: Trace, block: nn.Module) -> list[Site]:
    """Every Linear of the block, grouped into sites, in call order.

    An expert that no token reached takes the part of its called siblings. A Linear that was never called and has no
    such sibling makes every norm of its width unfoldable, since it may be reading that norm.
    """
    sites = _called_sites(trace)
    called = {path for site in sites for path in site.consumers}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear) and path not in called and not _join_sibling(sites, path):
            for site in sites:
                if site.kind == "norm" and site.features == module.in_features:
                    site.kind, site.producer, site.note = "input", None, f"{path} did not run and may read it too"
    return sites


def _join_sibling(sites: list[Site], path: str) -> bool:
    parent, _, number = path.rpartition(".")
    for site in sites:
        for sibling in site.consumers:
            if sibling.rpartition(".")[0] != parent or not number.isdigit():
                continue
            if site.producer is None or site.producer.gain is not None:
                site.groups.append([path])
            else:
                owner = site.producer.path.rpartition(".")[0]
                producer = replace(site.producer, path=f"{owner}.{number}")
                sites.append(replace(site, groups=[[path]], producer=producer))
            return True
    return False


def _called_sites(trace: Trace) -> list[Site]:
    sites: list[Site] = []
    by_producer: dict[tuple[int, int], Site] = {}
    again = _run_again(trace)
    for group in _group_by_input(trace, set(again)):
        tensor = group[0].args[0]
        paths = [op.path for op in group]
        found = _producer(trace, tensor)
        if isinstance(found, str):
            site = Site("input", [paths], tensor.shape[-1], note=found)
            sites.append(site)
        else:
            op, output, steps, index, gain = found
            key = (id(op), output)
            names = {step.op.name for step in steps}
            site_or_none = by_producer.get(key)
            if site_or_none is not None and gain is not None and torch.equal(site_or_none.producer.index, index):  # type: ignore[union-attr]
                site_or_none.groups.append(paths)  # experts: other rows of the same tensor
                site_or_none.routers += [op.path for op in group if _feeds(trace, op, "topk")]
                continue
            kind: SiteKind = "norm" if gain is not None else "vo"
            if gain is None and names & RELU:
                kind = "fc"
            elif gain is None and names & MULTIPLY:
                kind = "updown"
            shift = not names & (MULTIPLY | RELU)
            site = Site(kind, [paths], tensor.shape[-1], Producer(op.path, index, gain, shift))
            by_producer.setdefault(key, site)
            sites.append(site)
        site.routers += [op.path for op in group if _feeds(trace, op, "topk")]
        _find_context(trace, site, group)
    for path, op in again.items():  # what it takes in each of its runs is one set of statistics
        sites.append(Site("input", [[path]], op.args[0].shape[-1], note="it runs more than once in a forward"))
    return sites


def _feeds(trace: Trace, start: Op, name: str) -> bool:
    """True where an op called ``name`` is reached from start before another Linear."""
    waiting, seen = [start], {id(start)}
    while waiting:
        for tensor in waiting.pop().outputs:
            for op in trace.uses.get(id(tensor), []):
                if op.name == name:
                    return True
                if id(op) not in seen and not isinstance(op.module, nn.Linear):
                    seen.add(id(op))
                    waiting.append(op)
    return False


def _find_context(trace: Trace, site: Site, group: list[Op]) -> None:
    """The smallest module that takes the site's tensor and holds both its consumers and the Linears after them.

    Set only where the consumers' outputs meet before the next Linear (attention, gating): there their errors are
    judged together, elsewhere the plain output of the Linears is judged.
    """
    members = {id(op) for op in group}
    joined, stops = _next_linears(trace, group, members)
    if not joined or not stops:
        return
    tensor_id = id(group[0].args[0])
    inside = [op.path for op in group]
    holders = [
        scope.path
        for scope in trace.scopes
        if scope.path
        and any(id(t) == tensor_id for t in scope.inputs)
        and all(path.startswith(scope.path + ".") for path in inside)
    ]
    for holder in sorted(holders, key=len, reverse=True):
        within = [path for path in stops if path.startswith(holder + ".")]
        if within:
            site.context, site.stops = holder, within
            return
    for holder in holders:  # the module's own output is what the next Linear takes (BERT's self-attention)
        site.context, site.stops = holder, []
        return


def _next_linears(trace: Trace, group: list[Op], members: set[int]) -> tuple[bool, list[str]]:
    """Follow the group's outputs to the next Linears. joined: attention or gating lies between."""
    reached = {id(t) for op in group for t in op.outputs}
    joined, stops = False, []
    for op in trace.ops:
        if id(op) in members:
            continue
        touched = [t for t in tensors_in((op.args, op.kwargs)) if id(t) in reached]
        if not touched:
            continue
        if isinstance(op.module, nn.Linear):
            if op.path not in stops:
                stops.append(op.path)
            continue
        if not stops and (len(touched) > 1 or "softmax" in op.name):
            joined = True
        reached.update(id(t) for t in op.outputs)
    return joined, stops
