"""``calib inspect``: look at a model without quantizing it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import calib
from calib.errors import InputError
from calib.export.files import check_place, placed, writing
from calib.model.cost import parse_size
from calib.report import page
from calib.report.svg import number


def inspect(
    model: str,
    data: str | None,
    html: Path | None,
    sensitivity: bool,
    scheme: str,
    max_size: str | None,
    scheme_out: Path | None,
    samples: int,
    seq_len: int | None,
    batch_size: int,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Look, write what files are asked for, and return the report."""
    if not sensitivity and (max_size or scheme_out):
        raise InputError("formats are proposed by their effect on the loss", "add --sensitivity")
    for file, option in ((html, "--html"), (scheme_out, "--scheme-out")):  # before minutes are spent
        if file is not None:
            check_place(file, option)
            with writing(file, option):
                file.parent.mkdir(parents=True, exist_ok=True)
                absent = not file.exists()
                file.open("a").close()
                if absent:  # an empty file would pass for a finished one
                    file.unlink()
    report = calib.inspect(
        model,
        data,
        samples=samples,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        sensitivity=scheme if sensitivity else None,
        max_size=None if max_size is None else parse_size(max_size, "--max-size"),
        progress=progress,
    )
    if html is not None:
        with placed(html, "--html") as part:
            part.write_text(page(report), encoding="utf-8")
    if scheme_out is not None and report["sensitivity"]["advice"] is not None:
        with placed(scheme_out, "--scheme-out") as part:
            part.write_text(json.dumps(report["sensitivity"]["advice"]["scheme"], indent=1), encoding="utf-8")
    return report


def text(report: dict[str, Any], most: int = 12) -> str:
    """The sites that stand out, and what is sensitive, on the terminal."""
    sites = sorted(report["sites"], key=lambda s: -max(s["outliers"]["ratio"], s["outliers"]["first_token"]))
    rows = [("input of", "outliers", "largest", "channel / median", "first token / others", "absorbed by")]
    for site in sites[:most]:
        found = site["outliers"]
        ratios = (number(found["ratio"]), number(found["first_token"]))
        rows.append((site["name"], found["kind"], number(site["absmax_before"]), *ratios, site["fold"] or site["note"]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    kinds = [site["outliers"]["kind"] for site in sites]
    lines.append(
        f"{len(sites)} inputs: {sum(k in ('channels', 'both') for k in kinds)} with outlier channels, "
        f"{sum(k in ('first token', 'both') for k in kinds)} with a massive first token"
    )
    if (measured := report["sensitivity"]) is not None:
        lines.append(f"\nadded {measured['metric']} of one linear alone at {measured['scheme']}:")
        worst = sorted(measured["linears"], key=lambda entry: -entry["loss"])[:most]
        lines += [f"  {entry['name']}  {entry['loss']:+.5f}" for entry in worst]
        lines += [measured["advice"]["text"]] if measured["advice"] is not None else []
    return "\n".join(lines)
