"""``calib inspect``: the outliers of a float model, without quantizing it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from calib import prepare
from calib.data import Like, TokenData, sequence_limit
from calib.export import checkpoint
from calib.model import BlockInputs, Plan, Resident, Site, capture, make_plan, observing, small_batch
from calib.model.plan import planned_fold
from calib.observers import Range, outliers, picture, rows_of
from calib.observers.picture import MASSIVE, TOKENS
from calib.prepare import Model
from calib.recipe import Recipe, Scheme
from calib.recipe import recipe as make_recipe
from calib.recipe import scheme as make_scheme
from calib.report.record import inspected
from calib.sensitivity import Sensitivity

PLAN_TOKENS, TOKENS_A_WINDOW = 64, 256


def inspect(
    model: Model,
    data: str | os.PathLike[str] | Iterable[Any] | Like | None = None,
    *,
    tokenizer: Any = None,
    samples: int = 16,
    seq_len: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    sensitivity: str | Scheme | None = None,
    max_size: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """What stands out in the inputs of a float model's linears, as JSON values (calib.report.record.inspected).

    model, data: as for calib.quantize; one pass over samples windows of seq_len tokens (default 256), by blocks.
    ``sites``: each input of linears, whether channels or first tokens stand out there, and what could absorb a shift
    and a scale. sensitivity: a scheme, whose effect on the loss is measured for each block and each linear alone
    (calib.sensitivity); max_size: bytes of the checkpoint to propose formats for, default: what the scheme takes.
    calib.report.page makes HTML of the result. Raises InputError, DataError, ModelError, NumericsError.
    """
    start = time.perf_counter()
    scheme = make_scheme("w8a8-static" if sensitivity is None else sensitivity)
    streamed = not prepare.is_self(data)  # a model that writes its own text runs as a whole
    network, tokenizer, store, _ = prepare.load_model(model, tokenizer, torch.float32, progress, streamed=streamed)
    if seq_len is None:
        config = getattr(network, "config", None)
        seq_len = min(TOKENS_A_WINDOW, (config and sequence_limit(config, tokenizer)) or TOKENS_A_WINDOW)
    recipe = make_recipe(scheme, "os+", samples=samples, batch_size=batch_size, seed=seed, seq_len=seq_len)
    tokens = prepare.calibration_tokens(network, tokenizer, data, recipe, progress)
    plan = make_plan(network, recipe, small_batch(tokens.batches, tokens=PLAN_TOKENS), store)
    found = Watch(network, plan, recipe, store, progress)
    found.run(tokens)
    measured = None
    if sensitivity is not None:
        measured = Sensitivity(network, plan, recipe, store, found.ranges, progress).measure(tokens, max_size)
    about = prepare.about_model(model, network, torch.float32)
    return inspected(
        about=about,
        plan=plan,
        sites=found.sites,
        pictures=found.pictures,
        sensitivity=measured,
        seconds={"total": time.perf_counter() - start},
        data={"source": tokens.source, "fingerprint": tokens.fingerprint, "rows": tokens.rows, "tokens": tokens.tokens},
        seed=seed,
        versions=checkpoint.versions(),
    )


class Watch:
    """A pass over the blocks: ``sites`` and ``pictures`` by full name; ``ranges``, (lo, hi) [n] of each linear."""

    def __init__(self, model: nn.Module, plan: Plan, recipe: Recipe, store: Resident, progress: bool) -> None:
        self.model, self.plan, self.recipe, self.store, self.progress = model, plan, recipe, store, progress
        self.sites: dict[str, dict[str, Any]] = {}
        self.pictures: dict[str, dict[str, Any]] = {}
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def run(self, tokens: TokenData) -> None:
        names = self.plan.block_names()
        with torch.no_grad(), tqdm(total=len(names), unit="block", disable=not self.progress) as bar:
            bar.set_description("looking")
            for stack in self.plan.stacks:
                with self.store.keeping():
                    inputs = capture(self.model, stack, tokens.batches)
                for i, name in enumerate(stack.names):
                    with self.store.hold(name):
                        self._block(name, i, inputs)
                    bar.update()

    def _block(self, name: str, i: int, inputs: BlockInputs) -> None:
        block = self.model.get_submodule(name)
        seen = [_Seen(site) for site in self.plan.blocks[name].sites]
        taps = {group[0]: each for each in seen for group in each.site.groups}
        mask: list[Tensor | None] = [None]

        def take(path: str, x: Tensor) -> None:
            taps[path].take(x, mask[0])

        with observing({path: block.get_submodule(path) for path in taps}, take):
            for j, mask[0] in enumerate(inputs.masks):
                inputs.hidden[j] = inputs.calls[j][i].run(block, inputs.hidden[j])
        for each in seen:
            site, full = each.site, f"{name}.{each.site.name}"
            lo, hi = each.all()
            absmax = torch.maximum(-lo, hi)
            others = each.rest.absmax if each.rest.count else absmax
            massive = each.first >= MASSIVE * float(others.amax())  # else a first token is a token as any other
            self.sites[full] = {
                "site": site.kind,
                "consumers": site.consumers,
                "fold": planned_fold(site, self.recipe),
                "note": site.note,
                "outliers": outliers(lo, hi, each.first, others if massive else absmax),
                "absmax_before": float(absmax.amax()),
            }
            self.pictures[full] = picture(each.head, lo, hi, (lo + hi) / 2)
            self.ranges |= {f"{name}.{path}": (lo, hi) for path in site.consumers}


class _Seen:
    """A site's extremes, of the windows' first tokens and of all others, and its first rows."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.firsts, self.rest = Range(site.features), Range(site.features)
        self.head = torch.empty(0, site.features)

    def take(self, x: Tensor, mask: Tensor | None) -> None:
        """x [B, T, n]; where a router has chosen rows, [t, n], no row is known to be a first token."""
        if x.dim() == 3 and x.shape[1] > 1:
            self.firsts.update(x[:, 0])
            self.rest.update(rows_of(x[:, 1:], None if mask is None else mask[:, 1:]))
        else:
            self.rest.update(rows_of(x, mask))
        if len(self.head) < TOKENS:
            rows = rows_of(x[:1] if x.dim() == 3 else x, None if mask is None or x.dim() != 3 else mask[:1])
            self.head = torch.cat([self.head, rows[: TOKENS - len(self.head)].float()])

    @property
    def first(self) -> float:
        return float(self.firsts.absmax.amax()) if self.firsts.count else 0.0

    def all(self) -> tuple[Tensor, Tensor]:
        """Extremes [n] of all tokens."""
        return self.firsts.lo.minimum(self.rest.lo), self.firsts.hi.maximum(self.rest.hi)
