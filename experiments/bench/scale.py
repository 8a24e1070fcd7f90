"""What calibrating a 70B and a 405B model costs on 1, 8 and 64 GPUs: a prediction of calib's cost model.

    python -m experiments.bench.scale [--json OUT] [--samples 512] [--seq-len 2048] [--tflops 400] ...

No weights and no GPU are needed: shapes come from configs, speeds from the options. Prints the table of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from calib.errors import InputError
from calib.model.cost import Cost, estimate, refuse
from calib.model.machine import Machine
from calib.recipe import recipe, scheme

GIB = 2**30
COMMON = {"vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8, "dtype": "bfloat16"}
MODELS = {
    "70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **COMMON
    ),
    "405B": LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, **COMMON
    ),
}
RUNS: dict[str, tuple[str, str, tuple[str, ...] | None]] = {  # scheme, method, left in float
    "W8A8 static, os+": ("w8a8-static", "os+", None),
    "W4A16, gptq": ("w4a16", "gptq", None),
    "W4A16, gptq, but down_proj": ("w4a16", "gptq", ("down_proj",)),
}
GPUS = (1, 8, 64)
COLUMNS = ("model", "run", "GPUs", "time", "of it shared out", "not shared out", "memory a GPU", "output", "disk")
SHARED = ("observe", "propagate", "spill")


def machine(options: argparse.Namespace) -> Machine:
    """One GPU and its share of a node."""
    return Machine(
        name=options.name,
        gemm=options.tflops * 1e3,
        packed=options.tflops * 1e3,
        attention=options.tflops * 1e3 / 2,
        copy=options.memory_tb * 1e3,
        pointwise=options.memory_tb * 1e3,
        read=options.disk_gb,
        write=options.disk_gb,
        sha=1.5,
        call=10e-6,
        network=options.network_gb,
        baseline=2 * GIB,
    )


def row(cost: Cost, model: str, run: str, room: float) -> dict[str, Any]:
    shared = sum(seconds for name, seconds in cost.seconds.items() if name in SHARED)
    times = [_minutes(s) for s in (cost.total_seconds, shared, cost.total_seconds - shared)]
    try:
        refuse(cost, int(room * GIB))
        fits = ""
    except InputError:
        times, fits = ["-"] * 3, ": does not fit"
    memory = f"{(cost.fixed_bytes + cost.kept_bytes) / GIB:.0f} GiB{fits}"
    sizes = [f"{size / 1e9:.0f} GB" for size in (cost.output_bytes, cost.disk_bytes)]
    return dict(zip(COLUMNS, (model, run, cost.world, *times, memory, *sizes), strict=True))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--name", default="H100, 80 GB")
    parser.add_argument("--tflops", type=float, default=400.0, help="sustained bf16")
    parser.add_argument("--memory-tb", type=float, default=3.0, help="TB/s of GPU memory")
    parser.add_argument("--gpu-gib", type=float, default=79.0, help="memory of a GPU")
    parser.add_argument("--disk-gb", type=float, default=2.0, help="GB/s that the processes of a node read together")
    parser.add_argument("--network-gb", type=float, default=25.0, help="GB/s a GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gpu = machine(options)
    rows, costs = [], []
    for model, config in MODELS.items():
        for run, (name, method, left) in RUNS.items():
            asked = recipe(
                scheme(name, exclude=left),
                method,
                samples=options.samples,
                seq_len=options.seq_len,
                batch_size=options.batch_size,
            )
            for world in GPUS:
                room = int(options.gpu_gib * GIB)  # hidden states stay on the GPU as far as they find room there
                cost = estimate(config, asked, dtype=torch.bfloat16, machine=gpu, world=world, max_memory=room)
                rows.append(row(cost, model, run, options.gpu_gib))
                costs.append({"size": model, "run": run, **cost.as_dict()})
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for each in rows:
        print("| " + " | ".join(str(each[column]) for column in COLUMNS) + " |")
    print("\nminutes by stage:")
    for each in costs:
        stages = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in each["seconds"].items() if seconds >= 6)
        print(f"- {each['size']}, {each['run']}, {each['world']}: {stages}")
    if options.json is not None:
        settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
        answer = {"prediction": True, "settings": settings, "machine": asdict(gpu), "runs": costs}
        options.json.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
