"""What every rival's arm shares: the inputs that were prepared, the measure, and the JSON line it ends with.

Plain torch and transformers: it runs in each rival's environment.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Quantize = Callable[[Any, Any, torch.Tensor, str, str], Any]


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean next-token loss over windows [n, T]."""
    total = 0.0
    for row in windows:
        logits = model(input_ids=row[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def main(package: str, quantize: Quantize) -> None:
    """arm.py FOLDER SCHEME ARM THREADS"""
    folder, scheme, arm, threads = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    data = load_file(folder / "data.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    start = time.process_time()
    model = quantize(model, tokenizer, data["calibration"], scheme, arm)
    seconds = time.process_time() - start
    found = {"perplexity": perplexity(model, data["test"]), "cpu_seconds": round(seconds, 1)}
    versions = {name: version(name) for name in (package, "torch", "transformers")}
    print("\n" + json.dumps({**found, "versions": versions}))
