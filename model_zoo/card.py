"""Cards: Markdown and pictures made from a build's ``zoo.json`` and ``report.json``, never typed."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from calib.errors import InputError
from model_zoo.build import figures_of, metrics
from model_zoo.entry import UNMEASURED, Entry

NAMES = {"logits_mse": "squared error of the logits", "cosine_mse": "squared error of the cosines"}


def write(entry: Entry, built: Path, folder: Path) -> list[Path]:
    """The card of a build: NAME.md, NAME.json and its pictures in ``folder``."""
    from calib.export.files import placed

    figures = figures_of(built, entry)
    if "built" not in figures:
        raise InputError(f"{built} was built without measuring", f"calib zoo build {entry.name} --out DIR")
    with _whole(built):
        drawn = pictures(built)
    files = {f"{entry.name}-{kind}.svg": svg for kind, (svg, _) in drawn.items()}
    figures["pictures"] = {f"{entry.name}-{kind}.svg": text for kind, (_, text) in drawn.items()}
    files[f"{entry.name}.json"] = json.dumps(figures, indent=1) + "\n"
    files[f"{entry.name}.md"] = markdown(entry, figures, built)
    for name, text in files.items():
        with placed(folder / name) as file:
            file.write_text(text, encoding="utf-8")
    return [folder / name for name in files]


@contextlib.contextmanager
def _whole(built: Path | None) -> Iterator[None]:
    """What a folder's figures lack is the folder's fault; where they are the committed card's, it is ours."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration, RecursionError) as error:
        if built is None:
            raise
        raise InputError(f"what {built} says of its build is damaged", "build it again") from error


def markdown(entry: Entry, figures: Mapping[str, Any] | None, built: Path | None = None) -> str:
    """The card; without figures, what there is to say before anything was measured."""
    method = ", ".join(f"`{part}`" for part in entry.method.split(","))
    head = [
        f"# {entry.name}",
        f"{entry.model} in `{entry.scheme}` by {method}{_learned(entry)}.",
        f"Source: {entry.source}. Licence of the weights: {entry.licence}.",
    ]
    head += [entry.note] if entry.note else []
    if figures is None:
        return "\n\n".join([*head, f"**{UNMEASURED}**", _how(entry, None)]) + "\n"
    with _whole(built):
        return "\n\n".join([*head, *_measured(figures), _how(entry, figures), _provenance(figures)]) + "\n"


def _measured(figures: Mapping[str, Any]) -> list[str]:
    test, values, rtn = figures["test"], figures["built"]["values"], figures["rtn"]
    where = f"{Path(test['data']).parent.name}/{Path(test['data']).name}"
    windows = f"{test['windows']} windows x {test['seq_len']} tokens"
    shape = windows if test["task"] == "perplexity" else f"{test['n']} rows"
    known = metrics(values[0])
    rows = [
        ["", "bits a weight", *(NAMES.get(metric, metric) for metric in known)],
        ["---"] * (2 + len(known)),
        ["float", "32", *(_value(figures["float"], metric) for metric in known)],
        [f"round to nearest, `{rtn['scheme']}`", f"{rtn['bits']:g}", *(_value(rtn, metric) for metric in known)],
        ["**this recipe**", f"{figures['bits']:g}", *(_spread([v[m] for v in values]) for m in known)],
    ]
    seeds = figures["built"]["seeds"]
    size, seconds = figures["size"], figures["seconds"]
    interval = values[0]["ci95"]
    busy = "load not known" if figures["load"] is None else f"load average {figures['load']:g}"
    note = f"Test: {where}, {shape}. "
    note += f"95 % interval of this recipe's first column: {interval[0]:.4g} to {interval[1]:.4g}. " if interval else ""
    if len(seeds) > 1:
        note += f"Mean ± standard deviation over {len(seeds)} draws of the calibration data."
    else:
        note += "One draw of the calibration data, so no spread."
    facts = [
        f"- Size: {_mib(size['float_bytes'])} in float, {_mib(size['disk_bytes'] or size['quantized_bytes'])} on disk, "
        f"format `{figures['format']}`; embeddings and what else is no quantized linear stay float.",
        f"- Calibration: {figures['calibration']['tokens']} tokens of {figures['calibration']['source']}; "
        f"{seconds['total']:.0f} s in all on {figures['machine']}, {busy}, "
        f"{figures['peak_rss_mib']:.0f} MiB of memory at most.",
        f"- {figures['plan']['quantized']} linears quantized, {figures['plan']['transformed']} of them transformed"
        + (f"; behind prefix tokens {figures['prefix']}." if figures["prefix"] else "."),
    ]
    speed = figures["speed"]
    if speed["float_seconds"] and speed["quantized_seconds"]:
        facts.append(
            f"- Speed: all blocks on one calibration batch, float {speed['float_seconds']:.3g} s, integer kernels "
            f"{speed['quantized_seconds']:.3g} s, {speed['threads']} thread(s), one timing each."
        )
    if figures["verify"] is not None:
        difference = f"{figures['verify']['max_difference']:.1e}"
        facts.append(f"- Verified: a fresh process answers within {difference} of the logit range.")
    drawn = [f"![{text}]({name})\n\n{text}" for name, text in figures.get("pictures", {}).items()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return ["## Measured", table, note, "\n".join(facts), *(["## The outliers", *drawn] if drawn else [])]


def _how(entry: Entry, figures: Mapping[str, Any] | None) -> str:
    folder = f"out/{entry.name}"
    measure = "" if entry.test else " --no-measure"
    stock = figures is not None and figures["format"] == "compressed-tensors"
    after = "`transformers` loads" if stock else "After `import calib`, `AutoModel*.from_pretrained` loads"
    return (
        f"## Load it\n\n```sh\ncalib zoo build {entry.name} --out {folder}{measure}\n```\n\n"
        f'```python\nimport calib\n\nmodel = calib.load("{folder}")  # packed weights\n'
        f'tokenizer = calib.load_tokenizer("{folder}")\n```\n\n{after} the folder too.'
    )


def _provenance(figures: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    changed = "".join(f" {key}: {value}, not the entry's." for key, value in figures["changed"].items())
    return (
        f"Made by `calib zoo card` from a build of {figures['created'][:10]} with {versions}; recipe "
        f"`{figures['recipe']}`.{changed}"
    )


def pictures(built: Path) -> dict[str, tuple[str, str]]:
    """Drawings of the site with the strongest outliers, as files of their own: kind to (SVG, caption)."""
    from calib.report import JSON
    from calib.report.charts import loss_curve, maps, ranges

    file = built / JSON
    if not file.is_file():
        raise InputError(f"{built} has no {JSON}", "build it again")
    report = json.loads(file.read_text(encoding="utf-8"))
    if not report["pictures"]:
        return {}
    name, picture = next(iter(report["pictures"].items()))
    found = {
        "ranges": (ranges(picture), f"Range of each channel at the input of {name}, before and after."),
        "map": (maps(picture), f"Magnitude by channel and token at the input of {name}, before and after."),
    }
    site = next((s for s in sorted(report["sites"], key=lambda s: -s["absmax_before"]) if loss_curve(s)), None)
    if site is not None:
        found["loss"] = (loss_curve(site), f"Search of the threshold at the input of {site['name']}.")
    return {kind: (standalone(figure), text) for kind, (figure, text) in found.items()}


def standalone(figure: str) -> str:
    """The drawing of a report's figure as an SVG file with its own colours."""
    from calib.report.style import STYLE

    found = re.search(r"<svg (.*?)>(.*)</svg>", figure, re.DOTALL)
    assert found is not None
    theme = STYLE[: STYLE.index("* { box")] + STYLE[STYLE.index("svg text") : STYLE.index("i.before")]
    theme += "svg { background: var(--card); font-family: system-ui, sans-serif }"
    space = 'xmlns="http://www.w3.org/2000/svg"'
    return f"<svg {space} {found[1]}><style>{theme}</style>{found[2]}</svg>\n"


def _value(values: Mapping[str, Any], metric: str) -> str:
    value = values[metric]
    return "0" if value == 0 else f"{value:.4g}"


def _spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"**{mean:.4g}**"
    return f"**{mean:.4g}** ± {statistics.stdev(values):.2g}"


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _learned(entry: Entry) -> str:
    steps = entry.options.get("refine")
    return f", rounding and clipping learned in {steps} steps a block" if steps else ""
