"""Perplexity with a key-value cache of few bits, float elsewhere, as it is and turned within each head.

    python -m experiments.accuracy.kv_cache [--windows 10]

SmolLM2-135M, windows of 512 tokens of WikiText-2's test text; ranges are dynamic, one a token and head, so nothing is
calibrated. Writes results-kv.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers

import calib
from calib.evaluate import perplexity
from calib.nn import AttentionFormat, attention_modules, route_attention
from calib.quantizers import AffineSpec
from model_zoo.sources import load_model

HERE = Path(__file__).parent
TEST = HERE.parents[2] / "shared/data/wikitext-2/test.txt"
BITS = (8, 6, 4, 3, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=10)
    args = parser.parse_args()
    model, tokenizer = load_model("smollm2-135m", progress=False)
    found = {"float": perplexity(model, tokenizer, TEST, windows=args.windows).value}
    route_attention(model)
    for bits in BITS:
        spec = AffineSpec(bits, symmetric=False, granularity="token", dynamic=True)
        for turned in (False, True):
            for module in attention_modules(model):
                module.calib_attention = AttentionFormat(cache=spec, turned=turned)  # type: ignore[assignment]
            name = f"{bits} bits{', turned' if turned else ''}"
            found[name] = perplexity(model, tokenizer, TEST, windows=args.windows).value
            print(f"{name}: {found[name]:.4f}", flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "calib": calib.__version__}
    about = {"model": "smollm2-135m", "windows": args.windows, "seq_len": 512, "versions": versions}
    (HERE / "results-kv.json").write_text(json.dumps({**about, "perplexity": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
