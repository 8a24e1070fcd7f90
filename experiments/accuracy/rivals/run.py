"""Rivals on the same model, calibration windows and measure, each in a virtual environment of its own.

    python -m experiments.accuracy.rivals.run [--only 'w4a16, auto-round'] [--seed 0] [--environments DIR]
    python -m experiments.accuracy.rivals.run --show

The float model and the token windows (32 x 512 of WikiText-2's validation text drawn by the seed, 40 x 512 of its test
text) are written once; an arm reads them, quantizes in memory and prints one JSON line. Finished cells are kept in
results.json and skipped; a rival that refuses or fails leaves its last line as the cell.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from calib.data import calibration_data
from model_zoo.sources import load_model

HERE = Path(__file__).parent
FILE = HERE / "results.json"
WIKITEXT = HERE.parents[3] / "shared/data/wikitext-2"
TORCH = "torch==2.13.0"
RIVALS = {  # script, what pip installs beside torch
    "llm-compressor": ("llmcompressor_arm.py", ["llmcompressor==0.14.0.1"]),
    "auto-round": ("auto_round_arm.py", ["auto-round==0.16.1"]),
    "torchao": ("torchao_arm.py", ["torchao==0.18.0", "transformers==5.23.0"]),
}
ACTIVATIONS = ("w8a8-static", "w8a8", "w6a6-static", "w6a6", "w4a8-static", "w4a4-static", "w4a4")
CELLS = [
    *[("llm-compressor", scheme, arm) for scheme in ACTIVATIONS for arm in ("rtn", "smoothquant")],
    *[("llm-compressor", scheme, arm) for scheme in ("w4a16", "w3a16") for arm in ("rtn", "gptq")],
    *[("auto-round", scheme, "50 iterations") for scheme in ("w4a16", "w3a16")],
    *[("torchao", scheme, "rtn") for scheme in ("w8a8", "w4a16", "w3a16")],
]


def prepare(folder: Path, seed: int) -> None:
    model, tokenizer = load_model("smollm2-135m", progress=False)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    drawn = calibration_data(WIKITEXT / "valid.txt", tokenizer, 32, 512, seed, pack=True, batch_size=32)
    text = (WIKITEXT / "test.txt").read_text(encoding="utf-8")
    test = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: 40 * 512]).view(40, 512)
    save_file({"calibration": drawn[0]["input_ids"].contiguous(), "test": test}, folder / "data.safetensors")


def environment(folder: Path, packages: list[str]) -> Path:
    """The Python of a virtual environment that has the packages; made where it is missing."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "ready"
    if not done.exists():
        venv.create(folder, with_pip=True)
        for some in ([TORCH], [TORCH, *packages, "datasets", "accelerate"]):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *some], check=True)
        done.write_text("\n".join(packages))
    return python


def cell(python: Path, script: str, folder: Path, scheme: str, arm: str, threads: int) -> dict[str, Any]:
    command = [str(python), "-W", "ignore", str(HERE / script), str(folder), scheme, arm, str(threads)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**clean, **offline})
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        return {"failed": lines[-1][:300] if lines else f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines()[::-1] if line.startswith("{")))
    return found


def stored() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {"cells": {}}


def show() -> None:
    for key, found in stored()["cells"].items():
        value = found.get("failed") or f"{found['perplexity']:.4g} ({found['cpu_seconds']:.0f} CPU s)"
        print(f"{key:50s} {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="beginnings of 'scheme, rival, arm', separated by ;")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--environments", type=Path, default=Path("~/.cache/calib/rivals").expanduser())
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    if args.show:
        return show()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for rival, scheme, arm in CELLS:
            key = f"{scheme}, {rival}, {arm}, seed {args.seed}"
            asked = not args.only or any(key.startswith(part.strip()) for part in args.only.split(";"))
            if not asked or key in stored()["cells"]:
                continue
            if not (folder / "model").exists():
                prepare(folder, args.seed)
            script, packages = RIVALS[rival]
            print(f"{key} ...", file=sys.stderr, flush=True)
            found = cell(environment(args.environments / rival, packages), script, folder, scheme, arm, args.threads)
            results = stored()
            results["cells"][key] = {**found, "threads": args.threads}
            FILE.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{key}: {found.get('failed') or found['perplexity']}", flush=True)
    return None


if __name__ == "__main__":
    main()
