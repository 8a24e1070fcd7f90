"""What a reader is shown of one site: the magnitudes of a few tokens, the extremes of all, in kilobytes of JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BINS, TOKENS = 96, 24  # columns and rows of a map
DEPTH = 1e4  # a map's scale ends at its largest magnitude divided by this
LARGEST = 5  # channels named one by one
MASSIVE = 16.0  # a first token, or a channel, this many times the others' is an outlier


def bins_of(features: int) -> Tensor:
    """[n] int64: the column of each channel; neighbours share one, in columns as even as can be."""
    columns = min(features, BINS)
    return torch.arange(features) * columns // features


def levels(rows: Tensor, top: float) -> str:
    """Magnitudes of rows [t, n] as base64 bytes [t, columns]: the largest of each column's channels, on a logarithmic
    scale from top / DEPTH (0) to top (255)."""
    index = bins_of(rows.shape[1])
    columns = int(index[-1]) + 1
    largest = rows.new_zeros(len(rows), columns).scatter_reduce(1, index.expand(len(rows), -1), rows.abs(), "amax")
    level = 1 + (largest / max(top, 1e-30)).clamp(min=1e-30).log() / torch.tensor(DEPTH).log()
    return base64.b64encode((level * 255).round().clamp(0, 255).to(torch.uint8).numpy().tobytes()).decode()


def extremes(lo: Tensor, hi: Tensor, shift: Tensor | None = None) -> dict[str, Any]:
    """Of channels [n], by column: ``lo`` and ``hi``, the extremes, and ``shift``, that of the column's largest channel;
    four digits each."""
    index = bins_of(len(lo))
    columns = int(index[-1]) + 1
    absmax = (-lo).maximum(hi)
    largest = absmax.new_zeros(columns).scatter_reduce(0, index, absmax, "amax", include_self=False)
    found: dict[str, Any] = {
        "lo": _short(lo.new_zeros(columns).scatter_reduce(0, index, lo, "amin", include_self=False)),
        "hi": _short(hi.new_zeros(columns).scatter_reduce(0, index, hi, "amax", include_self=False)),
    }
    if shift is not None:
        owner = torch.zeros(columns, dtype=torch.int64)
        chosen = (absmax == largest[index]).nonzero()[:, 0].flip(0)  # of equal ones the first
        owner[index[chosen]] = chosen
        found["shift"] = _short(shift[owner])
    return found


def outliers(lo: Tensor, hi: Tensor, first: float, rest: Tensor) -> dict[str, Any]:
    """What stands out. lo, hi [n]: extremes of all tokens; first: the largest magnitude of the first tokens of windows;
    rest [n]: each channel's of the other tokens.

    ``ratio``: the largest channel's magnitude by the median channel's, without first tokens; ``first_token``: the
    first token's by the others'; ``kind``: 'first token', 'channels', 'both' or 'none', those of at least 16;
    ``largest``: [channel, lo, hi] of all tokens.
    """
    absmax = (-lo).maximum(hi)
    median = float(rest.median())
    ratio, first_token = float(rest.amax()) / max(median, 1e-30), first / max(float(rest.amax()), 1e-30)
    kinds = [name for name, value in (("first token", first_token), ("channels", ratio)) if value >= MASSIVE]
    top = absmax.topk(min(LARGEST, len(absmax))).indices.tolist()
    return {
        "kind": "both" if len(kinds) == 2 else (kinds or ["none"])[0],
        "ratio": _digits(ratio),
        "first_token": _digits(first_token),
        "median": _digits(median),
        "largest": [[i, _digits(float(lo[i])), _digits(float(hi[i]))] for i in top],
    }


def picture(rows: Tensor, lo: Tensor, hi: Tensor, shift: Tensor | None = None) -> dict[str, Any]:
    """A site as it is: rows [t, n] in the order of the text, extremes [n] over all tokens, the shift [n] to come."""
    top = float(rows.abs().amax())
    return {
        "channels": len(lo),
        "tokens": len(rows),
        "top": top,
        "map": levels(rows, top),
        **extremes(lo, hi, shift),
    }


def moved(before: Mapping[str, Any], rows: Tensor, lo: Tensor, hi: Tensor) -> dict[str, Any]:
    """The same site behind its transform, on the scale of the picture before."""
    return {"top": float(rows.abs().amax()), "map": levels(rows, before["top"]), **extremes(lo, hi)}


def _short(values: Tensor) -> list[float]:
    return [_digits(value) for value in values.tolist()]


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
