"""A model judged on a few rows held out of its calibration: next-token loss, or its output's error against float."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from calib.data import TokenData, calibration_data
from calib.model import Batch, call_model

ROWS = 4  # that quality is measured on
SHINGLE = 16  # tokens in common that make two rows of running text overlap


class Judge:
    """The loss of models on rows (batches of one row); against the float model where no next token is predicted."""

    def __init__(self, float_model: nn.Module, rows: Sequence[Batch]) -> None:
        self.rows = rows
        config = getattr(float_model, "config", None)
        generates = bool(getattr(float_model, "can_generate", lambda: False)())
        self.predicts = generates and not getattr(config, "is_encoder_decoder", False)
        self.wanted = [] if self.predicts else [output(float_model, row) for row in rows]

    def __call__(self, model: nn.Module) -> float:
        """Mean loss, or squared error of the output relative to its own square."""
        if self.predicts:
            return sum(next_token_loss(output(model, row), row) for row in self.rows) / len(self.rows)
        errors = [(output(model, row) - want).square().sum() for row, want in zip(self.rows, self.wanted, strict=True)]
        return float(sum(errors) / sum(want.square().sum() for want in self.wanted))


class Held(Judge):
    """A Judge that keeps what the float model said, for a comparison. held_out: none of the rows calibrates."""

    def __init__(self, float_model: nn.Module, rows: Sequence[Batch], held_out: bool) -> None:
        super().__init__(float_model, rows)
        self.held_out, self.losses, self._tops = held_out, list[float](), list[Tensor]()
        for row in rows if self.predicts else ():
            logits = output(float_model, row)
            self.losses.append(next_token_loss(logits, row))
            self._tops.append(logits[0].argmax(-1))

    def quality(self, model: nn.Module) -> dict[str, Any]:
        """Before and after, for a reader, with a 95 % interval of the ratio (or error): the rows are independent draws,
        and their differences from float have Student's t distribution."""
        losses, equal, seen = [], 0, 0
        for i, row in enumerate(self.rows):
            out = output(model, row)
            if self.predicts:
                losses.append(next_token_loss(out, row))
                real = row.get("attention_mask", torch.ones_like(row["input_ids"]))[0].bool()
                equal += int((out[0].argmax(-1) == self._tops[i])[real].sum())
                seen += int(real.sum())
            else:
                want = self.wanted[i]
                losses.append(float((out - want).square().sum() / want.square().sum().clamp(min=1e-30)))
        about = {"held_out": self.held_out, "rows": len(self.rows), "tokens": sum(len(_ids(r)[0]) for r in self.rows)}
        after = np.array(losses)
        if not self.predicts:
            low, high = _interval(after)
            found = {"metric": "relative squared error of the output", "float": 0.0, "quantized": float(after.mean())}
            return {**about, **found, "ci95": None if math.isnan(low) else [max(low, 0.0), high]}
        before = np.array(self.losses)
        low, high = _interval(after - before)
        ratio = _exp(float((after - before).mean()))
        return {
            **about,
            "metric": "perplexity",
            "float": _exp(float(before.mean())),
            "quantized": _exp(float(after.mean())),
            "ratio": ratio,
            "ci95": None if math.isnan(low) else [_exp(low), _exp(high)],
            "top1": equal / max(seen, 1),
        }


def held_rows(tokens: TokenData, again: dict[str, Any] | None) -> tuple[list[Batch], bool]:
    """At most four rows, one a batch, and whether they are held out of calibration.

    again: arguments of calibration_data for another draw from the same source, None where it cannot be drawn from
    twice. A row that repeats 16 tokens of the calibration data is not held out. Without such rows: the last ones of the
    calibration data.
    """
    if again is not None:
        known = {shingle for batch in tokens for row in _ids(batch) for shingle in _shingles(row)}
        fresh = [
            row
            for batch in calibration_data(**again)
            for row, ids in zip(single_rows(batch), _ids(batch), strict=True)
            if known.isdisjoint(_shingles(ids))
        ]
        if fresh:
            return fresh[:ROWS], True
    return [row for batch in tokens for row in single_rows(batch)][-ROWS:], False


def single_rows(batch: Batch) -> list[Batch]:
    """A batch as batches of one row."""
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(next(iter(batch.values()))))]


def next_token_loss(logits: Tensor, row: Batch) -> float:
    """Mean over the real tokens of one row [1, T, vocabulary], nats."""
    ids, mask = row["input_ids"][0], row.get("attention_mask")
    losses = F.cross_entropy(logits[0, :-1].float(), ids[1:], reduction="none")
    return float(losses.mean() if mask is None else losses[mask[0, 1:].bool()].mean())


def output(model: nn.Module, row: Batch) -> Tensor:
    """Logits where the model has any, else its last hidden state."""
    with torch.no_grad():
        out = call_model(model, row)
    tensor = out if isinstance(out, Tensor) else out[0]
    assert isinstance(tensor, Tensor)
    return tensor.float()


def _ids(batch: Batch) -> list[np.ndarray]:
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return [ids[keep].numpy() for ids, keep in zip(batch["input_ids"], mask, strict=True)]


def _shingles(ids: np.ndarray) -> set[bytes]:
    """Every run of 16 tokens; of a shorter row the row."""
    size = min(SHINGLE, len(ids))
    return {window.tobytes() for window in np.lib.stride_tricks.sliding_window_view(ids.astype("<i4"), max(size, 1))}


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of the mean; NaN for one value."""
    if len(values) < 2:
        return math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def _exp(value: float) -> float:
    """exp, and the largest float where that is beyond it: a model that is destroyed has a report too."""
    return math.exp(min(value, 700.0))
