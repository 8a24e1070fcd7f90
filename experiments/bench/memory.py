"""Peak memory of a run against the size of the model.

    python -m experiments.bench.memory [--json experiments/bench/results-memory.json] [--large-gb 4]

smollm2-135m, and a LLaMA of eight layers and about ``--large-gb`` gigabytes of fp32 that is made on the spot from
random numbers, run under a hard limit (RLIMIT_DATA: every private page, of the process that verifies as well). Each
run is a process of its own that reports its peak resident size; the baseline is one that imports everything.
``allowed`` is two blocks, the activation budget (hidden states kept, statistics, and one batch or one search inside a
block, as ``calib plan`` counts them) and 200 MiB. The large model is quantized once more wholly in memory: the same
bits.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import calib
from experiments.machine import machine

MIB = 2**20
WIDTH, LAYERS, VOCABULARY, SLACK = 4096, 8, 4096, 200
CHILD = """
import json, resource, sys
import torch
import calib
from calib.evaluate import peak_rss_mib
from transformers import LlamaForCausalLM

options, limit, threads = map(json.loads, sys.argv[1:])
torch.set_num_threads(threads)
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
seconds = {}
if options:
    vocabulary = options.pop("vocabulary", None)
    if vocabulary:
        generator = torch.Generator().manual_seed(0)
        shape = (options["samples"], 1, options["seq_len"])
        ids = torch.randint(0, vocabulary, shape, generator=generator)
        options["data"] = [{"input_ids": row} for row in ids]
    seconds = calib.quantize(progress=False, **options).seconds
print(json.dumps({"peak_mib": peak_rss_mib(), "seconds": seconds}))
"""


def child(options: dict[str, Any], limit: int = 0) -> dict[str, Any]:
    """Peak and stage times of one run in a process of its own; no options: of the imports alone."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps(options), str(limit), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_llama(folder: Path, gigabytes: float) -> None:
    """Random weights, one shard a layer, never more than one in memory."""
    attention = 4 * WIDTH * WIDTH
    inner = int((gigabytes * 1e9 / 4 / LAYERS - attention) / (3 * WIDTH)) // 64 * 64
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=inner,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        use_cache=True,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5)

    weight_map: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    for i in range(LAYERS):
        shapes = {f"self_attn.{p}_proj": (WIDTH, WIDTH) for p in "qkvo"}
        shapes |= {"mlp.gate_proj": (inner, WIDTH), "mlp.up_proj": (inner, WIDTH), "mlp.down_proj": (WIDTH, inner)}
        tensors = {f"model.layers.{i}.{path}.weight": normal(*shape) for path, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=generator)
        write(f"model-{i:02d}.safetensors", tensors)
    rest = {"model.embed_tokens.weight": normal(VOCABULARY, WIDTH), "lm_head.weight": normal(VOCABULARY, WIDTH)}
    write("model-rest.safetensors", {**rest, "model.norm.weight": torch.ones(WIDTH)})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def measure(model: str, options: dict[str, Any], baseline: float, limit: int = 0) -> dict[str, Any]:
    """One streamed run against what ``calib plan`` allows it."""
    shape = {key: options[key] for key in ("samples", "seq_len", "batch_size")}
    cost = calib.cost(model, method="os+", progress=False, **shape)
    activations = (cost.working_bytes + cost.kept_bytes) / MIB
    found = child({"model": model, "method": "os+", "overwrite": True, **options}, limit)
    block = cost.block_bytes / MIB
    return {
        "model": Path(model).name,
        **shape,
        "source_mib": round(cost.source_bytes / MIB),
        "block_mib": round(block, 1),
        "activations_mib": round(activations),
        "baseline_mib": round(baseline),
        "peak_mib": round(found["peak_mib"]),
        "above_baseline_mib": round(found["peak_mib"] - baseline),
        "allowed_mib": round(2 * block + activations + SLACK),
        "predicted_mib": round(cost.peak_bytes / MIB),
        "limit_mib": round(limit / MIB),
        "seconds": found["seconds"].get("total"),
    }


def small(data: str | None, folder: Path, baseline: float) -> dict[str, Any]:
    shape = {"samples": 32, "seq_len": 512, "batch_size": 4}
    return measure("smollm2-135m", {**shape, "data": data, "out": str(folder / "small")}, baseline)


def large(gigabytes: float, limit: float, folder: Path, baseline: float) -> dict[str, Any]:
    """The streamed run under the limit, and the same in memory: the same bits?"""
    make_llama(folder / "large", gigabytes)
    run = {"samples": 8, "seq_len": 128, "batch_size": 4}
    streamed = {**run, "vocabulary": VOCABULARY, "out": str(folder / "streamed")}
    row = measure(str(folder / "large"), streamed, baseline, int(limit * 1e9))
    data = [{"input_ids": ids} for ids in _ids(run)]
    whole = calib.quantize(str(folder / "large"), method="os+", data=data, progress=False, **run)
    whole.save(folder / "whole", verified=False)
    a, b = tensors(folder / "streamed"), tensors(folder / "whole")
    same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return {**row, "same_bits": same, "whole_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("small", "large"), help="keep what the JSON file has of the other")
    parser.add_argument("--large-gb", type=float, default=4.0)
    parser.add_argument("--limit-gb", type=float, default=2.5)
    parser.add_argument("--data", default="../shared/data/wikitext-2/valid.txt")
    parser.add_argument("--folder", type=Path, help="for the large model and its results; default: a temporary one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kept = options.json is not None and options.json.exists()
    report: dict[str, Any] = json.loads(options.json.read_text()) if kept else {}
    report["machine"] = machine()
    baseline = child({})["peak_mib"]
    with tempfile.TemporaryDirectory(dir=options.folder) as text:
        if options.only != "large":
            report["small"] = small(options.data if Path(options.data).exists() else None, Path(text), baseline)
        if options.only != "small":
            report["large"] = large(options.large_gb, options.limit_gb, Path(text), baseline)
    for name in ("small", "large"):
        print(name, ", ".join(f"{key} {value}" for key, value in report.get(name, {}).items()))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _ids(run: dict[str, int]) -> torch.Tensor:
    """The child's."""
    shape = (run["samples"], 1, run["seq_len"])
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
