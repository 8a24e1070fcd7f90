"""``method="auto"``: the recipes known to be good at a scheme are tried, and the best on data held out is taken.

Each trial quantizes some of the model's blocks, evenly spread, on a few of the calibration windows; every third drawn
window is set aside and judges the model: next-token loss for language models, squared error of the output against
float for encoders. Of candidates that those windows cannot tell apart the first is taken. Test data is never seen.
Order and choice of the candidates come from ``experiments/accuracy``.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from calib import prepare
from calib.errors import CalibError
from calib.evaluate.held import Judge, single_rows
from calib.export.files import write_json, writing
from calib.export.hf import set_mode
from calib.model import Batch
from calib.model.blocks import block_candidates
from calib.observers import ranks
from calib.quantizers import AffineSpec
from calib.recipe import Scheme
from calib.recipe import recipe as make_recipe

SECONDS = 600.0  # for all trials, unless the caller says otherwise
TRIAL_ROWS, HELD_ROWS = 16, 8  # windows of WINDOW tokens that a trial calibrates on, and that judge it
WINDOW = 512  # of shorter rows as many as make up the same tokens: eight sentences cannot tell recipes apart
TRIAL_BLOCKS = 10  # that a trial quantizes: what a recipe loses there tells recipes apart at a third of the time
LEARNED = {"refine": 40, "batch_size": 2}  # rounding and clipping, once the recipe is chosen: a step takes a batch


@dataclass(frozen=True)
class Candidate:
    """A method and the recipe options that go with it."""

    method: str
    options: Mapping[str, Any]

    def options_with(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The caller's options, and the candidate's where the caller leaves them open: None or ``auto``."""
        return {**given, **{name: value for name, value in self.options.items() if given.get(name) in (None, "auto")}}

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.options.items())])


def candidates(scheme: Scheme, stock: bool = False) -> list[Candidate]:
    """What is tried at a scheme, the best known first. stock: only what loads without calib."""
    bits = scheme.weights.bits if scheme.inputs is None else min(scheme.weights.bits, scheme.inputs.bits)
    rounding = "" if bits == 8 else ",gptq"
    learns = bits <= 6 and isinstance(scheme.weights, AffineSpec)
    if stock:
        names = ["gptq", "awq,gptq"] if scheme.inputs is None else [f"os+{rounding}", f"smoothquant:0.8{rounding}"]
        return [Candidate(name, {}) for name in names]
    if scheme.inputs is None:
        names = ["gptq", "rotate,gptq"]
    elif bits == 8:
        names = ["hadamard,os+", "rotate,os+", "os+"]
    else:
        names = ["rotate,os+,gptq", "hadamard,os+,gptq", *(["os+,gptq"] if bits > 4 else [])]
    return [Candidate(name, {"prefix": "on", **(LEARNED if learns else {})}) for name in names]


@dataclass(frozen=True)
class Trial:
    """loss: on the windows held out; None where the candidate does not fit the model, ``why``."""

    candidate: Candidate
    loss: float | None
    seconds: float
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        found = {"method": self.candidate.method, "options": dict(self.candidate.options), "loss": self.loss}
        return {**found, "seconds": round(self.seconds, 1), **({"why": self.why} if self.why else {})}


def choose(
    found: Sequence[Candidate],
    batches: Sequence[Batch],
    float_model: nn.Module,
    attempt: Callable[[Candidate, list[Batch]], nn.Module],
    *,
    seconds: float = SECONDS,
    progress: bool = True,
) -> tuple[Candidate, list[Trial]]:
    """The candidate with the least loss, or the first that is level with it, and what each gave.

    batches: the drawn calibration data. attempt: quantizes a copy of the model on some of them. Trials stop before one
    that would not end within ``seconds``; the first candidate is taken where none was tried.
    """
    held, taken = split(batches)
    if not held:  # a single window cannot both calibrate and judge
        return found[0], []
    judge = Judge(float_model, held)
    trials: list[Trial] = []
    judged: list[tuple[Candidate, np.ndarray]] = []  # the loss of each row
    start = time.perf_counter()
    longest = 0.0
    for candidate in tqdm(found, desc="trying recipes", unit="recipe", disable=not progress):
        begun = time.perf_counter()
        if begun - start + longest > seconds:
            break
        try:
            losses = np.array(judge(set_mode(attempt(candidate, taken), "packed")))
            loss: float | None = float(losses.mean())
            why = ""
            if np.isfinite(losses).all():
                judged.append((candidate, losses))
            else:
                loss, why = None, "its held-out loss is not finite"
        except CalibError as error:  # say, a block that divides no width of this model
            loss, why = None, error.cause
        longest = max(longest, time.perf_counter() - begun)
        trials.append(Trial(candidate, loss, time.perf_counter() - begun, why))
    if not judged:
        return found[0], trials
    _, least = min(judged, key=lambda pair: pair[1].mean())
    return next(candidate for candidate, losses in judged if level(losses - least)), trials


def level(differences: np.ndarray) -> bool:
    """True where the mean of paired differences [rows] is within its standard error of 0, or below."""
    if len(differences) < 2:
        return bool(differences.mean() <= 0)
    return bool(differences.mean() <= differences.std(ddof=1) / math.sqrt(len(differences)))


def split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Rows held out, one a batch, and batches to calibrate on: every third row is held, in the order drawn."""
    rows = [row for batch in batches for row in single_rows(batch)]
    held = enough(rows[1::3], HELD_ROWS)
    return held, together(enough([row for i, row in enumerate(rows) if i % 3 != 1], TRIAL_ROWS))


def enough(rows: Sequence[Batch], count: int) -> list[Batch]:
    """The first ``count`` rows, and more until they hold as many tokens as that many windows."""
    tokens = itertools.accumulate((next(iter(row.values())).numel() for row in rows), initial=0)
    return [row for i, (row, seen) in enumerate(zip(rows, tokens, strict=False)) if i < count or seen < count * WINDOW]


def fewer_blocks(scheme: Scheme, model: nn.Module) -> Scheme:
    """The scheme with all but TRIAL_BLOCKS blocks, evenly spread, left in float."""
    names = list(block_candidates(model))
    last = len(names) - 1
    kept = {names[round(i * last / (TRIAL_BLOCKS - 1))] for i in range(TRIAL_BLOCKS)} if names else set()
    skipped = [re.escape(name) for name in names if name not in kept]
    if not skipped or scheme.overrides or scheme.exclude:  # rules must still find what they are for
        return scheme
    return scheme.model_copy(update={"exclude": (rf"^({'|'.join(skipped)})\.",)})


def together(rows: Sequence[Batch], most: int = 4) -> list[Batch]:
    """Neighbouring rows of one shape as one batch."""
    groups: list[list[Batch]] = []
    for row in rows:
        last = groups[-1] if groups else []
        if 0 < len(last) < most and all(row[key].shape == value.shape for key, value in last[-1].items()):
            last.append(row)
        else:
            groups.append([row])
    return [{key: torch.cat([row[key] for row in group]) for key in group[0]} for group in groups]


class Memory:
    """A choice kept beside an output, so that a killed run goes on with the same recipe and without new trials."""

    def __init__(self, out: str | os.PathLike[str] | None, key: Mapping[str, Any]) -> None:
        path = None if out is None else Path(out).expanduser().absolute()
        self.file = None if path is None else path.parent / f".{path.name}.auto.json"
        self.key = json.loads(json.dumps(key, default=str))

    def read(self) -> tuple[Candidate, list[dict[str, Any]]] | None:
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8")) if self.file is not None else {}
            if kept.get("key") == self.key:
                return Candidate(kept["method"], kept["options"]), kept["trials"]
        except (OSError, ValueError, KeyError, AttributeError):  # none, or one cut short: the trials are run again
            pass
        return None

    def write(self, candidate: Candidate, trials: Iterable[Mapping[str, Any]]) -> None:
        if self.file is not None:
            kept = {"key": self.key, "method": candidate.method, "options": dict(candidate.options)}
            with writing(self.file):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.file, {**kept, "trials": list(trials)})

    def forget(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Tried:
    """What ``auto`` came to: the recipe, the trials' records, a line for the plan, where the choice is kept."""

    candidate: Candidate
    trials: list[dict[str, Any]]
    note: str
    memory: Memory


def tried(
    quantize: Callable[..., Any],
    model: prepare.Model,
    scheme: Scheme,
    data: Any,
    out: str | os.PathLike[str] | None,
    limit: float,
    common: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Tried:
    """Choose a recipe: as the stopped run that writes ``out`` chose it, else by trials of ``quantize``.

    common: keyword arguments of every call; options: those of the recipe that the caller fixed.
    """
    stock = common["format"] == "compressed-tensors"
    found = candidates(scheme, stock)
    recipe = make_recipe(scheme, found[0].method, stock, **found[0].options_with(options))
    prepare.join_ranks(model, out, prepare.device_named(common.get("device", "cpu")))
    why = "no time for trials" if limit <= 0 else "several processes" if ranks.world() > 1 else prepare.too_large(model)
    if why:
        return Tried(found[0], [], f"auto: {found[0]}, the first candidate, untried ({why})", Memory(None, {}))
    progress, dtype = common["progress"], common["dtype"]
    network, tokenizer, _, _ = prepare.load_model(model, common["tokenizer"], dtype, progress, streamed=False)
    rows = recipe.samples
    if prepare.is_generative(network):  # reads full windows
        rows = min(rows, (TRIAL_ROWS + HELD_ROWS) * max(1, WINDOW // recipe.seq_len))
    else:  # two windows are a thousand tokens, two sentences are fifty
        found = [Candidate(c.method, {k: v for k, v in c.options.items() if k != "batch_size"}) for c in found]
    recipe = recipe.model_copy(update={"samples": rows})
    tokens = prepare.calibration_tokens(network, tokenizer, data, recipe)
    key = {} if isinstance(model, nn.Module) else prepare.fingerprint(model, recipe, tokens, dtype)
    memory = Memory(out if key else None, key)
    if (kept := memory.read()) is not None:
        return Tried(*kept, f"auto: {kept[0]}, as chosen before the run was stopped", memory)

    few_blocks = fewer_blocks(scheme, network)

    def attempt(candidate: Candidate, batches: list[Batch]) -> nn.Module:
        few = {**common, **candidate.options_with(options), "samples": rows, "refine": 0, "learn": None}
        few |= {"tokenizer": tokenizer, "report": False, "progress": False}
        model: nn.Module = quantize(copy.deepcopy(network), few_blocks, candidate.method, batches, **few).network
        return model

    best, trials = choose(found, tokens.batches, network, attempt, seconds=limit, progress=progress)
    if not trials:
        return Tried(best, [], f"auto: {best}, the first candidate, untried (one window of data)", Memory(None, {}))
    records = [trial.as_dict() for trial in trials]
    memory.write(best, records)
    shown = ", ".join(f"{t.candidate.method} {'failed' if t.loss is None else format(t.loss, '.5g')}" for t in trials)
    part = "" if few_blocks is scheme else f" with {TRIAL_BLOCKS} blocks quantized"
    return Tried(best, records, f"auto: {best}, by its loss{part} on data held out ({shown})", memory)
