"""Throughput and memory of choosing calibration data from a large pool, synthesised on the spot.

    python -m experiments.bench.select 1000:2 128:1        # megabytes:processes

One document in ten is made of the target's sentences, so that purity is known. Memory is the proportional set size
(shared pages counted once) of the command and its processes together, and the sum of their resident sizes.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from calib.data import builtin_documents

RESULTS = Path(__file__).with_name("results-select.json")
DOCUMENT = 2000  # characters, about
THEME = ("thread", "process", "socket", "async", "signal", "subprocess")


def sentences() -> tuple[list[str], list[str]]:
    """Sentences of Python's documentation about concurrency and networks, and the others."""
    found = [" ".join(s.split()) for text in builtin_documents() for s in text.replace("\n\n", ". ").split(". ")]
    found = [s + "." for s in found if 40 < len(s) < 400]
    theme = [s for s in found if any(word in s.lower() for word in THEME)]
    return theme, sorted(set(found) - set(theme))


def document(pool: list[str], draw: random.Random) -> str:
    text, held = [f"Note {draw.getrandbits(40)}."], 0
    while held < DOCUMENT:
        text.append(draw.choice(pool))
        held += len(text[-1])
    return " ".join(text)


def write_pool(file: Path, megabytes: int) -> int:
    draw, (theme, rest) = random.Random(0), sentences()
    written = 0
    with file.open("w", encoding="utf-8") as stream:
        while written < megabytes * 1_000_000:
            of_target = draw.random() < 0.1
            row = {"text": document(theme if of_target else rest, draw), "label": "theme" if of_target else "rest"}
            written += stream.write(json.dumps(row) + "\n")
    return file.stat().st_size


def memory(process: psutil.Process) -> tuple[int, int]:
    """(proportional, resident) bytes of a process and its children."""
    proportional = resident = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            info = each.memory_full_info()
        except psutil.Error:
            continue
        proportional, resident = proportional + info.pss, resident + info.rss
    return proportional, resident


def cpu_seconds() -> float:
    """Of all processes that this one has waited for, theirs included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(folder: Path, megabytes: int, processes: int) -> dict[str, Any]:
    size = write_pool(folder / "pool.jsonl", megabytes)
    draw, (theme, _) = random.Random(1), sentences()
    target = "".join(json.dumps({"text": document(theme, draw)}) + "\n" for _ in range(200))
    (folder / "target.jsonl").write_text(target, encoding="utf-8")
    command = [sys.executable, "-m", "calib", "data", "select", "--quiet", "--json"]
    command += ["--pool", str(folder / "pool.jsonl"), "--target", str(folder / "target.jsonl")]
    command += ["--tokenizer", "smollm2-135m", "--uniform", "0", "--processes", str(processes)]
    command += ["--out", str(folder / "chosen.jsonl")]
    start, used = time.perf_counter(), cpu_seconds()
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    )
    watched, peaks = psutil.Process(run.pid), (0, 0)
    while run.poll() is None:
        try:
            now = memory(watched)
        except psutil.Error:
            break
        peaks = max(peaks[0], now[0]), max(peaks[1], now[1])
        time.sleep(1)
    report = json.loads(run.communicate()[0].splitlines()[-1])
    wall = time.perf_counter() - start
    label = next(share for name, share in report["labels"].items() if name.endswith("theme"))
    return {
        "megabytes": size / 1e6,
        "processes": processes,
        "cores": len(os.sched_getaffinity(0)),
        "wall_seconds": round(wall, 1),
        "megabytes_a_second": round(size / 1e6 / wall, 2),
        "cpu_seconds": round(cpu_seconds() - used, 1),  # the figure that other work on the machine leaves alone
        "select_seconds": report["seconds"],
        "peak_pss_mib": round(peaks[0] / 2**20),
        "peak_rss_sum_mib": round(peaks[1] / 2**20),
        "pieces": report["pool"]["pieces"],
        "effective_sample_size": report["effective_sample_size"],
        "purity": label["importance"],
        "base_rate": label["pool"],
    }


def main() -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in sys.argv[1:] or ["1000:2", "128:1"]:
        megabytes, processes = map(int, case.split(":"))
        with tempfile.TemporaryDirectory() as folder:
            results[case] = measure(Path(folder), megabytes, processes)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(case, json.dumps(results[case]), flush=True)


if __name__ == "__main__":
    main()
