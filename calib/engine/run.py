"""The block loop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from calib.engine.block import BlockCalibration, BlockInput, packed
from calib.engine.memory import reuse_pages
from calib.engine.prefix import PrefixBuilder
from calib.methods import resolve
from calib.model import Batch, BlockInputs, Plan, Stack, capture
from calib.recipe import Recipe

PROBE_TOKENS = 512


@dataclass
class Outcome:
    """What a run leaves beside the changed model. sites: one record each, for the report."""

    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)  # output error of each quantized block, relative
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def split_probes(batches: Sequence[Batch]) -> list[Batch]:
    """The same rows, with the first ones in three small batches: a search ranks on the first, scores on all three."""
    rows, first = [], dict(batches[0])
    length = next(iter(first.values())).shape[-1]
    size = next(iter(first.values())).shape[0]
    take = max(1, -(-PROBE_TOKENS // max(length, 1)))
    cuts = [0, take, 2 * take, min(4 * take, size), size]
    for start, end in itertools.pairwise(cuts):
        if start < min(end, size):
            rows.append({k: v[start:end] for k, v in first.items()})
    return [*rows, *batches[1:]]


class Engine:
    """Quantizes a model's blocks in place, in order, each from the outputs of those before it."""

    def __init__(
        self, model: nn.Module, plan: Plan, recipe: Recipe, prefix: PrefixBuilder | None = None, progress: bool = True
    ) -> None:
        self.model, self.plan, self.recipe, self.prefix, self.progress = model, plan, recipe, prefix, progress
        self.methods, self.rounding = resolve(recipe)
        self.outcome = Outcome()

    def run(self, batches: Sequence[Batch]) -> Outcome:
        """Process every stack. The model's planned Linears are QuantLinears afterwards."""
        reuse_pages()
        batches = split_probes(batches)
        total = sum(len(stack.names) for stack in self.plan.stacks)
        with torch.no_grad(), tqdm(total=total, unit="block", disable=not self.progress, desc="calibrating") as bar:
            for stack in self.plan.stacks:
                extra = {"past_key_values": self.prefix.cache} if self.prefix else None
                with self._timed("capture"):
                    inputs = capture(self.model, stack, batches, extra)
                    prefix = self._prefix_inputs(stack)
                for i, name in enumerate(stack.names):
                    self._block(name, i, inputs, prefix)
                    bar.update()
                    bar.set_postfix_str(self._worst())
        return self.outcome

    def _block(self, name: str, i: int, inputs: BlockInputs, prefix: BlockInputs | None) -> None:
        block = self.model.get_submodule(name)

        def write_prefix() -> None:
            if self.prefix is not None and prefix is not None:
                self.prefix.take(i, block, prefix.calls[0][i], prefix.hidden[0])

        given = BlockInput(inputs.hidden, [calls[i] for calls in inputs.calls], inputs.masks, write_prefix)
        with self._timed("probe"):
            work = BlockCalibration(name, block, self.plan, self.recipe, self.rounding, given)
        with self._timed("observe"):
            float_outputs = work.observe()
        for state in work.states:
            for method in self.methods:
                with self._timed("solve"):
                    found = work.solve(state, method)
                with self._timed("fold"):
                    work.apply(state, found)
        with self._timed("fold"):
            work.prove()
            if self.prefix is not None and prefix is not None:
                prefix.hidden[0] = self.prefix.take(i, block, prefix.calls[0][i], prefix.hidden[0])
        with self._timed("weights"):
            work.quantize()
        with self._timed("propagate"), packed(block):
            runs = work.runs if self.recipe.inputs == "quantized" else work.runs[:1]
            outputs = [run() for run in runs]
        self.outcome.blocks[name] = float((outputs[0] - work.before).norm() / work.before.norm().clamp(min=1e-30))
        self.outcome.sites.update(work.record)
        self.outcome.notes += work.notes
        inputs.hidden[:] = outputs if self.recipe.inputs == "quantized" else float_outputs

    def _prefix_inputs(self, stack: Stack) -> BlockInputs | None:
        """The blocks' inputs for the prefix tokens themselves, at position 0, without a cache."""
        if self.prefix is None:
            return None
        hooks = self.model._forward_pre_hooks.copy()
        self.model._forward_pre_hooks.clear()  # the prefix does not come after itself
        try:
            return capture(self.model, stack, [{"input_ids": self.prefix.ids}])
        finally:
            self.model._forward_pre_hooks.update(hooks)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.outcome.seconds[stage] = self.outcome.seconds.get(stage, 0.0) + time.perf_counter() - start

    def _worst(self) -> str:
        name, error = max(self.outcome.blocks.items(), key=lambda item: item[1], default=("", 0.0))
        return f"worst {name} {error:.1%}" if name else ""
