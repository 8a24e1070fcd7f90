"""The figures at the head of a report: what it cost and what it brought, (headline, explanation) each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from calib.report.svg import number

Tile = tuple[str, str]


def tiles(report: Mapping[str, Any]) -> Iterator[Tile]:
    """Of a report of kind quantize; what was not measured has none."""
    if report["quality"] is not None:
        yield _quality(report["quality"], bool(report["prefix"]))
    yield _size(report["size"])
    speed = report["speed"]
    if speed["float_seconds"] and speed["quantized_seconds"]:
        yield (
            f"{speed['float_seconds'] / speed['quantized_seconds']:.2f} × float speed",
            f"all blocks on one calibration batch: float {speed['float_seconds']:.3g} s, integer kernels "
            f"{speed['quantized_seconds']:.3g} s, {speed['threads']} thread(s), one timing each.",
        )
    if (verify := report["verify"]) is not None:
        yield "verified", f"a fresh process answers within {verify['max_difference']:.1e} of the logit range."
    if (total := report["seconds"].get("total")) is not None:
        memory = "" if report["peak_rss_mib"] is None else f", {report['peak_rss_mib']:.0f} MiB of memory at most"
        yield f"{total:.0f} s", f"from start to finish{memory}."


def _quality(quality: Mapping[str, Any], prefix: bool) -> Tile:
    which = "held-out rows" if quality["held_out"] else "calibration rows (none were left to hold out)"
    where = f"{quality['rows']} {which}, {quality['tokens']} tokens"
    interval = "one row" if quality["ci95"] is None else "95 %: " + " to ".join(f"{v:.4g}" for v in quality["ci95"])
    if quality["metric"] != "perplexity":
        return f"{quality['quantized']:.2%}", f"{quality['metric']} ({interval}). {where}."
    behind = "; the quantized model runs behind its prefix" if prefix else ""
    return (
        f"{number(quality['float'])} → {number(quality['quantized'])}",
        f"perplexity, float → quantized: × {quality['ratio']:.4g} ({interval}); same first choice of the next token at "
        f"{quality['top1']:.1%}. {where}{behind}.",
    )


def _size(size: Mapping[str, Any]) -> Tile:
    before, after = size["float_bytes"], size["disk_bytes"] or size["quantized_bytes"]
    where = "on disk" if size["disk_bytes"] else "quantized"
    return (
        f"{_bytes(before)} → {_bytes(after)}",
        f"weights, float → {where}: {before / max(after, 1):.2f} times smaller; embeddings, and what else is no "
        "quantized linear, stay float.",
    )


def _bytes(size: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 2**10:.0f} KiB"
