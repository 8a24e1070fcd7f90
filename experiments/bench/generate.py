"""A decoder's own speed: prefill, decoding token by token, memory, and whether kernels write what fake-quant writes.

    calib quantize smollm2-135m --scheme w8a8-static --method os+ --out out/smollm2-w8a8
    python -m experiments.bench.generate smollm2-135m out/smollm2-w8a8 [--json experiments/bench/results-generate.json]

Float in fp32 and bf16, the packed checkpoint, ``--compressed DIR`` (a checkpoint that plain transformers loads) and
torchao's int8, where it is installed. Each runs in processes of its own, ``--launches`` of them in turns, for where a
process's memory lies can double a time; the best of each counts, in CPU time (of two threads: wall time), and the
smallest peak. ``decode``: forwards of one token; ``generate``: tokens of ``model.generate``, or in rows named
*repeated* of ``calib.nn.Replay(model).generate``, which repeats recorded steps. Memory is held against a process that
imports everything. ``agreement``: greedy tokens of the packed model and of the
model in fake arithmetic, by position; ``logits``: the largest difference over the logits' range. Both on prompts of the
test text. ``--bits 7`` rounds 8-bit weights to 7 bits for them: without VNNI the integer kernels take no more.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

import calib
from calib.evaluate import peak_rss_mib
from calib.evaluate.generation import continuations
from calib.export.hf import set_mode
from calib.export.load import load_pair
from calib.nn import QuantLinear, Replay
from experiments.machine import machine
from model_zoo.sources import load_model

PREFILLS, DECODED, ROUNDS = (128, 512), 24, 4
TEXT = Path("../shared/data/wikitext-2/test.txt")
REPEATED = ", repeated"
CHILD = "import sys; from experiments.bench.generate import child; child(*sys.argv[1:])"


def child(what: str, path: str, threads: str) -> None:
    """Prints peak MiB of loading and generating (of imports alone without a path), CPU seconds to load, and speeds."""
    torch.set_num_threads(int(threads))
    found = {}
    if path:
        start = time.process_time()
        model = loaded(what.removesuffix(REPEATED), path)
        found["load"] = time.process_time() - start
        run = functools.partial((Replay(model) if what.endswith(REPEATED) else model).generate, do_sample=False)
        run(torch.ones(1, 64, dtype=torch.long), max_new_tokens=32, min_new_tokens=32)
    found["peak"] = peak_rss_mib()
    if path:
        clock = time.process_time if threads == "1" else time.perf_counter
        ids = torch.arange(5, 5 + max(PREFILLS)).view(1, -1)
        generate(run, ids, clock)  # what is to be repeated is recorded
        found["generate"] = min(generate(run, ids, clock) for _ in range(ROUNDS))
        if not what.endswith(REPEATED):
            with torch.no_grad():
                for length in PREFILLS:
                    times = [prefill(model, ids[:, :length], clock) for _ in range(ROUNDS)]
                    found[f"prefill {length}"] = min(times) / length
                found["decode"] = min(decode(model, ids, clock) for _ in range(ROUNDS))
    print(json.dumps(found))


def loaded(what: str, path: str) -> Any:
    """The model of a row of the table."""
    if what == "packed":
        return calib.load(path)
    if what == "compressed-tensors in transformers":
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model = load_model(path, progress=False, dtype=torch.bfloat16 if what == "bf16" else torch.float32)[0]
    if what.startswith("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def prefill(model: Any, ids: torch.Tensor, clock: Callable[[], float]) -> float:
    start = clock()
    model(input_ids=ids, logits_to_keep=1, use_cache=True)
    return clock() - start


def decode(model: Any, ids: torch.Tensor, clock: Callable[[], float]) -> float:
    """Seconds a token, behind 64 tokens."""
    cache = model(input_ids=ids[:, :64], logits_to_keep=1, use_cache=True).past_key_values
    start = clock()
    for i in range(DECODED):
        cache = model(input_ids=ids[:, 64 + i : 65 + i], past_key_values=cache, use_cache=True).past_key_values
    return (clock() - start) / DECODED


class Stopwatch(BaseStreamer):
    """When tokens came; the prompt comes first, then the token that it took with it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.times = clock, []  # type: ignore[var-annotated]

    def put(self, value: torch.Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        pass


def generate(run: Callable[..., Any], ids: torch.Tensor, clock: Callable[[], float]) -> float:
    """Seconds a token, behind 64 tokens and the first."""
    watch, count = Stopwatch(clock), {"max_new_tokens": 1 + DECODED, "min_new_tokens": 1 + DECODED}
    run(ids[:, :64], attention_mask=torch.ones_like(ids[:, :64]), streamer=watch, **count)
    return (watch.times[-1] - watch.times[1]) / DECODED


def measured(folders: dict[str, str], threads: int, launches: int) -> dict[str, dict[str, float]]:
    """Of each the best of several processes."""
    best: dict[str, dict[str, float]] = {name: {} for name in folders}
    for _ in range(launches):
        for name, path in folders.items():
            command = [sys.executable, "-W", "ignore", "-c", CHILD, name, path, str(threads)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for key, value in json.loads(said.splitlines()[-1]).items():
                best[name][key] = min(best[name].get(key, value), value)
    return best


def narrowed(model: Any, bits: int) -> Any:
    """The model with its quantized weights rounded to ``bits`` bits, packed."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            spec = module.weight_spec.with_(bits=bits)
            new = QuantLinear.from_float(module.dequantize(), module.bias, spec, module.input).set_mode("packed")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
    return model


def difference(packed: Any, fake: Any, ids: torch.Tensor) -> float:
    a, b = packed(input_ids=ids).logits, fake(input_ids=ids).logits
    return float((a - b).abs().max() / (b.max() - b.min()))


@torch.no_grad()  # as generate() runs
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("quantized")
    parser.add_argument("--compressed", type=Path)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_model(options.model, progress=False)[1]
    folders = {"fp32": options.model, "bf16": options.model, "packed": options.quantized}
    if options.compressed is not None:
        folders["compressed-tensors in transformers"] = str(options.compressed)
    if importlib.util.find_spec("torchao") is not None:
        folders["torchao int8 dynamic, eager"] = options.model
    folders |= {name + REPEATED: folders[name] for name in ("fp32", "bf16", "packed")}
    ids = tokenizer(TEXT.read_text(encoding="utf-8")[:20000], return_tensors="pt")["input_ids"]
    best = measured({"imports": "", **folders}, options.threads, options.launches)
    baseline, rows = best["imports"]["peak"], {}
    for name, path in folders.items():
        row = rows[name] = {}
        for key in (*(f"prefill {length}" for length in PREFILLS), "decode", "generate"):
            if key in best[name]:
                row[f"{key}, tokens/s"] = round(1 / best[name][key], 2)
                row[f"{key} x fp32"] = round(best["fp32"][key] / best[name][key], 2)
        used = best[name]["peak"]
        row |= {"load, CPU s": round(best[name]["load"], 2), "peak, MiB above the imports": round(used - baseline, 1)}
        if Path(path).is_dir():
            size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) / 2**20
            row |= {"MiB on disk": round(size, 1), "peak over file and imports": round(used / (size + baseline), 3)}
    packed, fake = loaded("packed", options.quantized), load_pair(options.quantized, "fake")[0]
    if options.bits < 8:
        packed, fake = narrowed(packed, options.bits), set_mode(narrowed(fake, options.bits), "fake")
    written = continuations(packed, tokenizer, TEXT, options.prompts, 64, options.tokens)
    other = continuations(fake, tokenizer, TEXT, options.prompts, 64, options.tokens)
    alike = (written.tokens == other.tokens).double()
    kernels = collections.Counter(m.kernel.kernel_name for m in packed.modules() if isinstance(m, QuantLinear))
    found = {
        "rows": rows,
        "clock": "CPU" if options.threads == 1 else "wall",
        "launches": options.launches,
        "imports, MiB": baseline,
        "agreement": {
            "weight bits": options.bits,
            "kernels": kernels,
            "prompts": options.prompts,
            "tokens each": options.tokens,
            "equal positions": float(alike.mean()),
            "before the first difference": float(alike.cumprod(1).mean()),
        },
        "logits_difference_over_range": difference(packed, fake, ids[:, :128]),
    }
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
