"""report.json: all that a reader is told of a run, as plain values. ``SCHEMA`` rises when a key changes its meaning."""

from __future__ import annotations

import datetime
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from calib.model import Plan

SCHEMA = 1
PICTURES, OF_A_KIND = 6, 2  # sites that are shown, and how many of one kind


def record(
    *,
    about: Mapping[str, Any],
    recipe: Mapping[str, Any],
    plan: Plan,
    report: Mapping[str, Any],
    pictures: Mapping[str, Any],
    seconds: Mapping[str, float],
    data: Mapping[str, Any],
    peak_rss_mib: float | None,
    versions: Mapping[str, str],
    disk_bytes: int | None = None,
    sha256: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The report of a finished run. report: what the engine found; about: of the model, from ``about_model``."""
    blocks = plan.block_names()
    block_of = {name: i for i, name in enumerate(blocks)}
    linears = [
        {
            "name": e.name,
            "block": block_of.get(_block(e.name, blocks)),
            "shape": list(e.shape),
            "status": e.status,
            "site": e.site,
            "fold": e.fold,
            "reason": e.reason,
            "bits": e.bits,
            "rank": e.rank,
            "sqnr_db": report.get("linears", {}).get(e.name),
        }
        for e in plan.entries.values()
    ]
    quantized = about["float_bytes"] - sum(
        e.shape[0] * e.shape[1] * (about["float_bits"] - e.bits) / 8
        for e in plan.entries.values()
        if e.status != "excluded"
    )
    speed = list(report.get("speed", {}).values())
    return clean(
        {
            **_head("quantize", about, data, seconds, versions),
            "scheme": recipe["scheme"]["name"],
            "methods": list(recipe["methods"]),
            "recipe": dict(recipe),
            "seed": recipe["seed"],
            "format": report.get("format"),
            "prefix": list(report.get("prefix", ())),
            "quality": report.get("quality"),
            "blocks": [{"name": name, "error": report["block_error"].get(name)} for name in blocks],
            "linears": linears,
            "sites": _sites(report["sites"], blocks),
            "pictures": {name: pictures[name] for name in chosen(report["sites"], blocks) if name in pictures},
            "size": {
                "float_bytes": about["float_bytes"],
                "quantized_bytes": round(quantized),
                "disk_bytes": disk_bytes,
            },
            "speed": {
                "float_seconds": sum(pair[0] for pair in speed) if speed else None,
                "quantized_seconds": sum(pair[1] for pair in speed) if speed else None,
                "threads": torch.get_num_threads(),
            },
            "peak_rss_mib": peak_rss_mib,
            "plan": plan.summary(),
            "auto": report.get("auto"),
            "verify": report.get("verify"),
            "sha256": dict(sha256 or {}),
        }
    )


def inspected(
    *,
    about: Mapping[str, Any],
    plan: Plan,
    sites: Mapping[str, Any],
    pictures: Mapping[str, Any],
    sensitivity: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
    data: Mapping[str, Any],
    seed: int,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The report of ``calib inspect``: of a float model; sites as in ``record``, without what quantizing adds."""
    blocks = plan.block_names()
    return clean(
        {
            **_head("inspect", about, data, seconds, versions),
            "seed": seed,
            "blocks": [{"name": name} for name in blocks],
            "sites": _sites(sites, blocks),
            "pictures": {name: pictures[name] for name in chosen(sites, blocks)},
            "sensitivity": sensitivity,
            "plan": plan.summary(),
        }
    )


def _head(
    kind: str,
    about: Mapping[str, Any],
    data: Mapping[str, Any],
    seconds: Mapping[str, float],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """What every report begins with."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "model": {key: about[key] for key in ("name", "class", "parameters", "files")},
        "data": dict(data),
        "seconds": dict(seconds),
        "versions": {**versions, "python": platform.python_version()},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _sites(sites: Mapping[str, Mapping[str, Any]], blocks: Sequence[str]) -> list[dict[str, Any]]:
    number = {name: i for i, name in enumerate(blocks)}
    return [{"name": name, "block": number.get(_block(name, blocks)), **site} for name, site in sites.items()]


def command() -> str:
    """The command that this process was started with."""
    program = Path(sys.argv[0]).name
    return shlex.join(["calib" if program == "__main__.py" else program, *sys.argv[1:]])


def chosen(sites: Mapping[str, Mapping[str, Any]], blocks: Sequence[str], most: int = PICTURES) -> list[str]:
    """The sites whose outliers tell most, at most two of a kind, the strongest first."""
    left: dict[str, int] = {}
    found = list[str]()
    for name in sorted(sites, key=lambda name: -strength(sites[name])):
        kind = local(name, blocks)
        if left.get(kind, 0) < OF_A_KIND and len(found) < most:
            left[kind] = left.get(kind, 0) + 1
            found.append(name)
    return found


def strength(site: Mapping[str, Any]) -> float:
    """How far the largest channel or first token stands out, as a ratio."""
    return max(site["outliers"]["ratio"], site["outliers"]["first_token"])


def local(name: str, blocks: Sequence[str]) -> str:
    """A site's or linear's name inside its block."""
    return name.removeprefix(_block(name, blocks) + ".")


def _block(name: str, blocks: Sequence[str]) -> str:
    """The block that a linear or site lies in; empty outside."""
    parts = name.split(".")
    known = set(blocks)
    return next((head for i in range(len(parts), 0, -1) if (head := ".".join(parts[:i])) in known), "")


def clean(value: Any) -> Any:
    """The same with null in the place of what JSON has no number for: an infinite threshold, an undefined ratio."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
