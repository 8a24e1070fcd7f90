"""report.html: one file, no script, nothing fetched; every text that is not ours is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from calib.report import charts
from calib.report.record import local, strength
from calib.report.style import STYLE
from calib.report.svg import number
from calib.report.tiles import tiles

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
WORDS = {
    "none": "No outliers",
    "channels": "Outlier channels",
    "first token": "A massive first token",
    "both": "A massive first token, and outlier channels",
}
Report = Mapping[str, Any]
Sites = Mapping[str, Mapping[str, Any]]


def page(report: Report) -> str:
    """The HTML of a report.json of ``kind`` quantize or inspect."""
    blocks = [block["name"] for block in report["blocks"]]
    sites = {site["name"]: site for site in report["sites"]}
    sections = _quantized if report["kind"] == "quantize" else _inspected
    body = "\n".join([*sections(report, sites, blocks), _provenance(report)])
    title = f"{_called(report)} · calib {report['kind']}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _called(report: Report) -> str:
    """The model's name; of a folder given by its whole path, the last part."""
    name = str(report["model"]["name"])
    return name.rstrip("/").rpartition("/")[2] or name if name.startswith(("/", "~", ".")) else name


def _quantized(report: Report, sites: Sites, blocks: Sequence[str]) -> list[str]:
    counts = report["plan"]
    summary = (
        f"{', '.join(report['methods'])} · {counts['quantized']} of {len(report['linears'])} linears quantized, "
        f"{counts['transformed']} of them transformed, {len(counts['excluded'])} left in float. Calibrated on "
        f"{report['data']['tokens']} tokens."
    )
    cells = "".join(f'<div class="tile"><b>{_text(a)}</b><span>{_text(b)}</span></div>' for a, b in tiles(report))
    return [
        f"<h1>{_text(_called(report))} in {_text(report['scheme'])}</h1>",
        f'<p class="soft">{_text(summary)}</p><div class="tiles">{cells}</div>',
        _story(sites),
        _outliers(report, sites, blocks),
        _errors(report, blocks),
        _plan(report),
    ]


def _inspected(report: Report, sites: Sites, blocks: Sequence[str]) -> list[str]:
    data = report["data"]
    about = f"In float, on {data['tokens']} tokens of {data['source']}. Nothing was quantized or changed."
    head = ("input of", "outliers", "largest", "channel / median", "first token / others", "absorbed by")
    rows = []
    for site in sites.values():
        found = site["outliers"]
        ratios = (number(found["ratio"]), number(found["first_token"]))
        rows.append((site["name"], found["kind"], number(site["absmax_before"]), *ratios, site["fold"] or site["note"]))
    return [
        f"<h1>Outliers of {_text(_called(report))}</h1>",
        f'<p class="soft">{_text(about)}</p>',
        _story(sites),
        _outliers(report, sites, blocks),
        _sensitivity(report["sensitivity"]),
        "<h2>Every input, and what could absorb a shift and a scale there</h2>",
        _table(head, rows),
    ]


def _story(sites: Sites) -> str:
    """What is wrong with this model, and what was done about it, in three sentences."""
    if not sites:
        return ""
    worst = max(sites.values(), key=strength)
    channel, lo, hi = worst["outliers"]["largest"][0]
    kinds = [s["outliers"]["kind"] for s in sites.values()]
    channels, firsts = (sum(k in (kind, "both") for k in kinds) for kind in ("channels", "first token"))
    told = [
        f"Of the {len(kinds)} inputs of linears {channels} have outlier channels (16 times the median one or more), "
        f"and in {firsts} the first token is at least 16 times larger than all others."
        if channels or firsts
        else f"No channel and no first token of the {len(kinds)} inputs of linears is 16 times larger than the rest.",
        f"The most uneven is the input of {worst['name']}: it reaches {number(worst['absmax_before'])}, in channel "
        f"{channel} ({number(lo)} to {number(hi)}), where the median channel stays within "
        f"{number(worst['outliers']['median'])}. One grid over that range leaves ordinary values few steps, or none.",
    ]
    if "absmax" in worst and worst["absmax"] < 0.9 * worst["absmax_before"]:
        told.append(f"After shift, scale and rotation it reaches {number(worst['absmax'])}.")
    return f"<h2>What is wrong with the activations</h2><p>{_text(' '.join(told))}</p>"


def _outliers(report: Report, sites: Sites, blocks: Sequence[str]) -> str:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, site in sites.items():
        if site["block"] is not None:
            kinds.setdefault(local(name, blocks), []).append(site)
    quantized = any("absmax" in site for site in sites.values())
    overview = []
    for kind, found in kinds.items():
        series = {"before": [(s["block"], s["absmax_before"]) for s in found]}
        if quantized:
            series["after"] = [(s["block"], s["absmax"]) for s in found]
        overview.append(charts.profile(series, f"Input of {kind}", "largest |x|"))
    legend = '<i class="before"></i>as the model makes it'
    legend += ' <i class="after"></i>after shift, scale and rotation' if quantized else ""
    left_out = {e["name"]: e["reason"] for e in report.get("linears", ()) if e["status"] != "transformed"}
    cards = []
    for name, picture in report["pictures"].items():
        site = sites[name]
        reason = left_out.get(f"{name.removesuffix(local(name, blocks))}{site['consumers'][0]}", "")
        figures = [charts.ranges(picture), charts.maps(picture), charts.loss_curve(site)]
        head = f'<h3>Input of {_text(name)}</h3><p class="soft">{_text(_kind(site, reason))}</p>'
        cards.append(f"{head}{_grid(figures)}")
    return (
        f"<h2>Outliers, block by block</h2><p>The largest magnitude that enters each kind of linear. {legend}</p>"
        f"{_grid(overview)}<h2>The inputs that stand out most</h2>{''.join(cards)}"
    )


def _kind(site: Mapping[str, Any], reason: str) -> str:
    found = site["outliers"]
    said = (
        f"{WORDS[found['kind']]}: the largest channel reaches {number(found['ratio'])} times what the median one does"
    )
    if found["first_token"] >= 2:
        said += f", the first token {number(found['first_token'])} times what all others do"
    return said + (f". Not transformed: {reason}." if reason else ".")


def _errors(report: Report, blocks: Sequence[str]) -> str:
    measured = [entry for entry in report["linears"] if entry["sqnr_db"] is not None]
    if not measured:
        return ""
    worst = sorted(measured, key=lambda entry: entry["sqnr_db"])[:10]
    rows = [(e["name"], 100 * 10 ** (-e["sqnr_db"] / 20), f"{e['sqnr_db']:.1f} dB") for e in worst]
    table: dict[str, dict[int, float]] = {}
    for entry in measured:
        if entry["block"] is not None:
            table.setdefault(local(entry["name"], blocks), {})[entry["block"]] = entry["sqnr_db"]
    errors = [(i, block["error"]) for i, block in enumerate(report["blocks"]) if block["error"] is not None]
    scale = "SQNR, dB: the brighter, the noisier"
    figures = [
        charts.bars(rows, "The linears that lose most", "error of the output, %", "At each bar: its SQNR.", "before"),
        charts.matrix(table, len(blocks), "SQNR of every linear", scale),
        charts.profile({"after": errors}, "Error of the output of each block", "relative error"),
    ]
    return (
        "<h2>What rounding costs, layer by layer</h2><p>SQNR is the power of a linear's output over that of its error, "
        "on the inputs that the quantized model before it produces: 20 dB is an error of 10 %, 40 dB of 1 %. Where "
        "one massive token carries most of the power, an input can look good here and be ruined for every other token."
        "</p>" + _grid(figures)
    )


def _sensitivity(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    worst = sorted(found["linears"], key=lambda e: -e["loss"])[:12]
    rows = [(e["name"], e["loss"], f"{e['loss']:+.2g}") for e in worst]
    blocks = [(block["loss"], block["ci95"]) for block in found["blocks"]]
    scheme, metric = found["scheme"], found["metric"]
    about = (
        f"What is added to the {metric} when one linear, or one block, alone is rounded to nearest, inputs and "
        f"weights, and all others stay float. {found['rows']} rows, {found['tokens']} tokens; "
        f"float: {found['float_loss']:.4g}."
    )
    figures = [
        charts.bars(rows, "The linears that cost most, alone", f"added {metric}", colour="before"),
        charts.columns(
            blocks, "Each block alone", f"added {metric.split()[-1]}", "Whiskers: 95 % intervals over the rows."
        ),
    ]
    said = f"<h2>Sensitivity at {_text(scheme)}</h2><p>{_text(about)}</p>{_grid(figures)}"
    if (advice := found["advice"]) is not None:
        formats = _table(("linear", "proposed format"), advice["formats"].items())
        said += (
            f"<h3>Proposed formats</h3><p>{_text(advice['text'])}</p><details><summary>Each linear</summary>{formats}"
            f"</details><details><summary>As a scheme, for calib quantize --scheme FILE.json</summary>"
            f"<pre>{_text(json.dumps(advice['scheme'], indent=1))}</pre></details>"
        )
    return said


def _plan(report: Report) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in report["plan"]["excluded"].items():
        by_reason.setdefault(reason, []).append(name)
    left = [f"{_text(reason)}: <code>{_text(', '.join(names))}</code>" for reason, names in by_reason.items()]
    head = ("linear", "shape", "status", "absorbed by, or why not", "bits a weight", "SQNR, dB")
    rows = [
        (
            e["name"],
            f"{e['shape'][0]} × {e['shape'][1]}",
            e["status"],
            e["fold"] or e["reason"] or "–",
            f"{e['bits']:.2f}",
            "–" if e["sqnr_db"] is None else f"{e['sqnr_db']:.1f}",
        )
        for e in report["linears"]
    ]
    return (
        f"<h2>Plan</h2>{_list('Left in float:', left)}{_list('Notes:', map(_text, report['plan']['notes']))}"
        f"<details><summary>Every linear</summary>{_table(head, rows)}</details>"
    )


def _provenance(report: Report) -> str:
    data, model, versions = report["data"], report["model"], report["versions"]
    facts = {
        "model": f"{model['class']}, {model['parameters']} parameters",
        "data": f"{data['source']}, {data['rows']} rows, {data['tokens']} tokens, sha256 {data['fingerprint']}",
        "seed": report["seed"],
        "machine": report["machine"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    if report["kind"] == "quantize":
        facts |= {"prefix tokens": report["prefix"] or "none", "format": report["format"] or "not written"}
    listed = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    stages = sorted(((v, name) for name, v in report["seconds"].items() if name != "total"), reverse=True)[:10]
    times = charts.bars([(name, v, f"{v:.1f} s") for v, name in stages if v >= 0.05], "Where the time went", "seconds")
    hashes = [*model["files"].items(), *report.get("sha256", {}).items()]
    folds = [("Files and their sha256", _table(("file", "sha256"), hashes))] if hashes else []
    if "recipe" in report:
        folds.append(("Recipe", f"<pre>{_text(json.dumps(report['recipe'], indent=1))}</pre>"))
    closed = "".join(f"<details><summary>{name}</summary>{inside}</details>" for name, inside in folds)
    return (
        f"<h2>How it was made</h2><pre>{_text(report['command'])}</pre><dl>{listed}</dl>{_grid([times])}{closed}"
        f'<p class="note">Written by calib {_text(versions.get("calib", ""))}, {_text(report["created"])}.</p>'
    )


def _grid(figures: Iterable[str]) -> str:
    return f'<div class="grid-of">{"".join(figures)}</div>'


def _list(head: str, items: Iterable[str]) -> str:
    """Items that are HTML already; empty where there are none."""
    inside = "".join(f"<li>{item}</li>" for item in items)
    return f"<p>{head}</p><ul>{inside}</ul>" if inside else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: Any) -> str:
    return escape(str(value))
