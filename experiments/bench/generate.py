"""A decoder's own speed: prefill, decoding token by token, memory, and whether kernels write what fake-quant writes.

    calib quantize smollm2-135m --scheme w8a8-static --method os+ --out out/smollm2-w8a8
    python -m experiments.bench.generate smollm2-135m out/smollm2-w8a8 [--json experiments/bench/results-generate.json]

Float in fp32 and bf16 and the packed checkpoint take turns in one process, the best of each counts; wall time. Memory:
a process of its own loads the checkpoint and generates, less one that imports everything. ``forced`` is the share of
the packed model's own greedy tokens that are the first choice of the model in fake arithmetic given the same text,
``logits`` the largest difference over the logits' range, both on prompts of the test text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import calib
from calib.evaluate.generation import agreement, continuations
from calib.export.load import load_pair
from experiments.bench.kernels import machine
from model_zoo.sources import load_model

PREFILL, DECODED, ROUNDS = 512, 24, 4
TEXT = Path("../shared/data/wikitext-2/test.txt")
CHILD = """
import json, sys, torch, calib
from calib.evaluate import peak_rss_mib
from transformers import LlamaForCausalLM
torch.set_num_threads(int(sys.argv[2]))
if sys.argv[1]:
    model = calib.load(sys.argv[1])
    model.generate(torch.ones(1, 64, dtype=torch.long), max_new_tokens=32, min_new_tokens=32, do_sample=False)
print(json.dumps(peak_rss_mib()))
"""


def prefill(model: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, logits_to_keep=1, use_cache=True)
    return time.perf_counter() - start


def decode(model: Any, ids: torch.Tensor) -> float:
    """Seconds a token, behind 64 tokens."""
    cache = model(input_ids=ids[:, :64], logits_to_keep=1, use_cache=True).past_key_values
    start = time.perf_counter()
    for i in range(DECODED):
        cache = model(input_ids=ids[:, 64 + i : 65 + i], past_key_values=cache, use_cache=True).past_key_values
    return (time.perf_counter() - start) / DECODED


def fastest(models: dict[str, Any], ids: torch.Tensor, run: Callable[[Any, torch.Tensor], float]) -> dict[str, float]:
    best = dict.fromkeys(models, float("inf"))
    for _ in range(ROUNDS + 1):
        for name, model in models.items():
            best[name] = min(best[name], run(model, ids))
    return best


def peak(folder: str, threads: int) -> float:
    command = [sys.executable, "-W", "ignore", "-c", CHILD, folder, str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def difference(packed: Any, fake: Any, ids: torch.Tensor) -> float:
    a, b = packed(input_ids=ids).logits, fake(input_ids=ids).logits
    return float((a - b).abs().max() / (b.max() - b.min()))


@torch.no_grad()  # as generate() runs
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("quantized")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plain, tokenizer = load_model(options.model, progress=False)
    packed, fake = calib.load(options.quantized), load_pair(options.quantized, "fake")[0]
    ids = tokenizer(TEXT.read_text(encoding="utf-8")[:20000], return_tensors="pt")["input_ids"][:, :PREFILL]
    bf16 = load_model(options.model, progress=False)[0].to(torch.bfloat16)
    models = {"fp32": plain, "bf16": bf16, "packed": packed}
    first, each = fastest(models, ids, prefill), fastest(models, ids, decode)
    rows = {
        name: {
            "prefill tokens/s": round(PREFILL / first[name], 1),
            "decode tokens/s": round(1 / each[name], 2),
            "prefill x fp32": round(first["fp32"] / first[name], 2),
            "decode x fp32": round(each["fp32"] / each[name], 2),
        }
        for name in models
    }
    size = sum(file.stat().st_size for file in Path(options.quantized).glob("*.safetensors")) / 2**20
    baseline = peak("", options.threads)
    used = peak(options.quantized, options.threads)
    written = continuations(packed, tokenizer, TEXT, options.prompts, 64, options.tokens)
    forced = agreement(fake, written)
    found = {
        "rows": rows,
        "file_mib": round(size, 1),
        "baseline_mib": baseline,
        "peak_mib": used,
        "peak_over_file_and_baseline": round(used / (size + baseline), 3),
        "agreement": {"share_before_first_difference": round(forced.value, 4), **forced.detail},
        "logits_difference_over_range": difference(packed, fake, ids[:, :128]),
    }
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
