"""A model judged on a few rows held out of its calibration: next-token loss, or its output's error against float."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from calib.data import TokenData, calibration_data, ids_of
from calib.model import Batch, Resident, Stack, call_model, capture, run_after
from calib.nn import Prefix

TOKENS, LENGTH = 2048, 128  # that quality is measured on; whose logits are in memory at once
AT_ONCE = 32  # logits that are copied for their loss
ROWS, SHINGLE = 16, 16  # at most; tokens in common that make two rows of running text overlap


class Judge:
    """The loss of models on rows (batches of one row); against the float model where no next token is predicted."""

    def __init__(self, float_model: nn.Module, rows: Sequence[Batch]) -> None:
        self.rows = rows
        config = getattr(float_model, "config", None)
        generates = bool(getattr(float_model, "can_generate", lambda: False)())
        self.predicts = generates and not getattr(config, "is_encoder_decoder", False)
        self.wanted = [] if self.predicts else [output(float_model, row) for row in rows]

    def __call__(self, model: nn.Module) -> list[float]:
        """Each row's loss, or squared error of the output relative to the rows' mean square."""
        if self.predicts:
            return [next_token_loss(output(model, row), row) for row in self.rows]
        mean = sum(float(want.square().sum()) for want in self.wanted) / len(self.rows)
        outputs = (output(model, row) for row in self.rows)
        return [float((out - want).square().sum()) / mean for out, want in zip(outputs, self.wanted, strict=True)]


class Held:
    """What the float model answers on rows of at most 128 tokens, kept for a comparison with the quantized model.

    stacks, store: the model's blocks and where their weights are: all rows pass a block while it is held, and logits
    are of one row at a time. held_out: none of the rows calibrates.
    """

    def __init__(
        self, model: nn.Module, stacks: Sequence[Stack], store: Resident, rows: Sequence[Batch], held_out: bool
    ) -> None:
        self.stacks, self.store, self.held_out = stacks, store, held_out
        config = getattr(model, "config", None)
        generates = bool(getattr(model, "can_generate", lambda: False)())
        self.predicts = generates and not getattr(config, "is_encoder_decoder", False)
        self.rows = [part for row in rows for part in _parts(row)] if self.predicts else list(rows)
        self.losses, self._tops, self._wanted = list[float](), list[Tensor](), list[Tensor]()
        with contextlib.closing(self._answers(model)) as answers:
            for row in self.rows:  # zip would hold an answer while the next one is made
                out = next(answers)
                if self.predicts:
                    self.losses.append(next_token_loss(out, row))
                    self._tops.append(out[0].argmax(-1))
                else:
                    self._wanted.append(out.clone())
                del out

    def _answers(self, model: nn.Module) -> Generator[Tensor]:
        if len(self.stacks) != 1:
            yield from (output(model, row) for row in self.rows)
            return
        (stack,) = self.stacks
        prefix = getattr(model, "calib_prefix", None)
        extra = {"past_key_values": prefix.stateless()} if isinstance(prefix, Prefix) else None
        with torch.no_grad():
            with self.store.keeping():
                inputs = capture(model, stack, self.rows, extra)
            for i, name in enumerate(stack.names):
                with self.store.hold(name):
                    for j, calls in enumerate(inputs.calls):
                        inputs.hidden[j] = calls[i].run(model.get_submodule(name), inputs.hidden[j])
            with self.store.keeping():
                for j, row in enumerate(self.rows):
                    yield _tensor(run_after(model, stack, row, inputs.hidden[j]))

    def quality(self, model: nn.Module) -> dict[str, Any]:
        """Before and after, for a reader, with a 95 % interval of the ratio (or error): the rows are independent draws,
        and their differences from float have Student's t distribution."""
        found = []
        equal = 0
        with contextlib.closing(self._answers(model)) as answers:
            for i, row in enumerate(self.rows):
                out = next(answers)
                if self.predicts:
                    found.append(next_token_loss(out, row))
                    equal += int((out[0].argmax(-1) == self._tops[i])[_real(row)[0]].sum())
                else:
                    want = self._wanted[i]
                    found.append(float((out - want).square().sum() / want.square().sum().clamp(min=1e-30)))
                del out
        after, tokens = np.array(found), sum(int(_real(row).sum()) for row in self.rows)
        about: dict[str, Any] = {"held_out": self.held_out, "rows": len(self.rows), "tokens": tokens}
        if not self.predicts:
            low, high = _interval(after)
            about |= {"metric": "relative squared error of the output", "float": 0.0, "quantized": float(after.mean())}
            return {**about, "ci95": None if math.isnan(low) else [max(low, 0.0), high]}
        before = np.array(self.losses)
        low, high = _interval(after - before)
        return {
            **about,
            "metric": "perplexity",
            "float": _exp(float(before.mean())),
            "quantized": _exp(float(after.mean())),
            "ratio": _exp(float((after - before).mean())),
            "ci95": None if math.isnan(low) else [_exp(low), _exp(high)],
            "top1": equal / max(tokens, 1),
        }


def held_rows(tokens: TokenData, again: dict[str, Any] | None) -> tuple[list[Batch], bool]:
    """At most 16 rows of 2048 tokens together, one a batch, and whether they are held out of calibration.

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
            return few(fresh), True
    return few([row for batch in tokens for row in single_rows(batch)][::-1]), False


def few(rows: Sequence[Batch], tokens: int = TOKENS) -> list[Batch]:
    """The first rows, up to 16 of them or about so many tokens."""
    ends = np.cumsum([int(_real(row).sum()) for row in rows])
    return list(rows[: min(ROWS, int(np.searchsorted(ends, tokens)) + 1)])


def single_rows(batch: Batch) -> list[Batch]:
    """A batch as batches of one row."""
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(next(iter(batch.values()))))]


def next_token_loss(logits: Tensor, row: Batch) -> float:
    """Mean over the real tokens of one row [1, T, vocabulary], nats."""
    ids, mask = row["input_ids"][0], row.get("attention_mask")
    parts = zip(logits[0, :-1].split(AT_ONCE), ids[1:].split(AT_ONCE), strict=True)
    losses = torch.cat([F.cross_entropy(part.float(), to, reduction="none") for part, to in parts])
    return float(losses.mean() if mask is None else losses[mask[0, 1:].bool()].mean())


def output(model: nn.Module, row: Batch) -> Tensor:
    """Logits where the model has any, else its last hidden state."""
    with torch.no_grad():
        out = call_model(model, row)
    return _tensor(out)


def _tensor(out: Any) -> Tensor:
    tensor = out if isinstance(out, Tensor) else out[0]
    assert isinstance(tensor, Tensor)
    return tensor.float()


def _parts(row: Batch) -> list[Batch]:
    """A row in pieces of at most 128 tokens; pieces without two real tokens have no next one and are dropped."""
    length = row["input_ids"].shape[1]
    parts = [{k: v[:, i : i + LENGTH] for k, v in row.items()} for i in range(0, length, LENGTH)]
    return [part for part in parts if int(_real(part).sum()) > 1]


def _real(batch: Batch) -> Tensor:
    """Which tokens are no padding, bool [B, T]."""
    return batch.get("attention_mask", torch.ones_like(ids_of(batch))).bool()


def _ids(batch: Batch) -> list[np.ndarray]:
    return [ids[keep].numpy() for ids, keep in zip(ids_of(batch), _real(batch), strict=True)]


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
