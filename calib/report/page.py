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


def page(report: Mapping[str, Any]) -> str:
    """The HTML of a report.json of ``kind`` quantize or inspect."""
    body = _quantized(report) if report["kind"] == "quantize" else _inspected(report)
    title = f"{report['model']['name']} · calib {report['kind']}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _quantized(report: Mapping[str, Any]) -> str:
    blocks = [block["name"] for block in report["blocks"]]
    sites = {site["name"]: site for site in report["sites"]}
    counts = report["plan"]
    summary = (
        f"{counts['quantized']} of {len(report['linears'])} linears quantized, {counts['transformed']} of them "
        f"transformed, {len(counts['excluded'])} left in float. Calibrated on {report['data']['tokens']} tokens."
    )
    parts = [
        f"<h1>{_text(report['model']['name'])} in {_text(report['scheme'])}</h1>",
        f'<p class="soft">{_text(", ".join(report["methods"]))} · {_text(summary)}</p>',
        _tiles(report),
        _story(sites),
        _outliers(sites, blocks, report["pictures"]),
        _errors(report, blocks),
        _plan(report),
        _provenance(report),
    ]
    return "\n".join(parts)


def _inspected(report: Mapping[str, Any]) -> str:
    blocks = [block["name"] for block in report["blocks"]]
    sites = {site["name"]: site for site in report["sites"]}
    parts = [
        f"<h1>Outliers of {_text(report['model']['name'])}</h1>",
        f'<p class="soft">{_text(report["data"]["tokens"])} tokens of {_text(report["data"]["source"])}, nothing quantized.</p>',
        _story(sites),
        _outliers(sites, blocks, report["pictures"]),
        _sensitivity(report.get("sensitivity")),
        "<h2>Where a shift and a scale can go</h2>",
        _table(
            (
                "input of",
                "kind of site",
                "absorbed by",
                "outliers",
                "largest channel / median",
                "first token / others",
                "largest",
            ),
            (
                (
                    s["name"],
                    s["site"],
                    s["fold"] or s["note"] or "input quantizer",
                    s["outliers"]["kind"],
                    number(s["outliers"]["ratio"]),
                    number(s["outliers"]["first_token"]),
                    number(s["absmax_before"]),
                )
                for s in report["sites"]
            ),
        ),
        _provenance(report),
    ]
    return "\n".join(parts)


def _tiles(report: Mapping[str, Any]) -> str:
    tiles = []
    if (quality := report["quality"]) is not None:
        rows = f"{quality['rows']} {'held-out rows' if quality['held_out'] else 'calibration rows (none were left to hold out)'}"
        where = f"{rows}, {quality['tokens']} tokens"
        interval = "" if quality["ci95"] is None else " to ".join(number(v) for v in quality["ci95"])
        if quality["metric"] == "perplexity":
            change = f"× {quality['ratio']:.4g}" + (f" (95 %: {interval})" if interval else "")
            behind = "; the quantized model runs behind its prefix" if report["prefix"] else ""
            tiles.append(
                (
                    f"{number(quality['float'])} → {number(quality['quantized'])}",
                    f"perplexity, float → quantized: {change}; same top token at {quality['top1']:.1%}. {where}{behind}.",
                )
            )
        else:
            tiles.append(
                (f"{quality['quantized']:.2%}", f"{quality['metric']} (95 %: {interval or 'one row'}). {where}.")
            )
    size = report["size"]
    before, after = size["float_bytes"], size["disk_bytes"] or size["quantized_bytes"]
    tiles.append(
        (
            f"{_bytes(before)} → {_bytes(after)}",
            f"weights, float → {'on disk' if size['disk_bytes'] else 'quantized'}: {before / max(after, 1):.2f} times smaller.",
        )
    )
    speed = report["speed"]
    if speed["float_seconds"] and speed["quantized_seconds"]:
        gain = speed["float_seconds"] / speed["quantized_seconds"]
        tiles.append(
            (
                f"{gain:.2f} × float speed",
                f"all blocks on one calibration batch: float {speed['float_seconds']:.3g} s, integer kernels "
                f"{speed['quantized_seconds']:.3g} s, {speed['threads']} thread(s), one timing each.",
            )
        )
    if (verify := report["verify"]) is not None:
        tiles.append(("verified", f"a fresh process answers within {verify['max_difference']:.1e} of the logit range."))
    total = report["seconds"].get("total")
    if total is not None:
        memory = "" if report["peak_rss_mib"] is None else f", {number(report['peak_rss_mib'])} MiB of memory at most"
        tiles.append((f"{total:.0f} s", f"from start to finish{memory}."))
    cells = "".join(f'<div class="tile"><b>{_text(head)}</b><span>{_text(text)}</span></div>' for head, text in tiles)
    return f'<div class="tiles">{cells}</div>'


def _story(sites: Mapping[str, Mapping[str, Any]]) -> str:
    """What is wrong with this model, and what was done about it, in three sentences."""
    if not sites:
        return ""
    worst = max(sites.values(), key=strength)
    found = worst["outliers"]
    channel, lo, hi = found["largest"][0]
    kinds = [s["outliers"]["kind"] for s in sites.values()]
    channels, firsts = (sum(k in (kind, "both") for k in kinds) for kind in ("channels", "first token"))
    told = [
        f"{channels} of the {len(kinds)} inputs of linears have outlier channels (16 times the median channel, or more), "
        f"and {firsts} a first token at least 16 times larger than all others."
        if channels or firsts
        else f"None of the {len(kinds)} inputs of linears has a channel, or a first token, 16 times larger than the others.",
        f"The most uneven is the input of {worst['name']}: it reaches {number(worst['absmax_before'])}, in channel "
        f"{channel} ({number(lo)} to {number(hi)}), where the median channel stays within {number(found['median'])}.",
    ]
    if "absmax" in worst and worst["absmax"] < 0.9 * worst["absmax_before"]:
        told.append(f"After shift, scale and rotation it reaches {number(worst['absmax'])}.")
    return f"<h2>What is wrong with the activations</h2><p>{_text(' '.join(told))}</p>"


def _outliers(sites: Mapping[str, Mapping[str, Any]], blocks: Sequence[str], pictures: Mapping[str, Any]) -> str:
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
    legend = '<i class="before"></i>as the model makes it' + (
        ' <i class="after"></i>after shift, scale and rotation' if quantized else ""
    )
    cards = []
    for name, picture in pictures.items():
        site = sites[name]
        figures = [charts.ranges(picture), charts.maps(picture), charts.loss_curve(site)]
        head = f'<h3>Input of {_text(name)}</h3><p class="soft">{_text(_kind(site))}</p>'
        cards.append(f'{head}<div class="grid-of">{"".join(figures)}</div>')
    return (
        f"<h2>Outliers, block by block</h2><p>The largest magnitude that enters each kind of linear. {legend}</p>"
        f'<div class="grid-of">{"".join(overview)}</div>'
        f"<h2>The inputs that stand out most</h2>{''.join(cards)}"
    )


def _kind(site: Mapping[str, Any]) -> str:
    found = site["outliers"]
    words = {
        "none": "No outliers",
        "channels": "Outlier channels",
        "first token": "A massive first token",
        "both": "A massive first token, and outlier channels",
    }[found["kind"]]
    return f"{words}: the largest channel reaches {number(found['ratio'])} times what the median one does, the first token {number(found['first_token'])} times the others"


def _errors(report: Mapping[str, Any], blocks: Sequence[str]) -> str:
    measured = [entry for entry in report["linears"] if entry["sqnr_db"] is not None]
    if not measured:
        return ""
    worst = sorted(measured, key=lambda entry: entry["sqnr_db"])[:10]
    top = max(entry["sqnr_db"] for entry in measured)
    rows = [(e["name"], top - e["sqnr_db"], f"{e['sqnr_db']:.1f} dB") for e in worst]
    table: dict[str, dict[int, float]] = {}
    for entry in measured:
        if entry["block"] is not None:
            table.setdefault(local(entry["name"], blocks), {})[entry["block"]] = entry["sqnr_db"]
    errors = [(i, block["error"]) for i, block in enumerate(report["blocks"]) if block["error"] is not None]
    figures = [
        charts.bars(
            rows, "The linears that lose most", "dB below the best linear", "Written at each bar: its SQNR.", "before"
        ),
        charts.matrix(table, len(blocks), "SQNR of every linear", "SQNR, dB: bright is noisy", "Black: not quantized."),
        charts.profile({"after": errors}, "Error of the output of each block", "relative error"),
    ]
    return (
        "<h2>What rounding costs, layer by layer</h2><p>SQNR is the power of a linear's output over that of its error, on "
        "the inputs that the quantized model before it produces: 20 dB is an error of 10 %, 40 dB of 1 %.</p>"
        f'<div class="grid-of">{"".join(figures)}</div>'
    )


def _sensitivity(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    worst = sorted(found["linears"], key=lambda e: -e["loss"])[:12]
    rows = [(e["name"], e["loss"], f"{e['loss']:+.4f}") for e in worst]
    blocks = [(i, max(b["loss"], 1e-6)) for i, b in enumerate(found["blocks"])]
    parts = [
        f"<h2>Sensitivity at {_text(found['scheme'])}</h2><p>What the {_text(found['metric'])} gains when one linear, or one "
        f"block, alone is rounded to nearest at this scheme. {_text(found['rows'])} rows, {_text(found['tokens'])} tokens.</p>",
        '<div class="grid-of">',
        charts.bars(rows, "The linears that cost most, alone", f"added {found['metric']}", colour="before"),
        charts.profile({"before": blocks}, "Each block alone", f"added {found['metric']}"),
        "</div>",
    ]
    if (advice := found.get("advice")) is not None:
        parts.append(f"<p>{_text(advice['text'])}</p><pre>{_text(json.dumps(advice['scheme'], indent=1))}</pre>")
    return "".join(parts)


def _plan(report: Mapping[str, Any]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in report["plan"]["excluded"].items():
        by_reason.setdefault(reason, []).append(name)
    excluded = "".join(
        f"<li>{_text(reason)}: <code>{_text(', '.join(names))}</code></li>" for reason, names in by_reason.items()
    )
    notes = "".join(f"<li>{_text(note)}</li>" for note in report["plan"]["notes"])
    rows = (
        (
            e["name"],
            f"{e['shape'][0]} × {e['shape'][1]}",
            e["status"],
            e["fold"] or e["reason"] or "–",
            f"{e['bits']:.2f}",
            "–" if e["sqnr_db"] is None else f"{e['sqnr_db']:.1f}",
        )
        for e in report["linears"]
    )
    return (
        f"<h2>Plan</h2>{f'<p>Left in float:</p><ul>{excluded}</ul>' if excluded else ''}"
        f"{f'<p>Notes:</p><ul>{notes}</ul>' if notes else ''}<details><summary>Every linear</summary>"
        + _table(("linear", "shape", "status", "absorbed by, or why not", "bits a weight", "SQNR, dB"), rows)
        + "</details>"
    )


def _provenance(report: Mapping[str, Any]) -> str:
    data, facts = report["data"], dict[str, Any]()
    facts["data"] = f"{data['source']}, {data['rows']} rows, {data['tokens']} tokens, sha256 {data['fingerprint']}"
    facts["seed"] = report["seed"]
    if report["kind"] == "quantize":
        facts["prefix tokens"] = report["prefix"] or "none"
        facts["format"] = report["format"] or "not written"
    facts["machine"] = report["machine"]
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    facts["model"] = f"{report['model']['class']}, {report['model']['parameters']} parameters"
    hashes = [*report["model"]["files"].items(), *report.get("sha256", {}).items()]
    stages = sorted(report["seconds"].items(), key=lambda item: -item[1])
    stages = [(name, value) for name, value in stages if name != "total" and value >= 0.005][:10]
    listed = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    return (
        f"<h2>How it was made</h2><pre>{_text(report['command'])}</pre><dl>{listed}</dl>"
        + charts.bars([(name, value, f"{value:.1f} s") for name, value in stages], "Where the time went", "seconds")
        + "<details><summary>Files and their sha256</summary>"
        + _table(("file", "sha256"), hashes)
        + f"</details><details><summary>Recipe</summary><pre>{_text(json.dumps(report.get('recipe', {}), indent=1))}</pre></details>"
        f'<p class="note">Written by calib {_text(report["versions"].get("calib", ""))}, {_text(report["created"])}. '
        "The same values are in report.json.</p>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: Any) -> str:
    return escape(str(value))


def _bytes(size: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 2**10:.0f} KiB"
