"""``calib eval``: one model measured, or two on the same items."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from calib.errors import DataError, InputError, ModelError
from calib.evaluate import (
    Result,
    agreement,
    bootstrap95,
    classification,
    continuations,
    harness,
    paired,
    perplexity,
    similarity,
)
from calib.export.load import load_pair

TASKS = ("perplexity", "classification", "similarity", "generation", "harness")
WINDOWS = 40  # unless asked for others
SQUARES = {
    "perplexity": "loss_mse",
    "classification": "logits_mse",
    "similarity": "cosine_mse",
    "harness": "metric_mse",
}


@dataclass(frozen=True)
class Measure:
    """How models are measured. windows: or prompts; options: further arguments of the task."""

    task: str
    data: str
    windows: int
    batch_size: int | None
    mode: str
    dtype: torch.dtype
    progress: bool
    options: dict[str, Any]

    def opened(self, name: str) -> tuple[nn.Module, Any]:
        mode = cast(Literal["packed", "fake"], self.mode)
        network, tokenizer = load_pair(name, mode, self.dtype, progress=self.progress)
        if tokenizer is None:
            raise ModelError(f"{name} has no tokenizer", "save it beside the model with tokenizer.save_pretrained")
        return network, tokenizer

    def __call__(self, name: str) -> Result:
        network, tokenizer = self.opened(name)
        if self.task == "perplexity":
            size = self.batch_size or 4
            return perplexity(
                network, tokenizer, self.data, self.windows, batch_size=size, progress=self.progress, **self.options
            )
        if self.task == "harness":
            return harness(
                network, tokenizer, self.data, batch_size=self.batch_size or 8, progress=self.progress, **self.options
            )
        kind = classification if self.task == "classification" else similarity
        return kind(network, tokenizer, self.data, self.batch_size or 32, progress=self.progress)

    def generation(self, name: str, against: str) -> Result:
        """What ``against`` writes after prompts, then whether ``name`` writes it too; one of them in memory."""
        size = self.batch_size or 8
        wanted = continuations(
            *self.opened(against), self.data, self.windows, batch_size=size, progress=self.progress, **self.options
        )
        return agreement(self.opened(name)[0], wanted, size, progress=self.progress)


def evaluate(measure: Measure, model: str, against: str | None) -> dict[str, Any]:
    """The result as JSON values; with ``against``, the other's value and a paired test."""
    if not Path(measure.data).exists():
        raise DataError(f"there is no file {measure.data}", "check --data")
    if measure.task == "generation":
        if against is None:
            raise InputError("generation is measured against another model", "name it: --against MODEL")
        result = measure.generation(model, against)
        return {**result.as_dict(), "bootstrap95": bootstrap95(result), "reference": {"model": against}}
    result = measure(model)
    answer: dict[str, Any] = {**result.as_dict(), "bootstrap95": bootstrap95(result)}
    if against is not None:
        other = measure(against)
        answer["reference"] = {"model": against, "value": other.value, **_against(result, other)}
        answer["paired"] = paired(result, other)
    return answer


def _against(result: Result, other: Result) -> dict[str, float]:
    found = {"ratio": result.value / other.value} if other.value else {}
    if result.outputs is not None and other.outputs is not None:
        difference = result.outputs.double() - other.outputs.double()
        found[SQUARES[result.task]] = float(difference.square().mean())
    return found


def text(answer: dict[str, Any]) -> str:
    """On the terminal: the value, then one line for each comparison."""
    low_high = answer["ci95"]
    interval = f" (95 %: {low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""
    lines = [f"{answer['metric']} {answer['value']:.4f}{interval}, n = {answer['n']}, {answer['seconds']:.1f} s"]
    lines += [f"{key}: {_shown(answer[key])}" for key in ("forced_top1", "bootstrap95") if answer.get(key) is not None]
    for part in ("reference", "paired"):
        if part in answer:
            lines.append(f"{part}: " + ", ".join(f"{key} {_shown(value)}" for key, value in answer[part].items()))
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """Figures with six digits, intervals in brackets."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
