"""What a selection did, for a reader: text, a figure, and how far its windows drive a model's channels."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.errors import InputError, ModelError
from calib.observers import Range

REACHED = 0.9  # of the pool's largest magnitude


def text(report: Mapping[str, Any]) -> str:
    """The report of a selection in a few lines."""
    chosen, pool = report["chosen"], report["pool"]
    skipped = [f"{count} {reason}" for reason, count in pool["skipped"].items()]
    left = [f"{pool['repeated']} exact repeats", f"{report['near_duplicates']} near-duplicates", *skipped]
    lines = [
        f"chosen: {chosen['pieces']} pieces, {chosen['tokens']} tokens, of {pool['pieces']} ({pool['tokens']} tokens)",
        f"effective sample size {report['effective_sample_size']:.1f} windows, temperature {report['tau']:.3g}",
        f"KL of the target from the pool {report['kl_target_pool']:.3f} nats, from as much drawn evenly "
        f"{report['kl_target_even']:.3f}, from the chosen {report['kl_target_chosen']:.3f}",
        f"left out: {', '.join(left)}",
        f"{'label':24s} {'pool':>7s} {'drawn':>7s} {'all':>7s}",
    ]
    for name, share in report["labels"].items():
        lines.append(f"{name[:24]:24s} {share['pool']:7.2%} {share['importance']:7.2%} {share['all']:7.2%}")
    if "coverage" in report:
        lines += [f"channels whose extremes the chosen windows reach: {report['coverage']['share']:.2%}"]
        lines += [f"  least: {name} {share:.2%}" for name, share in report["coverage"]["least"].items()]
    return "\n".join(lines)


def coverage(
    model: nn.Module, chosen: Sequence[Mapping[str, Tensor]], pool: Sequence[Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Which input channels of a model's linears the chosen batches drive as far as the pool's batches do.

    A channel is reached where its largest magnitude over real tokens is at least `REACHED` of the pool's. Give both
    the same number of tokens. Result: ``share`` of all channels, ``least``: the five linears with the lowest share,
    ``linears``: every linear's share. Raises ModelError for a model without linears.
    """
    ranges = [_ranges(model, batches) for batches in (chosen, pool)]
    shares, reached, channels = {}, 0, 0
    for name, of_pool in ranges[1].items():
        hits = ranges[0][name].absmax >= REACHED * of_pool.absmax
        shares[name] = float(hits.float().mean())
        reached, channels = reached + int(hits.sum()), channels + len(hits)
    if not channels:
        raise ModelError(f"{type(model).__name__} ran no nn.Linear", "use a transformer")
    least = dict(sorted(shares.items(), key=lambda item: item[1])[:5])
    return {"share": reached / channels, "least": least, "linears": shares}


@torch.no_grad()
def _ranges(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Range]:
    """The range of every linear's input channels over the real tokens of some batches."""
    found: dict[str, Range] = {}
    real = torch.empty(0)

    def watch(name: str, module: nn.Linear, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].reshape(-1, module.in_features)
        if len(rows) == len(real):  # experts see rows that were routed to them: all of those are taken
            rows = rows[real]
        found.setdefault(name, Range(module.in_features)).update(rows)

    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    hooks = [module.register_forward_pre_hook(functools.partial(watch, name)) for name, module in linears]
    try:
        for batch in batches:
            real = batch["attention_mask"].bool().flatten()
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def figure(report: Mapping[str, Any], path: str | Path, form: str | None = None) -> None:
    """Write a figure: log weights of pool and chosen, labels before and after, channel coverage where measured.

    form: png, svg, pdf ...; default: as the path ends. Raises InputError without matplotlib (the extra ``report``) and
    for a form that it does not write.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("a figure needs matplotlib", "pip install calib[report], or give a .json name") from error
    measured = "coverage" in report
    form = form or Path(path).suffix.removeprefix(".") or "png"
    if form not in FigureCanvasBase.get_supported_filetypes():
        raise InputError(f"figures are not written as {form!r}", "give a name that ends in .png, .svg, .pdf or .json")
    drawing = Figure(figsize=(12 if measured else 9, 3.6), layout="constrained")
    axes = drawing.subplots(1, 3 if measured else 2)
    weights = report["log_weights"]
    span = (min(map(min, weights.values())), max(map(max, weights.values())))
    for name, values in weights.items():
        axes[0].hist(values, bins=40, range=span, density=True, alpha=0.6, label=name)
    axes[0].set(xlabel="mean log weight (nats per n-gram)", ylabel="density", title="Likeness to the target")
    axes[0].legend()
    names = list(report["labels"])[:12]
    for offset, (kind, label) in enumerate((("pool", "pool"), ("importance", "drawn"), ("all", "with uniform share"))):
        places = [index + 0.27 * (offset - 1) for index in range(len(names))]
        axes[1].bar(places, [report["labels"][name][kind] for name in names], width=0.27, label=label)
    axes[1].set_xticks(range(len(names)), [name[:16] for name in names], rotation=30, ha="right")
    axes[1].set(ylabel="share", title=f"KL {report['kl_target_even']:.2f} → {report['kl_target_chosen']:.2f} nats")
    axes[1].legend()
    if measured:
        axes[2].plot(sorted(report["coverage"]["linears"].values()))
        axes[2].set(xlabel="linears, sorted", ylabel="channels reached", ylim=(0, 1.02), title="Channel extremes")
    drawing.savefig(path, dpi=120, format=form)
