"""What a result ran on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from calib.nn import kernels

FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm")


def cpuinfo() -> dict[str, str]:
    """The first processor's fields; none where there is no /proc."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.exists() else []
    return {key.strip(): value.strip() for key, value in (line.split(":", 1) for line in lines if ":" in line)}


def processor() -> str:
    """Its name and the instructions that integer kernels ask for."""
    fields = cpuinfo()
    have = set(fields.get("flags", fields.get("Features", "")).split())
    name = fields.get("model name", platform.processor() or platform.machine())
    return ", ".join([name, *(flag for flag in FLAGS if flag in have)])


def machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": kernels.describe(),
    }
