"""Dots per draw and a bar at their mean, for groups side by side: the figure of the sampling experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57")


@dataclass(frozen=True)
class Panel:
    """values: arm, then target, then one value a draw. zero: whether the axis shows it."""

    title: str
    unit: str
    values: Mapping[str, Mapping[str, Sequence[float]]]
    zero: bool = True


def plot(panels: Sequence[Panel], file: Path, title: str) -> None:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    drawing = Figure(figsize=(5.2 * columns, 4.1 * rows), layout="constrained")
    drawing.suptitle(title)
    for axes, panel in zip(drawing.subplots(rows, columns, squeeze=False).flatten(), panels, strict=False):
        targets = list(next(iter(panel.values.values())))
        for place, of_arm in enumerate(panel.values.values()):
            for index, target in enumerate(targets):
                x, found = place + 0.24 * (index - (len(targets) - 1) / 2), of_arm[target]
                if found:
                    axes.scatter([x] * len(found), found, s=14, alpha=0.55, color=COLOURS[index], linewidths=0)
                    axes.hlines(fmean(found), x - 0.1, x + 0.1, color=COLOURS[index], linewidth=2.2)
        for index, target in enumerate(targets):
            axes.scatter([], [], color=COLOURS[index], label=target)
        axes.set_xticks(range(len(panel.values)), list(panel.values), rotation=20)
        axes.set(title=panel.title, ylabel=panel.unit, xlim=(-0.5, len(panel.values) - 0.5))
        if panel.zero:
            axes.axhline(0, color="grey", linewidth=0.8)
        axes.grid(axis="y", alpha=0.25)
    handles, labels = drawing.axes[0].get_legend_handles_labels()
    drawing.legend(handles, [f"target: {label}" for label in labels], loc="outside lower center", ncols=len(labels))
    for axes in drawing.axes[len(panels) :]:
        axes.axis("off")
    drawing.savefig(file, dpi=110)
