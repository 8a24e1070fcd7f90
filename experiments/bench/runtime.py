"""Sentences a second of a classifier: float torch, calib's kernels, its ONNX export, onnxruntime's own int8, others.

``calib quantize MODEL --scheme w8a8-static --method os+ --data TRAIN.tsv --out QUANTIZED`` and ``calib export QUANTIZED
--format onnx --out ONNX`` come first. Then ``python -m experiments.bench.runtime MODEL QUANTIZED ONNX`` times all on
the same sentences, in turns, CPU time of the process (of two threads: wall time), and compares their logits with
float's on the whole test file.
``--compressed DIR`` adds a checkpoint that plain transformers loads (``calib quantize MODEL --scheme w8a8 --method
smoothquant --format compressed-tensors --data TRAIN.tsv --out DIR``); torchao's own int8 runs where it is installed.
All shapes have been seen before anything is timed. Where 8-bit weights run in floats, for want of VNNI, two rows have
weights of 7 bits, which run as integers.
onnxruntime's static quantization sees as many sentences of the training file as calib saw. Loading and memory: a fresh
process each, after all imports, that loads the files and answers once for 32 sentences.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from transformers import AutoModelForSequenceClassification

import calib
from calib.data import batch_rows, encode_rows, read_labelled
from calib.export.checkpoint import versions
from calib.export.load import load_pair
from calib.export.onnx import traced
from calib.nn import Replay, kernels
from experiments.bench.generate import narrowed
from experiments.machine import machine

Batch = dict[str, torch.Tensor]
Runner = Callable[[Batch], np.ndarray]
CALIBRATION, TIMED, ROUNDS, SEEN = 128, 48, 3, 3
SIZES = (1, 8, 32)
HERE = Path(__file__).parent
CHILD = """
import json, sys, time, numpy, onnxruntime, torch, calib
from transformers import BertForSequenceClassification
from calib.evaluate import peak_rss_mib
from experiments.bench.runtime import loaded
what, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(threads)
before, start = peak_rss_mib(), time.process_time()
run = loaded(what, path, threads)
took = time.process_time() - start
ids = torch.randint(1000, 2000, (32, 32))
run({"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)})
print(json.dumps([took, peak_rss_mib() - before]))
"""


def torch_runner(model: Any) -> Runner:
    def run(batch: Batch) -> np.ndarray:
        with torch.inference_mode():
            return model(**batch).logits.float().numpy()

    return run


def onnx_runner(file: Path, threads: int) -> Runner:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda batch: session.run(None, {name: batch[name].numpy() for name in names})[0]


def loaded(what: str, path: str, threads: int) -> Runner:
    """The files of a row of the table, ready to run."""
    if "onnxruntime" in what:
        return onnx_runner(Path(path), threads)
    if what.startswith("calib"):
        model = calib.load(path)
        model = narrowed(model, 7) if "7 bits" in what else model
        return torch_runner(Replay(model) if "repeated" in what else model)
    dtype = torch.bfloat16 if "bf16" in what else torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype).eval()
    if what.startswith("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch_runner(Replay(model) if "repeated" in what else model)


def footprint(what: str, path: Path, threads: int) -> dict[str, float]:
    """MiB of weights on disk, CPU seconds to load them, MiB above the imports at most."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, what, str(path), str(threads)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, mib = json.loads(said.splitlines()[-1])
    files = list(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {"MiB on disk": sum(f.stat().st_size for f in files) / 2**20, "load, s": seconds, "peak, MiB": mib}


class Reader(CalibrationDataReader):
    """Calibration batches for onnxruntime's own static quantization."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {k: batch[k].numpy() for k in ("input_ids", "attention_mask")}


def rivals(given: argparse.Namespace, model: Any, calibration: list[Batch], work: Path) -> dict[str, Path]:
    """The rows of the table and their files."""
    plain = traced(model).model_proto
    for node in plain.graph.node:  # as torch exports it: the Sums are ours
        node.op_type = "Add" if node.op_type == "Sum" else node.op_type
    del plain.graph.value_info[:]  # its shapes contradict what onnxruntime.quantization infers
    onnx.save(plain, work / "float.onnx")
    linears = {"op_types_to_quantize": ["MatMul", "Gemm"], "extra_options": {"MatMulConstBOnly": True}}  # as ours
    common = {"weight_type": QuantType.QInt8, "per_channel": True, **linears}
    quantize_dynamic(work / "float.onnx", work / "dynamic.onnx", **common)
    quantize_static(
        work / "float.onnx",
        work / "static.onnx",
        Reader(iter(calibration)),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        **common,
    )
    others = {} if given.compressed is None else {"compressed-tensors in transformers": given.compressed}
    if kernels._refused("qlinear", 127) and not kernels._refused("qlinear", 63):
        others |= {"calib packed, 7 bits": given.quantized, "calib packed, 7 bits, repeated": given.quantized}
    if importlib.util.find_spec("torchao") is not None:
        others["torchao int8 dynamic, eager"] = given.model
    return {
        "torch fp32": given.model,
        "torch fp32, repeated": given.model,
        "torch bf16": given.model,
        "calib packed": given.quantized,
        "calib packed, repeated": given.quantized,
        "calib in onnxruntime": given.onnx / "model.onnx",
        "onnxruntime fp32": work / "float.onnx",
        "onnxruntime int8 dynamic": work / "dynamic.onnx",
        "onnxruntime int8 static QDQ": work / "static.onnx",
        **others,
    }


def seconds_of(found: dict[str, Runner], batches: list[Batch], threads: int) -> dict[str, float]:
    """Median over rounds of the seconds that a pass over the batches takes; the runners in turns."""
    clock = time.process_time if threads == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(ROUNDS + SEEN):
        for name, run in found.items():
            start = clock()
            for batch in batches:
                run(batch)
            if turn >= SEEN:  # those before warm up
                taken[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2"))
    parser.add_argument("--compressed", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="regular expression of rows; torch fp32 is always there")
    parser.add_argument(
        "--sentences", type=int, default=TIMED, help="timed at batch 1; of larger batches twice as many"
    )
    parser.add_argument("--tests", type=int, help="first test sentences for logits; default: all")
    parser.add_argument("--out", type=Path, default=HERE / "results-runtime.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.disable(logging.WARNING)  # onnxruntime.quantization advises at the root logger
    model, tokenizer = load_pair(given.model, dtype=torch.float32)
    sentences, labels = read_labelled(given.data / "test.tsv")
    rows = encode_rows(tokenizer, sentences, 512)
    first = encode_rows(tokenizer, read_labelled(given.data / "train.tsv")[0][:CALIBRATION], 512)
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        files = rivals(given, model, list(batch_rows(first, tokenizer, 8)), Path(scratch))
        files = {name: path for name, path in files.items() if name == "torch fp32" or re.search(given.only, name)}
        feet = {name: footprint(name, path, given.threads) for name, path in files.items()}
        found = {name: loaded(name, str(path), given.threads) for name, path in files.items()}
        for size in SIZES:
            batches = list(batch_rows(rows[: given.sentences * (1 if size == 1 else 2)], tokenizer, size))
            count = sum(len(batch["input_ids"]) for batch in batches)
            taken = seconds_of(found, batches, given.threads)
            for name, seconds in taken.items():
                row = table.setdefault(name, {})
                row[f"sentences/s, batch {size}"] = count / seconds
                row[f"x torch fp32, batch {size}"] = taken["torch fp32"] / seconds
        tests = list(batch_rows(rows[: given.tests], tokenizer, 32))
        logits = {name: np.concatenate([run(batch) for batch in tests]) for name, run in found.items()}
    truth = np.array(labels[: given.tests])
    for name, values in logits.items():
        table[name]["logits MSE"] = float(np.square(values - logits["torch fp32"]).mean())
        table[name]["accuracy"] = float((values.argmax(1) == truth).mean())
        table[name] |= feet[name]
    columns = table["torch fp32"]
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")
    about: dict[str, Any] = {"tests": len(truth), "sentences": given.sentences}
    about |= {"versions": {**versions(), "onnxruntime": onnxruntime.__version__}, "machine": machine()}
    given.out.write_text(json.dumps({**about, "rows": table}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
