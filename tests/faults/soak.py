"""Run calib for a long time in one process and watch what grows.

``python -m tests.faults.soak --minutes 10`` quantizes, saves, loads, runs and throws away, over and over; ``--cycles
10000`` only quantizes and dequantizes a weight and an activation. Either prints resident memory, open files and threads
at the start and the end, and the slope of memory a cycle: a least-squares line through the second half of the run, with
the 95 % interval of its slope; and, with glibc, by how much what malloc has handed out differs between the middle and
the end: resident memory alone also counts the holes between its pieces, and garbage until its collection. An answer
that differs from the first of its kind ends the run.

A soak of four hours is the same command with ``--minutes 240``; it keeps one core busy.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from scipy import stats
from torch import Tensor

import calib
from calib.nn import ActivationQuantizer, QuantLinear
from calib.quantizers import AffineSpec
from tests.families import batches, build

SETTINGS = (
    ("llama", "w8a8-static", "os+"),
    ("opt", "w4a8", "rotate,os+,gptq"),
    ("bert", "w8a8", "smoothquant"),
    ("mixtral", "w4a16", "awq"),
    ("gpt2", "w6a6-static", "os+"),
)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Mallinfo(ctypes.Structure):
    """glibc's mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks"),
            *("fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def handed_out() -> int | None:
    """Bytes that malloc has given and not got back, after Python's own collection; None without glibc 2.33."""
    gc.collect()
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return None
    ask.restype = _Mallinfo
    found = ask()
    return int(found.uordblks + found.hblkhd)


def handles() -> tuple[int, int]:
    """Open files and threads."""
    files, threads = (len(list(Path("/proc/self", name).iterdir())) for name in ("fd", "task"))
    return files, threads


def digest(*tensors: Tensor) -> bytes:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.digest()


def round_trip(i: int) -> tuple[int, bytes]:
    """A weight and an activation quantized, packed, run and decoded."""
    generator = torch.Generator().manual_seed(i % 8)
    weight = torch.randn(48, 64, generator=generator)
    spec = AffineSpec(4 if i % 2 else 8, symmetric=True, granularity="channel")
    inputs = ActivationQuantizer(AffineSpec(8, symmetric=False, granularity="token", dynamic=True), 64)
    module = QuantLinear.from_float(weight, None, spec, inputs).set_mode("packed")
    return i % 8, digest(module.dequantize(), module(torch.randn(4, 64, generator=generator)))


def whole_job(i: int) -> tuple[int, bytes]:
    """A tiny model quantized, saved, loaded and run."""
    which = i % len(SETTINGS)
    family, scheme, method = SETTINGS[which]
    folder = Path(tempfile.mkdtemp())
    try:
        options = {"scheme_options": {"weight_group": 16}} if scheme == "w4a16" else {}
        data = batches(family)
        result = calib.quantize(
            build(family), scheme, method, data, prefix="none", progress=False, report=False, **options
        )
        result.save(folder / "out", verified=False)
        with torch.no_grad():
            return which, digest(calib.load(folder / "out")(**data[0])[0])
    finally:
        shutil.rmtree(folder)


def soak(job: Callable[[int], tuple[int, bytes]], cycles: int | None, seconds: float | None) -> str:
    """Repeat a job; the lines that say what grew. AssertionError where an answer changed."""
    answers: dict[int, bytes] = {}
    memory = array("q", bytes(8 << 20))  # a list of a million numbers would be what grows
    started, i = time.monotonic(), 0
    first = handles()
    middle: tuple[int, int | None] = (0, None)
    while (cycles is None or i < cycles) and (seconds is None or time.monotonic() - started < seconds):
        key, answer = job(i)
        assert answers.setdefault(key, answer) == answer, f"cycle {i} gave another answer than the first of its kind"
        memory[i] = resident()
        i += 1
        if i == 16:  # libraries are warm
            gc.collect()
            first = handles()
        passed = i / cycles if cycles else (time.monotonic() - started) / (seconds or 1)
        if middle[0] == 0 and passed >= 0.5:
            middle = i, handed_out()
    last, held = handles(), handed_out()  # before scipy's own first use
    half = memory[i // 2 : i]
    line = stats.linregress(range(len(half)), half)
    error = line.stderr if len(set(half)) > 1 else 0.0  # scipy's is nan where nothing changed
    interval = float(stats.t.ppf(0.975, len(half) - 2)) * error
    kept = "not known"
    if held is not None and middle[1] is not None:
        kept = f"{(held - middle[1]) / max(1, i - middle[0]):.1f} bytes a cycle"
    return "\n".join(
        [
            f"{i} cycles in {time.monotonic() - started:.0f} s, every answer the first one's",
            f"memory {memory[0] / 2**20:.1f} MiB at first, {memory[i // 2] / 2**20:.1f} half way, "
            f"{memory[i - 1] / 2**20:.1f} at the end",
            f"slope of the second half: {line.slope:.1f} +- {interval:.1f} bytes a cycle",
            f"handed out by malloc and kept, second half: {kept}",
            f"open files {first[0]} then {last[0]}, threads {first[1]} then {last[1]}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--minutes", type=float, help="of whole jobs")
    what.add_argument("--cycles", type=int, help="of quantizing and dequantizing")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    if given.cycles:
        print(soak(round_trip, given.cycles, None))
    else:
        print(soak(whole_job, None, 60 * given.minutes))


if __name__ == "__main__":
    main()
