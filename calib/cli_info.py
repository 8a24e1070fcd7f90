"""``calib info``: what this machine and this installation have."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from calib.recipe import METHODS, SCHEMES


def info() -> dict[str, Any]:
    """Versions, threads, devices, kernels, cache, and what is known by name."""
    from calib.export.checkpoint import versions
    from calib.nn.kernels import describe
    from model_zoo import WHEELS
    from model_zoo.cache import cache_dir
    from model_zoo.entry import names

    return {
        "versions": {**versions(), "python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "devices": [
            "cpu",
            *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())),
        ],
        "kernels": describe(),
        "cache": str(cache_dir()),
        "models": {name: known.label for name, known in WHEELS.items()},
        "zoo": names(),
        "schemes": list(SCHEMES),
        "methods": list(METHODS),
    }


def text(facts: dict[str, Any]) -> str:
    """On the terminal."""
    lines: list[str] = []
    for title, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{title}:", *(f"  {name}: {each}" for name, each in value.items())]
        else:
            lines.append(f"{title}: {', '.join(value) if isinstance(value, list) else value}")
    return "\n".join(lines)
