"""The figures of a report, each from plain JSON values."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

from calib.observers.picture import DEPTH
from calib.report.svg import WIDTH, Panel, colour_bar, figure, number

LEFT, RIGHT = 58, WIDTH - 10
Site = Mapping[str, Any]


def ranges(picture: Site) -> str:
    """Extremes of each column of channels, before with the shift drawn in, and after."""
    after = picture.get("after")
    panels = [_extremes(picture, 22, 136, "before: smallest to largest value", "before")]
    if after is not None:
        panels.append(_extremes(after, 184, 298, "after shift, scale and rotation", "after"))
    note = f"{_columns(picture)} Each panel has its own scale." if after is not None else _columns(picture)
    if "shift" in picture:
        note += " Violet: the shift, the middle of the column's largest channel, that is subtracted."
    return figure(panels, panels[-1].box[3] + 24, "Range of each channel", note)


def _extremes(part: Site, top: float, bottom: float, heading: str, colour: str) -> Panel:
    lo, hi = min(0.0, *part["lo"]), max(0.0, *part["hi"])
    spread = (hi - lo) or 1.0
    count = len(part["lo"])
    panel = Panel((LEFT, top, RIGHT, bottom), (0, count), (lo - 0.03 * spread, hi + 0.03 * spread))
    panel.axes(
        "channels" if bottom else "", "value of x", xticks=[], heading=f"{heading}: {number(lo)} to {number(hi)}"
    )
    for i, (low, high) in enumerate(zip(part["lo"], part["hi"], strict=True)):
        panel.bar(i + 0.1, i + 0.9, low, high, colour)
    for i, shift in enumerate(part.get("shift", ())):
        if abs(shift) > 0.004 * spread:
            panel.line([(i - 0.3, shift), (i + 1.3, shift)], "shift")
    return panel


def maps(picture: Site) -> str:
    """Magnitude by channel and token, before and after, on one scale of colours."""
    tokens, after = picture["tokens"], picture.get("after")
    columns = len(picture["lo"])
    panels, top = [], 22
    for part, heading in ((picture, "before"), (after, "after, same colours")):
        if part is None:
            continue
        panel = Panel((LEFT, top, RIGHT, top + 100), (0, columns), (tokens, 0))
        panel.pixels(base64.b64decode(part["map"]), columns)
        marks = [t + 0.5 for t in range(0, tokens, 8)]
        panel.axes("channels", "token", xticks=[], yticks=[], heading=f"{heading}: at most {number(part['top'])}")
        for mark in marks:
            panel.text(LEFT - 5, panel.y(mark) + 4, str(int(mark)), "end")
        panels.append(panel)
        top += 148
    bar = Panel((LEFT, top - 14, RIGHT, top - 4), (0, 1), (0, 1))
    colour_bar(bar, number(picture["top"] / DEPTH), number(picture["top"]), "|x|, logarithmic")
    note = f"The first {tokens} tokens of the data, in order; token 0 begins a window. {_columns(picture)}"
    return figure([*panels, bar], top + 16, "Magnitude by channel and token", note)


def _columns(picture: Site) -> str:
    n, columns = picture["channels"], len(picture["lo"])
    each = f"{n / columns:.3g} neighbouring channels, the largest shown" if columns < n else "one channel"
    return f"Left to right: channels 0 to {n - 1}; a column is {each}."


def loss_curve(site: Site) -> str:
    """What each threshold tried would cost, and the one taken; empty where nothing was searched."""
    points = sorted((t, loss) for t, loss in site.get("curve") or () if t and loss)  # null: infinite
    if len({t for t, _ in points}) < 2:
        return ""
    plain, chosen = site["identity_loss"] or 0.0, site["threshold"]
    losses = [loss for _, loss in points] + ([plain] if plain > 0 else [])
    panel = Panel((LEFT, 26, RIGHT, 170), (points[0][0] / 1.1, points[-1][0] * 1.1), _padded(losses), True, True)
    panel.axes("threshold", "loss", yticks=_log_ticks(losses))
    panel.line(points, "after")
    for point in points:
        panel.dot(*point, "after", 2)
    said = []
    if chosen is None:
        said.append("none is better than no scaling")
    else:
        panel.dot(chosen, site["loss"], "ring", 6)
        said.append(f"○ taken: {number(chosen)}, loss {number(site['loss'])}")
    if plain > 0:
        panel.line([(panel.xlim[0], plain), (panel.xlim[1], plain)], "before dashed")
        said.append(f"- - unscaled: {number(plain)}")
    panel.text(10, 14, "   ".join(said), "start", "heading")
    note = "Squared error of the outputs for each threshold tried; channels beyond it are scaled down to it."
    return figure([panel], 206, "Search of the threshold", note)


def profile(series: Mapping[str, Sequence[tuple[int, float]]], title: str, ylabel: str, note: str = "") -> str:
    """Positive values over blocks, logarithmic: one line for each colour class in ``series``."""
    values = [v for points in series.values() for _, v in points if 0 < v < math.inf]
    if not values:
        return ""
    last = max(i for points in series.values() for i, _ in points)
    panel = Panel((LEFT, 14, RIGHT, 140), (-0.3, last + 0.3), _padded(values), ylog=True)
    step = max(1, -(-(last + 1) // 6))
    panel.axes("block", ylabel, xticks=list(range(0, last + 1, step)), yticks=_log_ticks(values))
    for name, points in series.items():
        panel.line(points, name)
        for point in points:
            panel.dot(*point, name, 2.2)
    return figure([panel], 178, title, note)


def columns(values: Sequence[tuple[float, Sequence[float] | None]], title: str, ylabel: str, note: str = "") -> str:
    """A bar up or down for each block, and its interval as a whisker."""
    ends = [end for value, ci95 in values for end in (value, *(ci95 or ()))]
    low, high = min(0.0, *ends), max(0.0, *ends)
    spread = (high - low) or 1.0
    panel = Panel((LEFT, 14, RIGHT, 160), (-0.6, len(values) - 0.4), (low - 0.04 * spread, high + 0.04 * spread))
    step = max(1, -(-len(values) // 6))
    panel.axes("block", ylabel, xticks=list(range(0, len(values), step)))
    for i, (value, ci95) in enumerate(values):
        panel.bar(i - 0.35, i + 0.35, 0.0, value, "before")
        if ci95 is not None:
            panel.line([(i, ci95[0]), (i, ci95[1])], "whisker")
    return figure([panel], 198, title, note)


def bars(rows: Sequence[tuple[str, float, str]], title: str, xlabel: str, note: str = "", colour: str = "after") -> str:
    """Horizontal bars from 0: name, value, what is written at the end; names stand above their bars."""
    if not rows:
        return ""
    most = max(max(value for _, value, _ in rows), 1e-9)
    bottom = 8 + 32 * len(rows)
    panel = Panel((10, 8, WIDTH - 76, bottom), (0, most), (len(rows), 0))
    for i, (name, value, text) in enumerate(rows):
        y = panel.y(i)
        panel.text(10, y + 12, _clipped(name), "start", "name")
        panel.bar(0, max(value, 0.0), i + 0.5, i + 0.85, colour)
        panel.text(panel.x(max(value, 0.0)) + 6, y + 26, text)
    panel.text((10 + WIDTH - 76) / 2, bottom + 18, xlabel, "middle", "label")
    return figure([panel], bottom + 28, title, note)


def matrix(rows: Mapping[str, Mapping[int, float]], blocks: int, title: str, unit: str) -> str:
    """A value for each kind of linear (row) and block (column), bright where it is small; black where there is none."""
    values = [v for row in rows.values() for v in row.values()]
    if not values or blocks < 2:
        return ""
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    left = min(150.0, 12 + 6.6 * max(len(_clipped(name, 21)) for name in rows))
    top, bottom = 10, 10 + 20 * len(rows)
    panel = Panel((left, top, RIGHT, bottom), (0, blocks), (len(rows), 0))
    level = {name: [row.get(i) for i in range(blocks)] for name, row in rows.items()}
    cells = bytes(0 if v is None else 50 + round(205 * (high - v) / spread) for row in level.values() for v in row)
    panel.pixels(cells, blocks)
    for i, name in enumerate(rows):
        panel.text(left - 6, panel.y(i + 0.5) + 4, _clipped(name, 21), "end", "name")
    step = max(1, -(-blocks // 8))
    for i in range(0, blocks, step):
        panel.text(panel.x(i + 0.5), bottom + 14, str(i), "middle")
    panel.text((left + RIGHT) / 2, bottom + 30, "block", "middle", "label")
    note = "Black: none." if None in (v for row in level.values() for v in row) else ""
    bar = Panel((left, bottom + 44, RIGHT, bottom + 54), (0, 1), (0, 1))
    colour_bar(bar, number(high), number(low), unit, start=50)
    return figure([panel, bar], bottom + 90, title, note)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return low / 1.15, max(high * 1.15, low * 1.5)


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten; where fewer than two fall inside, 1, 2 and 5 of them; else the ends."""
    low, high = _padded(values)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [m * 10.0**k for k in range(first, last + 1) for m in steps if low <= m * 10.0**k <= high]
        if len(found) >= 2:
            return found[:: -(-len(found) // 5)]
    return [min(values), max(values)]


def _clipped(name: str, most: int = 56) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]
