"""An entry built and measured: the checkpoint, and beside it ``zoo.json``, from which cards are made.

What is compared: the float model, round to nearest at about equal size, and the entry's recipe, each on the entry's
test; with several seeds, the spread that the draw of the calibration data alone gives.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib.errors import InputError
from model_zoo.entry import Entry

FIGURES = "zoo.json"
SCHEMA = 1
SLACK = 0.02  # of a figure: what other machines' rounding may add to the seeds' spread
SQUARES = {"classification": "logits_mse", "similarity": "cosine_mse"}


def build(
    entry: Entry,
    out: Path,
    *,
    model: str | None = None,
    data: str | None = None,
    test: str | None = None,
    seeds: int = 1,
    measure: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Quantize as the entry says, write the verified checkpoint to ``out``, measure it; what ``zoo.json`` then holds.

    model, data, test: in the place of the entry's, and noted. seeds: the checkpoint is of the entry's seed, further
    ones are only measured. Raises what calib.quantize raises.
    """
    import calib
    from calib.export.checkpoint import versions
    from calib.export.files import check_out, placed
    from calib.files import sha256

    check_out(out, overwrite=overwrite)  # before the float model is measured
    source, text = entry.resolve_model(model, progress=progress), entry.resolve_data(data)
    judge = Judge(entry, entry.resolve_test(test), source, progress) if measure else None
    common: dict[str, Any] = {"progress": progress, "scheme_options": dict(entry.scheme_options)}
    options = {**common, **entry.options, "seed": entry.seed}
    result = calib.quantize(source, entry.scheme, entry.method, text, out, overwrite=overwrite, **options)
    report = result.report_json()
    figures: dict[str, Any] = {
        "schema": SCHEMA,
        "name": entry.name,
        "recipe": entry.fingerprint(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "changed": {key: Path(v).name for key, v in (("model", model), ("data", data), ("test", test)) if v},
        "calibration": {**report["data"], "source": entry.data if data is None else Path(data).name},
        "format": json.loads((out / "calib.json").read_text(encoding="utf-8"))["format"],
        "prefix": report["prefix"],
        "bits": _bits(result),
        "size": report["size"],
        "seconds": {key: round(value, 1) for key, value in result.seconds.items()},
        "speed": report["speed"],
        "peak_rss_mib": result.peak_rss_mib,
        "plan": {key: report["plan"][key] for key in ("quantized", "transformed")},
        "verify": report["verify"],
        "versions": {**versions(), "python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "sha256": {file.name: sha256(file) for file in sorted(out.glob("*.safetensors"))},
    }
    if judge is not None:
        network = calib.load(out, mode=judge.mode)
        values = [judge(network, result.tokenizer)]
        for seed in range(entry.seed + 1, entry.seed + seeds):
            other = calib.quantize(source, entry.scheme, entry.method, text, report=False, **{**options, "seed": seed})
            values.append(judge(other.model, other.tokenizer))
        plain = {k: v for k, v in entry.options.items() if k in ("samples", "seq_len", "batch_size")}
        base = entry.baseline or entry.scheme
        common |= {"scheme_options": {}} if entry.baseline else {}
        near = calib.quantize(source, base, "rtn", text, prefix="none", report=False, **{**common, **plain})
        figures |= {
            "test": {**(entry.test.model_dump() if entry.test else {}), "n": judge.n},
            "float": judge.float_values,
            "rtn": {"scheme": base, "bits": _bits(near), **judge(near.model, near.tokenizer)},
            "built": {"seeds": list(range(entry.seed, entry.seed + seeds)), "values": values},
        }
        figures["reproduced"] = None if figures["changed"] else reproduced(entry, figures)
    with placed(out / FIGURES) as file:
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


class Judge:
    """The entry's test: the float model's values, and those of any other, next to it."""

    def __init__(self, entry: Entry, data: str, source: str, progress: bool) -> None:
        from calib.evaluate import classification, perplexity, similarity
        from calib.export.load import load_pair

        assert entry.test is not None
        self.test, self.data, self.progress = entry.test, data, progress
        self.tasks: dict[str, Any] = {"classification": classification, "similarity": similarity}
        self.perplexity = perplexity
        # weight-only kernels are made for a few rows; the same grids in floats give the same numbers sooner
        self.mode: Any = "packed" if entry.formats().inputs is not None else "fake"
        self.outputs: torch.Tensor | None = None
        self.n = 0
        self.float_values = self(*load_pair(source, progress=progress))

    def __call__(self, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
        """The metric with its 95 % interval, and the outputs' mean squared distance from float's."""
        from calib.export.hf import set_mode

        set_mode(model, self.mode)
        if self.test.task == "perplexity":
            shape = {"windows": self.test.windows, "seq_len": self.test.seq_len}
            found = self.perplexity(model, tokenizer, self.data, progress=self.progress, **shape)
        else:
            found = self.tasks[self.test.task](model, tokenizer, self.data, progress=self.progress)
        self.n = found.n
        values: dict[str, Any] = {found.metric: found.value, "ci95": found.ci95}
        outputs: torch.Tensor | None = found.outputs
        if self.test.task in SQUARES and outputs is not None:
            if self.outputs is None:
                self.outputs = outputs
            values[SQUARES[self.test.task]] = float((outputs - self.outputs).double().square().mean())
        return values


def reproduced(entry: Entry, figures: dict[str, Any]) -> dict[str, Any] | None:
    """Each of the build's values beside the committed card's spread; None where there is no card of this recipe."""
    card = entry.figures
    if card is None or card["recipe"] != entry.fingerprint():
        return None
    found: dict[str, Any] = {}
    for metric in metrics(figures["built"]["values"][0]):
        known = [values[metric] for values in card["built"]["values"]]
        low, high = spread(known)
        value = figures["built"]["values"][0][metric]
        found[metric] = {"built": value, "card": known[0], "spread": [low, high], "within": low <= value <= high}
    return {**found, "within": all(each["within"] for each in found.values())}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Where a repeated build may land: three standard deviations of the seeds around their mean, and at least SLACK."""
    mean = statistics.fmean(values)
    around = max(3 * statistics.stdev(values) if len(values) > 1 else 0.0, SLACK * abs(mean))
    return mean - around, mean + around


def metrics(values: dict[str, Any]) -> list[str]:
    """The names of what was measured, the task's own metric first."""
    return [key for key in values if key not in ("ci95", "scheme", "bits")]


def figures_of(folder: Path, entry: Entry) -> dict[str, Any]:
    """zoo.json of a folder that ``build`` wrote. Raises InputError for another folder or another entry's."""
    file = folder / FIGURES
    if not file.is_file():
        raise InputError(f"{folder} was not written by calib zoo build", f"calib zoo build {entry.name} --out DIR")
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        name, recipe = found["name"], found["recipe"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is damaged", f"build it again: calib zoo build {entry.name} --out DIR") from error
    if name != entry.name:
        raise InputError(f"{folder} holds a build of {name}, not of {entry.name}", "name its own entry")
    if recipe != entry.fingerprint():
        raise InputError(f"{folder} was built by another recipe of {entry.name}", "build it again")
    return found


def _bits(result: Any) -> float:
    """Mean bits of a weight over the quantized linears, scales included."""
    parts = [e for e in result.plan.entries.values() if e.status != "excluded"]
    weights = sum(e.shape[0] * e.shape[1] for e in parts)
    return round(sum(e.bits * e.shape[0] * e.shape[1] for e in parts) / weights, 3) if weights else 0.0
