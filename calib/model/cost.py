"""What a run will cost, before it starts: memory, disk, time and output, from a config alone.

Every figure is a sum of named terms; each term's comment says what is counted. Shapes come from the model on the meta
device (skeleton.py), speeds from a probe of this machine or from a description of another (machine.py); the sums are in
terms.py.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from calib.data import sequence_limit
from calib.errors import InputError, OutputError
from calib.model.machine import Machine, probe
from calib.model.plan import Plan
from calib.model.skeleton import Skeleton, read_config, skeleton
from calib.model.terms import (
    HEAD,
    ITEM,
    file_bytes,
    largest_block,
    memory_terms,
    probe_shapes,
    source_bytes,
    stored,
    time_terms,
)
from calib.recipe import Recipe

UNPREDICTED = ("low_rank", "basel")  # methods
BUDGET = 2 << 30  # bytes of hidden states kept in memory where --max-memory does not say


@dataclass(frozen=True)
class Cost:
    """A prediction. Bytes and seconds; ``memory`` and ``seconds`` hold the terms, peak_bytes and total their sums.

    linears: (out, in, how many of that shape in the model). hidden_bytes: hidden states of all samples, of which
    kept_bytes stay in memory and the rest goes to a file; block_bytes: the largest block in the run's floats;
    working_bytes: statistics, and one batch or one search inside a block.
    """

    model: str
    parameters: int
    blocks: int
    linears: tuple[tuple[int, int, int], ...]
    source_bytes: int
    output_bytes: int
    block_bytes: int
    hidden_bytes: int
    kept_bytes: int
    least_kept: int
    working_bytes: int
    memory: Mapping[str, int]
    seconds: Mapping[str, float]
    recipe: Recipe
    dtype: torch.dtype
    world: int
    machine: Machine
    plan: Plan
    again: Callable[..., int] = field(repr=False, compare=False)  # (dtype=, rows=, recipe=) -> bytes that it must have

    @property
    def peak_bytes(self) -> int:
        """Of one process, baseline and kept hidden states included."""
        return sum(self.memory.values())

    @property
    def fixed_bytes(self) -> int:
        """Peak without the hidden states: what no buffer plan can avoid."""
        return self.peak_bytes - self.kept_bytes

    @property
    def spilled_bytes(self) -> int:
        """Hidden states of one process that lie in a file."""
        return self.hidden_bytes - self.kept_bytes

    @property
    def disk_bytes(self) -> int:
        """Free space needed beside the source: the output and the hidden states' files of all processes."""
        return self.output_bytes + self.spilled_bytes * self.world

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "blocks": self.blocks,
            "linears": [list(row) for row in self.linears],
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "disk_bytes": self.disk_bytes,
            "hidden_bytes": self.hidden_bytes,
            "kept_bytes": self.kept_bytes,
            "peak_bytes": self.peak_bytes,
            "memory": dict(self.memory),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "total_seconds": round(self.total_seconds, 3),
            "samples": self.recipe.samples,
            "seq_len": self.recipe.seq_len,
            "batch_size": self.recipe.batch_size,
            "scheme": self.recipe.scheme.name,
            "methods": list(self.recipe.methods),
            "dtype": str(self.dtype).removeprefix("torch."),
            "world": self.world,
            "machine": asdict(self.machine),
        }

    def table(self) -> str:
        """What `calib plan` prints below the linears."""
        each = f" ({self.world} processes, each)" if self.world > 1 else ""
        r = self.recipe
        shapes = ", ".join(f"{count} x {out}x{n}" for out, n, count in self.linears)
        rows = [
            ("parameters", f"{self.parameters / 1e6:,.1f} million in {self.blocks} blocks; linears {shapes}"),
            (
                "calibration",
                f"{r.samples} x {r.seq_len} tokens, {r.batch_size} at once, {r.scheme.name}, {','.join(r.methods)}",
            ),
            ("source", _size(self.source_bytes)),
            (
                "output",
                f"{_size(self.output_bytes)} ({self.output_bytes / max(self.source_bytes, 1):.0%} of the source)",
            ),
            ("disk", f"{_size(self.disk_bytes)}, {_size(self.spilled_bytes * self.world)} of them hidden states"),
            (f"memory{each}", f"{_size(self.peak_bytes)}: {_terms(self.memory, _size)}"),
            ("time", f"{_time(self.total_seconds)}: {_terms(self.seconds, _time)}"),
            ("machine", _machine(self.machine)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows)


def estimate(
    source: Any,
    recipe: Recipe,
    *,
    dtype: torch.dtype = torch.float32,
    machine: Machine | None = None,
    max_memory: int | None = None,
    budget: int = BUDGET,
    world: int = 1,
    folder: str | Path | None = None,
) -> Cost:
    """What quantizing ``source`` (a config, a config.json, a folder, a hub id) costs.

    dtype: the run's floats. machine: default a probe of this one, its disk that of ``folder``. max_memory: bytes a
    process may take: hidden states then keep what is left of it, else at most ``budget``; `refuse` says whether it is
    enough. world: processes that share the samples. Raises ModelError, InputError.
    """
    if any(method.partition(":")[0] in UNPREDICTED for method in recipe.methods):
        raise InputError(
            "what low_rank and basel cost is not predicted", "leave out --max-memory, or plan without them"
        )
    config = read_config(source)
    limit = sequence_limit(config, None)
    if limit is not None and recipe.seq_len > limit:
        recipe = recipe.model_copy(update={"seq_len": limit})
    bones = skeleton(config, recipe, dtype)
    if machine is None:
        machine = probe(folder, probe_shapes(bones), recipe.scheme.weights, recipe.scheme.inputs, dtype)
    share = -(-recipe.samples // world)  # windows of one process: the last one may have fewer
    batches = -(-share // recipe.batch_size)
    state = bones.hidden * ITEM[dtype] // 4
    hidden = batches * state
    output = stored(bones, recipe, dtype)
    memory = memory_terms(bones, recipe, dtype, machine, output)
    least = min(hidden, 2 * state)
    free = budget if max_memory is None else max_memory - sum(memory.values())
    kept = min(hidden, max(free, least))
    memory["hidden states"] = kept
    inside = memory_terms(bones, recipe, dtype, machine, output, blocks_only=True)
    shapes = Counter(entry.shape for entry in bones.plan.entries.values())
    return Cost(
        model=type(bones.model).__name__,
        parameters=sum(p.numel() for p in bones.model.parameters()),
        blocks=len(bones.plan.blocks),
        linears=tuple((*shape, count) for shape, count in shapes.items()),
        source_bytes=source_bytes(bones, source),
        output_bytes=file_bytes(output),
        block_bytes=largest_block(bones, dtype),
        hidden_bytes=hidden,
        kept_bytes=kept,
        least_kept=least,
        working_bytes=inside.get("activations or search", 0) + inside.get("statistics", 0),
        memory=memory,
        seconds=time_terms(bones, recipe, dtype, machine, output, batches, hidden - kept, world),
        recipe=recipe,
        dtype=dtype,
        world=world,
        machine=machine,
        plan=bones.plan,
        again=functools.partial(_least_memory, bones, recipe, dtype, machine),
    )


def parse_size(text: str, option: str = "--max-memory") -> int:
    """Bytes of ``20GiB``, ``1.5 GB``, ``800M`` (binary, as GiB is) or a plain number. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)(i?b?)\s*", text.lower())
    if match is None or not float(match[1]):
        raise InputError(f"{option} {text!r} is no size", "write it like 20GiB or 800MB")
    base = 1000 if match[3] == "b" else 1024
    return int(float(match[1]) * base ** ("kmgt".index(match[2]) + 1 if match[2] else 0))


@dataclass(frozen=True)
class Buffers:
    """Where the hidden states of one process lie. Bytes."""

    in_memory: int
    on_disk: int


def refuse(cost: Cost, max_memory: int | None, free_disk: int | None = None) -> Buffers:
    """The plan of buffers under ``max_memory`` bytes a process and ``free_disk`` bytes; None: no limit.

    Raises InputError, which says how much one block needs and what flag helps, OutputError for the disk.
    """
    kept = cost.kept_bytes
    if max_memory is not None:
        room = max_memory - cost.fixed_bytes
        if room < cost.least_kept:
            needed = cost.fixed_bytes + cost.least_kept
            what = "the embeddings or the head" if HEAD in cost.memory else "one block"
            terms = {name: size for name, size in cost.memory.items() if name != "hidden states"}
            raise InputError(
                f"--max-memory {_size(max_memory)} is too small: to run {what} of this model takes {_size(needed)} "
                f"({_terms(terms, _size, 3)})",
                " or ".join([*_remedies(cost, max_memory), f"give --max-memory {_size(needed, up=True)}"]),
            )
        kept = min(cost.hidden_bytes, room)
    buffers = Buffers(kept, cost.hidden_bytes - kept)
    needed = cost.output_bytes + buffers.on_disk * cost.world
    if free_disk is not None and free_disk < needed:
        raise OutputError(
            f"the disk has {_size(free_disk)} free and the run needs {_size(needed)}: output "
            f"{_size(cost.output_bytes)}, hidden states {_size(buffers.on_disk * cost.world)}",
            "free some space" + (", give a higher --max-memory or fewer --samples" if buffers.on_disk else ""),
        )
    return buffers


def _least_memory(bones: Skeleton, given: Recipe, given_dtype: torch.dtype, machine: Machine, **changes: Any) -> int:
    """Bytes that a run must have with some settings changed: dtype, rows of a batch, recipe."""
    recipe, dtype = changes.get("recipe", given), changes.get("dtype", given_dtype)
    rows = changes.get("rows", bones.rows)
    memory = memory_terms(bones, recipe, dtype, machine, stored(bones, recipe, dtype), rows)
    return sum(memory.values()) + 2 * bones.hidden * ITEM[dtype] // 4 * rows // bones.rows


def _remedies(cost: Cost, limit: int) -> list[str]:
    """The flags that make it fit, each alone; else two together; none where only more memory does."""
    changes: dict[str, dict[str, Any]] = {}
    recipe, most = cost.recipe, cost.recipe.batch_size
    sizes = (2**k for k in range(most.bit_length() - 1, -1, -1) if 2**k < most)
    if rows := next((rows for rows in sizes if cost.again(rows=rows) <= limit), 0):
        return [f"use --batch-size {rows}"]
    if most > 1:
        changes["--batch-size 1"] = {"rows": 1}
    if cost.dtype in (torch.float32, torch.float64):
        changes["--dtype bfloat16"] = {"dtype": torch.bfloat16}
    if "gptq" in recipe.methods and len(recipe.methods) > 1:
        rest = tuple(method for method in recipe.methods if method != "gptq")
        changes[f"--method {','.join(rest)}"] = {"recipe": recipe.model_copy(update={"methods": rest})}
    if alone := [flag for flag, change in changes.items() if cost.again(**change) <= limit]:
        return [f"use {flag}" for flag in alone]
    for one, other in itertools.combinations(changes, 2):
        if cost.again(**changes[one], **changes[other]) <= limit:
            return [f"use {one} and {other}"]
    everything = {name: value for change in changes.values() for name, value in change.items()}
    if everything and cost.again(**everything) <= limit:
        return [f"use {' and '.join(changes)}"]
    return []


def _size(count: float, up: bool = False) -> str:
    """Bytes with a binary unit; up: never less than they are."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= size or unit == "MiB":
            value = count / size
            if up:
                value = -(-value * 10 // 1) / 10
            return f"{value:.1f}{'' if up else ' '}{unit}" if value < 100 else f"{value:.0f}{'' if up else ' '}{unit}"
    return f"{count}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _terms(terms: Mapping[str, float], show: Any, most: int = 99) -> str:
    kept = sorted(((n, v) for n, v in terms.items() if v), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {show(value)}" for name, value in kept)


def _machine(m: Machine) -> str:
    return (
        f"{m.name}: float {m.gemm:.0f} and packed {m.packed:.0f} GFLOP/s, copy {m.copy:.0f} GB/s, "
        f"disk reads {m.read:.1f} and writes {m.write:.1f} GB/s"
    )
