"""The block loop."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from calib.engine.block import BlockCalibration, BlockInput, packed
from calib.engine.factors import LowRankWork
from calib.engine.hidden import HiddenStates
from calib.engine.journal import Journal
from calib.engine.learning import refine
from calib.engine.prefix import PrefixBuilder
from calib.engine.survey import Survey, survey
from calib.engine.truncation import Ways, truncation
from calib.errors import InputError, NumericsError
from calib.memory import release_pages, reusing_pages
from calib.methods import LowRank, low_rank_of, resolve
from calib.model import (
    Batch,
    BlockInputs,
    HiddenList,
    Plan,
    Resident,
    Stack,
    capture,
    in_float32,
    is_finite,
    on_device,
    positions,
)
from calib.observers import ranks
from calib.recipe import Recipe

CPU = torch.device("cpu")
SURVEY = "survey"  # what a journal calls it
PROBE_TOKENS, SEARCH_TOKENS = 512, 2048  # of a probe, two of which a search ranks on; and that it scores on, at least


@dataclass
class Outcome:
    """What a run leaves beside the changed model. sites: one record each, for the report."""

    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)  # output error of each quantized block, relative
    linears: dict[str, float] = field(default_factory=dict)  # signal to quantization noise of each one's output, dB
    pictures: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each site, see calib.observers.picture
    speed: dict[str, list[float]] = field(default_factory=dict)  # seconds of each block on a batch: float, packed
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Share:
    """What this process runs of the data: its batches, and the number of each one's first token in the whole.

    probes: how many of rank 0's first batches a search scores its short list on, the same for any number of processes.
    """

    batches: list[Batch]
    first: list[int]
    probes: int


def share_of(batches: Sequence[Batch], rank: int, world: int) -> Share:
    """Rank 0 searches, so it has the first SEARCH_TOKENS; every other batch goes to who has the fewest tokens."""
    start, loads, share = 0, [0] * world, Share([], [], 0)
    for number, batch in enumerate(batches):
        leading = start < SEARCH_TOKENS
        owner = 0 if leading else loads.index(min(loads))
        for part in split_probes(batch) if number == 0 else [batch]:
            share.probes += start < SEARCH_TOKENS
            if owner == rank:
                share.batches.append(part)
                share.first.append(start)
            tokens = positions(part)
            start += tokens
            loads[owner] += tokens
    if not all(loads):
        cause = f"{len(batches)} batches of calibration data cannot be shared by {world} processes"
        raise InputError(cause, "lower --batch-size, give more samples, or start fewer processes")
    return share


def split_probes(batch: Batch) -> list[Batch]:
    """The same rows, the first ones in four small batches: a search ranks on the first two and scores on all four."""
    size = len(next(iter(batch.values())))
    length = positions(batch) // size
    take = max(1, -(-PROBE_TOKENS // max(length, 1)))
    cuts = [0, take, 2 * take, 3 * take, min(4 * take, size), size]
    return [
        {key: value[start:end] for key, value in batch.items()}
        for start, end in itertools.pairwise(cuts)
        if start < min(end, size)
    ]


def _checked(hidden: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """A block's output, if what it says of real tokens is finite."""
    if not is_finite(hidden if mask is None or mask.shape != hidden.shape[:2] else hidden[mask]):
        dtype = str(hidden.dtype).removeprefix("torch.")
        raise NumericsError(f"{name} gives NaN or inf in {dtype}", "use another --dtype, or repair the weights")
    return hidden


def _distance(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|."""
    found = float((got - want).norm() / want.norm().clamp(min=1e-30))
    if math.isfinite(found):
        return found
    return float((got - want).double().norm() / want.double().norm().clamp(min=1e-30))  # squares beyond fp32


class Engine:
    """Quantizes a model's blocks in place, in order, each from the outputs of those before it.

    store: where the weights are; a block is held while it is worked on. journal: takes each finished block, under the
    file name in ``shards``, and gives back those of an earlier, killed run. budget: bytes of hidden states kept in
    memory; the rest goes to a file.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        recipe: Recipe,
        prefix: PrefixBuilder | None = None,
        progress: bool = True,
        *,
        store: Resident | None = None,
        journal: Journal | None = None,
        shards: Mapping[str, str] | None = None,
        budget: int | None = None,
        device: torch.device = CPU,
    ) -> None:
        """device: where blocks run on the data; they are solved on the CPU, where all else stays."""
        self.device = device
        self.model, self.plan, self.recipe, self.prefix, self.progress = model, plan, recipe, prefix, progress
        self.store, self.journal, self.budget = store or Resident(), journal, budget
        self.shards = shards or {}
        self.methods, self.rounding = resolve(recipe)
        method = low_rank_of(recipe)
        self.low_rank = None if method is None else LowRankWork(method)
        self.outcome = Outcome()
        self._float: HiddenStates | None = None  # what the float model's blocks hand on, where one is learned from it
        self._blocks = plan.block_names()

    def run(self, batches: Sequence[Batch]) -> Outcome:
        """Process every stack. The model's planned Linears are QuantLinears afterwards."""
        self._share = share_of(batches, ranks.rank(), ranks.world())
        paired = self.rounding is not None and self.rounding.paired
        if paired and ranks.world() > 1:
            raise InputError(f"{self.rounding.name} runs in one process", "use method gptq, or run without torchrun")  # type: ignore[union-attr]
        floats = (self.recipe.refine > 0 or paired) and ranks.rank() == 0
        if self.low_rank is not None and self.low_rank.method.truncates:
            self.low_rank = self._truncation(self.low_rank.method)
        with torch.no_grad(), tqdm(total=len(self._blocks), unit="block", disable=not self.progress) as bar:
            bar.set_description("calibrating")
            for stack in self.plan.stacks:
                extra = {"past_key_values": self.prefix.cache} if self.prefix else None
                with self._timed("capture"), self.store.keeping():
                    inputs = capture(self.model, stack, self._share.batches, extra, self._hidden())
                    prefix = self._prefix_inputs(stack)
                    self._float = self._copied(inputs.hidden) if floats else None
                with reusing_pages():  # not while embeddings are there: pages that they leave behind would stay
                    for i, name in enumerate(stack.names):
                        if self.journal is not None and name in self.journal.records:
                            self._again(name, i, inputs, prefix, self.journal)
                        else:
                            with self.store.hold(name):
                                float_outputs = self._block(name, i, inputs, prefix)
                            if ranks.rank() > 0:
                                self._from_rank_0(name, i, inputs, prefix, float_outputs)
                        release_pages()
                        bar.update()
                        bar.set_postfix_str(self._worst())
        return self.outcome

    def _prime(self, i: int, block: nn.Module, prefix: BlockInputs | None) -> None:
        """Write the layer's keys and values of the prefix, as the block's weights are now."""
        if self.prefix is not None and prefix is not None:
            self.prefix.take(i, block, prefix.calls[0][i], prefix.hidden[0])

    def _copied(self, hidden: HiddenList) -> HiddenStates:
        copies = self._hidden()
        for j in range(len(hidden)):
            copies.append(hidden[j])
        return copies

    def _truncation(self, method: LowRank) -> LowRankWork:
        """Every planned linear's rank, from one pass over the float model where the method needs to look."""

        def look(ways: Ways | None) -> Survey:
            if self.journal is not None and (kept := self.journal.kept(SURVEY)) is not None:
                return Survey.of(kept)
            data = (self._share.batches, self.store, self._hidden, self.recipe.seed)
            with self._timed("survey"), torch.no_grad():
                found = survey(self.model, self.plan, method, *data, ways)
            if self.journal is not None:
                self.journal.keep(SURVEY, found.tensors())
            return found

        work, notes = truncation(self.model, self.plan, method, look)
        self.outcome.notes += notes
        return work

    def _hidden(self) -> HiddenStates:
        return HiddenStates(self.budget, None if self.journal is None else self.journal.folder)

    def _block(self, name: str, i: int, inputs: BlockInputs, prefix: BlockInputs | None) -> HiddenStates | None:
        """All of a block; of a rank but 0 its observing, which all take part in. Float outputs, if they are kept."""
        block = self.model.get_submodule(name)
        given = self._given(i, inputs, functools.partial(self._prime, i, block, prefix))
        with in_float32(block):
            work, float_outputs = self._solved(name, i, block, given, prefix)
        if ranks.rank() > 0:  # rank 0 does the rest, from the statistics of all
            return float_outputs
        if self.prefix is not None and prefix is not None:
            self.prefix.settle(i, prefix.hidden[0].dtype)
        with self._timed("propagate"), on_device(block, self.device), packed(block):
            first = given.run(block, 0).cpu()
            start = time.perf_counter()  # the kernels are prepared now
            given.run(block, 0).cpu()
            speed = [work.seconds, time.perf_counter() - start]
            if float_outputs is None:
                inputs.hidden[0] = _checked(first, given.masks[0], name)
                self._propagate(name, block, given, start=1)
            else:
                inputs.hidden = float_outputs
        error = _distance(first, work.before)
        record = {
            "error": error,
            "sites": work.record,
            "notes": work.notes,
            "entries": self._entries(name),
            "linears": {f"{name}.{path}": value for path, value in work.sqnr.items()},
            "pictures": work.pictures,
            "speed": speed,
        }
        self._take(name, record)
        if self.journal is not None:
            with self._timed("write"):
                self.journal.write(name, block, self.shards[name], record, self._carried(i, prefix))
                self.store.replaced(name, functools.partial(self.journal.files, name))
            ranks.meet(f"writing {name}")
        return float_outputs

    def _solved(
        self, name: str, i: int, block: nn.Module, given: BlockInput, prefix: BlockInputs | None
    ) -> tuple[BlockCalibration, HiddenStates | None]:
        """Observe, solve, fold, quantize: the block holds QuantLinears afterwards, but on ranks other than 0."""
        with self._timed("probe"):
            work = BlockCalibration(name, block, self.plan, self.recipe, self.rounding, given, self.low_rank)
        targets = self._hidden() if self._float is not None else None
        if self._float is not None and targets is not None:
            with self._timed("targets"), on_device(block, self.device):
                for j, call in enumerate(given.calls):
                    before = self._float[j]
                    targets.append(call.run(block, before).to(before))
        float_outputs = self._hidden() if self.recipe.inputs == "float" else None
        with self._timed("observe"), on_device(block, self.device):
            work.observe(float_outputs)
        if ranks.rank() > 0:
            work.leave()
            return work, float_outputs
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
            work.quantize(self._float)
        if self.recipe.refine and targets is not None:
            with self._timed("refine"), on_device(block, self.device):
                refine(work, targets)
        with self._timed("measure"):
            work.measure()
        self._float = targets
        return work, float_outputs

    def _given(self, i: int, inputs: BlockInputs, refresh: Callable[[], None]) -> BlockInput:
        calls = [calls[i] for calls in inputs.calls]
        return BlockInput(inputs.hidden, calls, inputs.masks, refresh, self._share.first, self._share.probes)

    def _propagate(self, name: str, block: nn.Module, given: BlockInput, start: int = 0) -> None:
        for j in range(start, len(given.calls)):
            after = given.run(block, j).to(given.hidden[j])
            given.hidden[j] = _checked(after, given.masks[j], name)

    def _again(self, name: str, i: int, inputs: BlockInputs, prefix: BlockInputs | None, journal: Journal) -> None:
        """A block that an earlier run finished: take its result and run it, so that the next one sees the same."""
        block = self.model.get_submodule(name)
        given = self._given(i, inputs, lambda: None)
        with self._timed("propagate"):
            if self.recipe.inputs == "float" or self._float is not None:
                with self.store.hold(name), in_float32(block), on_device(block, self.device):
                    self._prime(i, block, prefix)
                    if self._float is not None:
                        self._propagate(name, block, dataclasses.replace(given, hidden=self._float))
                    if self.recipe.inputs == "float":
                        self._propagate(name, block, given)
            self._restore(name, i, prefix, journal)
            if self.recipe.inputs == "quantized":
                with self.store.hold(name), on_device(block, self.device), packed(block):
                    self._propagate(name, block, given)

    def _from_rank_0(
        self, name: str, i: int, inputs: BlockInputs, prefix: BlockInputs | None, outputs: HiddenStates | None
    ) -> None:
        """Wait until rank 0 has written the block, take it, and run this process's batches through it."""
        assert self.journal is not None
        ranks.meet(f"writing {name}")
        self.journal.read()
        self._restore(name, i, prefix, self.journal)
        block = self.model.get_submodule(name)
        if outputs is not None:
            inputs.hidden = outputs
            return
        with self._timed("propagate"), self.store.hold(name), on_device(block, self.device), packed(block):
            self._propagate(name, block, self._given(i, inputs, lambda: None))

    def _restore(self, name: str, i: int, prefix: BlockInputs | None, journal: Journal) -> None:
        if self.prefix is not None and prefix is not None:
            carried = journal.carried(name)
            self.prefix.keys[i], self.prefix.values[i] = carried["prefix.keys"], carried["prefix.values"]
            prefix.hidden[0] = carried["prefix.hidden"]
        dtype = next(self.model.parameters()).dtype
        journal.restore(name, self.model.get_submodule(name), self.store, dtype)
        self._take(name, journal.records[name])

    def _take(self, name: str, record: Mapping[str, Any]) -> None:
        self.outcome.blocks[name] = record["error"]
        self.outcome.sites.update(record["sites"])
        self.outcome.notes += record["notes"]
        self.outcome.linears.update(record["linears"])
        self.outcome.pictures.update(record["pictures"])
        self.outcome.speed[name] = record["speed"]
        for path, (status, reason, fold, rank, bits) in record["entries"].items():
            entry = self.plan.entries[path]
            entry.status, entry.reason, entry.fold, entry.rank, entry.bits = status, reason, fold, rank, bits

    def _entries(self, block: str) -> dict[str, list[Any]]:
        entries = self.plan.entries.values()
        return {e.name: [e.status, e.reason, e.fold, e.rank, e.bits] for e in entries if e.name.startswith(block + ".")}

    def _carried(self, i: int, prefix: BlockInputs | None) -> dict[str, Tensor]:
        if self.prefix is None or prefix is None:
            return {}
        key, value = self.prefix.keys[i], self.prefix.values[i]
        assert key is not None and value is not None
        carried = {"prefix.keys": key, "prefix.values": value, "prefix.hidden": prefix.hidden[0]}
        return {name: tensor.clone() for name, tensor in carried.items()}

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
        release_pages()  # what one stage left in pieces would lie under the next one's peak
        yield
        self.outcome.seconds[stage] = self.outcome.seconds.get(stage, 0.0) + time.perf_counter() - start

    def _worst(self) -> str:
        name, error = max(self.outcome.blocks.items(), key=lambda item: item[1], default=("", 0.0))
        return f"worst {name} {error:.1%}" if name else ""
