"""Drawing: axes, lines, bars and byte maps as inline SVG whose colours are the page's (CSS classes), for any theme."""

from __future__ import annotations

import base64
import html
import itertools
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH = 380  # of every figure, in its own units: text of 12 is readable where the figure is as wide as a phone
STOPS = (
    (0.0, (8, 6, 28)),
    (0.35, (98, 24, 128)),
    (0.6, (196, 62, 104)),
    (0.82, (251, 148, 74)),
    (1.0, (253, 246, 180)),
)


@dataclass
class Panel:
    """A plotting area with axes: data in xlim, ylim go to pixels in box (left, top, right, bottom)."""

    box: tuple[float, float, float, float]
    xlim: tuple[float, float]
    ylim: tuple[float, float]
    xlog: bool = False
    ylog: bool = False
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        return _scaled(value, self.xlim, self.xlog, self.box[0], self.box[2])

    def y(self, value: float) -> float:
        return _scaled(value, self.ylim, self.ylog, self.box[3], self.box[1])

    def axes(
        self,
        xlabel: str = "",
        ylabel: str = "",
        *,
        xticks: Sequence[float] | None = None,
        yticks: Sequence[float] | None = None,
        heading: str = "",
    ) -> Panel:
        """Grid lines, numbers, and names of the axes with units; heading: above the panel."""
        left, top, right, bottom = self.box
        for value in ticks(*self.ylim, self.ylog, 4) if yticks is None else yticks:
            y = self.y(value)
            self.parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
            self.text(left - 5, y + 4, number(value), "end")
        marks = ticks(*self.xlim, self.xlog, 5) if xticks is None else xticks
        for value in marks:
            x = self.x(value)
            self.parts.append(f'<path class="tick" d="M{x:.1f} {bottom:.1f}v4"/>')
            self.text(x, bottom + 16, number(value), "middle")
        self.parts.append(f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>')
        if xlabel:
            self.text((left + right) / 2, bottom + (32 if len(marks) else 16), xlabel, "middle", "label")
        if ylabel:
            x, y = 11, (top + bottom) / 2
            self.parts.append(
                f'<text class="label" text-anchor="middle" transform="translate({x} {y:.1f}) rotate(-90)">'
                f"{html.escape(ylabel)}</text>"
            )
        if heading:
            self.text(left, top - 7, heading, "start", "heading")
        return self

    def text(self, x: float, y: float, text: str, anchor: str = "start", name: str = "number") -> None:
        """In pixels; escaped here."""
        self.parts.append(
            f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
        )

    def line(self, points: Sequence[tuple[float, float]], name: str) -> None:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.parts.append(f'<polyline class="line {name}" points="{path}"/>')

    def dot(self, x: float, y: float, name: str, radius: float = 2.5) -> None:
        self.parts.append(f'<circle class="{name}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}"/>')

    def bar(self, x0: float, x1: float, y0: float, y1: float, name: str) -> None:
        left, right = sorted((self.x(x0), self.x(x1)))
        top, bottom = sorted((self.y(y0), self.y(y1)))
        size = f'width="{right - left:.1f}" height="{max(bottom - top, 0.8):.1f}"'
        self.parts.append(f'<rect class="{name}" x="{left:.1f}" y="{top:.1f}" {size}/>')

    def pixels(self, values: bytes, columns: int) -> None:
        """A byte map, row by row from the top, over the whole panel."""
        left, top, right, bottom = self.box
        self.parts.append(
            f'<image x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" '
            f'preserveAspectRatio="none" href="{png(values, columns)}"/>'
        )


def figure(panels: Sequence[Panel], height: float, title: str, note: str = "") -> str:
    """An HTML figure: title above, note below, both escaped here."""
    inside = "".join(part for panel in panels for part in panel.parts)
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    below = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return (
        f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{html.escape(title)}">'
        f"{inside}</svg>{below}</figure>"
    )


def colour_bar(panel: Panel, low: str, high: str, label: str, start: int = 0) -> None:
    """The palette from byte ``start`` (low) to 255 (high), over the whole panel, with what it means."""
    left, _, right, bottom = panel.box
    panel.pixels(bytes(range(start, 256)), 256 - start)
    panel.text(left, bottom + 14, low, "start")
    panel.text(right, bottom + 14, high, "end")
    panel.text((left + right) / 2, bottom + (14 if len(label) < 20 else 30), label, "middle", "label")


def png(values: bytes, columns: int) -> str:
    """A palette image (PNG, colour type 3) as a data address."""
    rows = len(values) // columns
    lines = b"".join(b"\0" + values[i * columns : (i + 1) * columns] for i in range(rows))
    palette = bytes(channel for level in range(256) for channel in _colour(level / 255))
    head = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"PLTE", palette), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ticks(low: float, high: float, log: bool, count: int) -> list[float]:
    """Round values within the limits: at most about count of them."""
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        step = max(1, -(-(last - first) // count))
        return [10.0**k for k in range(first, last + 1, step)]
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Three digits, thousands as k, millions as M."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        return f"{value:.0e}"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / min(unit, 1e3 if name == 'k' else unit):.3g}{name}"
    return f"{value:.4g}" if size >= 1000 else f"{value:.3g}"


def _scaled(value: float, limits: tuple[float, float], log: bool, start: float, end: float) -> float:
    low, high = limits
    if log:
        value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
    return start + (end - start) * min(max((value - low) / (high - low), 0.0), 1.0)


def _colour(level: float) -> tuple[int, int, int]:
    for (a, first), (b, second) in itertools.pairwise(STOPS):
        if level <= b:
            t = (level - a) / (b - a)
            red, green, blue = (round(p + (q - p) * t) for p, q in zip(first, second, strict=True))
            return red, green, blue
    return STOPS[-1][1]
