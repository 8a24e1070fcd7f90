"""The plan: every Linear is transformed and quantized, quantized only, or left out for a named reason."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calib.errors import InputError, ModelError
from calib.model.blocks import Batch, Call, Stack, capture, find_stacks, in_float32
from calib.model.linears import apply_rewrites, find_rewrites, linears, loop_over_experts
from calib.model.sites import Site, find_sites
from calib.model.store import Resident
from calib.model.trace import record
from calib.quantizers import AnyWeight
from calib.recipe import Recipe
from calib.transforms import FoldProducer, FoldTarget, SiteTransform, tolerance_for, undone_on_failure

COLLAPSE = (
    "weights below 2 bits, rounded after training: expect a model that has collapsed, as a start for recovery training "
    "(distillation from the float model) and not for use"
)
TRANSFORMING = ("os+", "smoothquant", "awq", "hadamard", "rotate")
Status = Literal["transformed", "quantized", "factored", "excluded"]


@dataclass
class Entry:
    """One Linear. site: its class; fold: what absorbs the transform ("input_layernorm: scale", "fused: shift"). rank:
    of its two factors; ``factored``: they stay float."""

    name: str
    shape: tuple[int, int]
    status: Status
    site: str = ""
    fold: str = ""
    reason: str = ""
    bits: float = 32.0  # stored bits a weight, scales included
    rank: int | None = None


@dataclass
class BlockPlan:
    """A block and its sites; paths in sites are relative to the block."""

    name: str
    sites: list[Site]


@dataclass
class Plan:
    """All Linears of a model, resolved before any statistics are collected."""

    entries: dict[str, Entry]
    stacks: list[Stack]
    blocks: dict[str, BlockPlan]
    rewrites: list[dict[str, str]]
    notes: list[str] = field(default_factory=list)
    prefix: tuple[int, ...] | None = None

    def block_names(self) -> list[str]:
        """All blocks, in the order they run."""
        return [name for stack in self.stacks for name in stack.names]

    def quantized(self) -> list[str]:
        return [e.name for e in self.entries.values() if e.status != "excluded"]

    def summary(self) -> dict[str, Any]:
        """{transformed, quantized, factored, excluded: {name: reason}}; quantized counts every quantized Linear."""
        entries = self.entries.values()
        return {
            "transformed": sum(e.status == "transformed" for e in entries),
            "quantized": sum(e.status in ("transformed", "quantized") for e in entries),
            "factored": sum(e.rank is not None for e in entries),
            "excluded": {e.name: e.reason for e in entries if e.status == "excluded"},
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """One line a Linear, columns aligned."""
        rows = [("linear", "shape", "status", "site", "absorbed by / reason", "bits")]
        for e in self.entries.values():
            shape = f"{e.shape[0]}x{e.shape[1]}"
            rows.append((e.name, shape, e.status, e.site, e.fold or e.reason or "-", f"{e.bits:.2f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        weights = sum(e.shape[0] * e.shape[1] for e in self.entries.values())
        bits = sum(e.shape[0] * e.shape[1] * e.bits for e in self.entries.values())
        s, factored = self.summary(), sum(e.status == "factored" for e in self.entries.values())
        lines.append(
            (f"{factored} factored, " if factored else "")
            + f"{s['quantized']} quantized ({s['transformed']} of them transformed), {len(s['excluded'])} excluded; "
            f"{bits / max(weights, 1):.2f} bits a weight over all Linears"
        )
        return "\n".join([*lines, *self.notes])


def target_of(block: nn.Module, site: Site) -> FoldTarget:
    """The modules behind a site."""
    producer = None
    if site.producer is not None:
        gain = site.producer.gain
        module = block.get_submodule(site.producer.path)
        takes = site.producer.shift and (gain is None or gain.bias is not None)
        producer = FoldProducer(module, site.producer.index, None if gain is None else gain.offset, takes)
    consumers = [block.get_submodule(path) for path in site.consumers]
    assert all(isinstance(c, nn.Linear) for c in consumers)
    return FoldTarget(site.name, site.features, consumers, producer)  # type: ignore[arg-type]


def make_plan(model: nn.Module, recipe: Recipe, batch: Batch, store: Resident | None = None) -> Plan:
    """Rewrite the model's products into Linears, find blocks and sites on one small batch, prove every fold with random
    (z, s), and settle each Linear's part. The model's function and Linear weights are as before afterwards. store:
    where the weights are.
    """
    store = store or Resident()
    if not any(True for _ in model.parameters()):
        raise ModelError(f"{type(model).__name__} has no parameters", "give a model with weights")
    with _running(model):
        rewrites = find_rewrites(model, batch)
    apply_rewrites(model, rewrites)
    store.rewritten(rewrites)
    found = linears(model)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear layers to quantize", "calib quantizes nn.Linear and Conv1D"
        )
    with _running(model):
        stacks = find_stacks(model, batch)
    plan = Plan({}, stacks, {}, rewrites)
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad(), loop_over_experts(model):
        for stack in stacks:
            inputs = capture(model, stack, [batch])
            hidden = inputs.hidden[0]
            for i, name in enumerate(stack.names):
                with store.hold(name):
                    plan.blocks[name], hidden = _plan_block(model, name, inputs.calls[0][i], hidden, generator, recipe)
    settle(model, found, plan, recipe)
    return plan


def _plan_block(
    model: nn.Module, name: str, call: Call, hidden: Tensor, generator: torch.Generator, recipe: Recipe
) -> tuple[BlockPlan, Tensor]:
    """A block's sites, each fold proven on its input, and its output."""
    block = model.get_submodule(name)
    with in_float32(block):
        with record(block) as trace:
            after = call.run(block, hidden)
        sites = find_sites(trace, block)
        run = functools.partial(call.run, block)
        tolerance = tolerance_for(run, hidden, after)
        for site in sites:
            _try_fold(block, site, functools.partial(run, hidden), after, tolerance, generator)
            if site.kind == "vo" and takes_rotation(site, recipe):
                _find_head(block, site, functools.partial(run, hidden), after, tolerance)
    return BlockPlan(name, sites), after.to(hidden.dtype)


def _try_fold(
    block: nn.Module,
    site: Site,
    run: Callable[[], Tensor],
    before: Tensor,
    tolerance: float,
    generator: torch.Generator,
) -> None:
    """Prove the proposed producer with a random fold; take it away, with a note, where the block's output changes."""
    if site.producer is None:
        return
    target = target_of(block, site)
    producer = target.producer
    assert producer is not None
    scale = target.tie(torch.rand(site.features, generator=generator) * 1.5 + 0.5, "amax")
    shift = target.tie(torch.randn(site.features, generator=generator), "amax") if producer.takes_shift else None
    transform = SiteTransform(target)
    with undone_on_failure(transform, run, tolerance=-1.0, before=before) as error:  # a trial: always undone
        transform.fold(shift, scale)
    transform.remove_hooks()
    if not error[0] <= tolerance:
        site.note = f"folding into {site.producer.path} changes the block's output by {error[0]:.1e}"
        site.kind, site.producer = "input", None


def _find_head(block: nn.Module, site: Site, run: Callable[[], Tensor], before: Tensor, tolerance: float) -> None:
    """The largest block of a rotation that the producer takes without a change of the output: one within a head."""
    target = target_of(block, site)
    for size in (2**k for k in range(7, 0, -1)):
        if target.runs(size) is None:
            continue
        transform = SiteTransform(target)
        with undone_on_failure(transform, run, tolerance=-1.0, before=before) as error:  # a trial: always undone
            transform.rotate(size, foldable=True)
        transform.remove_hooks()
        if error[0] <= tolerance:
            site.head = size
            return


def settle(model: nn.Module, found: Mapping[str, nn.Linear], plan: Plan, recipe: Recipe) -> None:
    """Give every Linear its entry in the plan. Raises InputError for a rule that matches nothing."""
    site_of = {
        f"{block.name}.{path}": site
        for block in plan.blocks.values()
        for site in block.sites
        for path in site.consumers
    }
    scheme = recipe.scheme
    rules = {rule: re.compile(rule) for rule in scheme.exclude}
    hits, fewest = dict.fromkeys(rules, 0), 32.0
    overridden = dict.fromkeys((each.rule for each in scheme.overrides), 0)
    shared = _shared_weights(model)
    transforming = any(m.partition(":")[0] in TRANSFORMING for m in recipe.methods)
    for name, linear in found.items():
        shape = (linear.out_features, linear.in_features)
        entry = plan.entries[name] = Entry(name, shape, "excluded", bits=8.0 * linear.weight.element_size())
        site = site_of.get(name)
        rule = next((rule for rule, pattern in rules.items() if pattern.search(name)), None)
        if rule is not None:
            hits[rule] += 1
        if site is None:
            entry.reason = "outside the repeated blocks (head, pooler or projection)"
        elif rule is not None:
            entry.reason = f"excluded by rule {rule!r}"
        elif name in shared:
            entry.reason = f"shares its weight with {shared[name]}"
        elif any(name.endswith("." + path) for path in site.routers):
            entry.reason = "its output chooses experts"
        else:
            if (override := scheme.override_of(name)) is not None:
                overridden[override.rule] += 1
            if scheme.rounds:
                weights = scheme.weights_of(name)
                _check_groups(name, shape, weights)
                fewest = min(fewest, weights.bits)
                entry.bits = weights.bits_per_weight(shape)
            entry.status = "quantized" if scheme.rounds else "factored"
            if transforming:
                entry.fold = planned_fold(site, recipe)
                entry.status = "transformed" if entry.fold else "quantized"
                entry.reason = (
                    "" if entry.fold else (site.note or f"site class {site.kind} is not among {recipe.sites}")
                )
        entry.site = "" if site is None else site.kind
    for rule, count in hits.items():
        if not count:
            raise InputError(f"exclude rule {rule!r} matches no linear layer", f"names look like {next(iter(found))}")
    if not plan.quantized():
        raise InputError("nothing is left to quantize", "relax the exclude rules")
    if fewest < 2:
        plan.notes.append(COLLAPSE)
    for rule, count in overridden.items():
        if not count:
            raise InputError(
                f"override rule {rule!r} changes no quantized linear layer",
                f"names look like {plan.quantized()[0]}; of several rules that match, the first counts",
            )


def planned_fold(site: Site, recipe: Recipe) -> str:
    """What a site's transform will be absorbed by; empty where the recipe leaves the site alone."""
    parts = []
    methods = [m.partition(":")[0] for m in recipe.methods]
    if takes_rotation(site, recipe):
        parts.append("hadamard" + (" if it pays" if "os+" in methods else ""))
    scales = not {"os+", "smoothquant", "awq"}.isdisjoint(methods)
    if scales and site.producer is not None and site.kind in recipe.sites:
        shift = recipe.shift and "os+" in methods and site.producer.shift
        shift = shift and (site.producer.gain is None or site.producer.gain.bias is not None)
        shift = shift and not (site.kind == "vo" and recipe.scheme.attention is not None)
        halves = (["shift"] if shift else []) + (["scale"] if recipe.scale else [])
        parts += [f"{site.producer.path}: {' and '.join(halves)}"] if halves else []
        if "fused" in recipe.sites and recipe.shift and not shift and "os+" in methods:
            parts.append("fused: shift")
    if (
        "fused" in recipe.sites
        and not any(p.startswith(site.producer.path if site.producer else "-") for p in parts)
        and "os+" in methods
    ):
        halves = [half for half, on in (("shift", recipe.shift), ("scale", recipe.scale)) if on]
        parts += [f"fused: {' and '.join(halves)}"] if halves else []
    return ", ".join(parts)


def takes_rotation(site: Site, recipe: Recipe) -> bool:
    """True where the recipe rotates: every input, or those of the second half of an MLP (down_proj, fc2, 4h_to_h)."""
    methods = [m.partition(":")[0] for m in recipe.methods]
    return "rotate" in methods or ("hadamard" in methods and site.kind in ("updown", "fc"))


def _check_groups(name: str, shape: tuple[int, int], spec: AnyWeight) -> None:
    if spec.group_size is not None and shape[1] % spec.group_size:
        raise InputError(
            f"group size {spec.group_size} does not divide the {shape[1]} inputs of {name}",
            "choose another group size, or exclude the layer",
        )


def _shared_weights(model: nn.Module) -> dict[str, str]:
    owners: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        first = owners.setdefault(id(weight), name)
        if first != name:
            shared[name], shared[first] = first, name
    return shared


def small_batch(batches: Sequence[Batch], rows: int = 2, tokens: int = 64) -> Batch:
    """The first rows of the first batch, cut short: what tracing and proving need."""
    first = batches[0]
    return {key: value[:rows, :tokens] if value.dim() >= 2 else value[:rows] for key, value in first.items()}


@contextlib.contextmanager
def _running(model: nn.Module) -> Iterator[None]:
    """A model that cannot run on the data says so by name, before work starts."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ModelError(
            f"{type(model).__name__} does not run on the calibration data ({str(error).splitlines()[0]})",
            "give token dicts with the inputs that its forward takes",
        ) from error
