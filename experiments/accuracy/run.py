"""Accuracy of every scheme and method on real models: the table behind ``method="auto"``.

    python -m experiments.accuracy.run smollm2 [--only 'w4a16;w8a8-static, auto'] [--seed 1] [--all]
    python -m experiments.accuracy.run minilm-sst2
    python -m experiments.accuracy.run minilm-stsb
    python -m experiments.accuracy.run table            # every committed figure, seeds side by side
    python -m experiments.accuracy.run figure           # accuracy.png: each method's loss over float, by scheme

A cell is one model, scheme, method and seed. Finished cells are kept in results-<model>.json and skipped; --all adds
the ablations. Calibration: 32 x 512 tokens of WikiText-2's validation text (the seed draws them), 64 of SmolLM2's auto,
128 training sentences of SST-2 and STS-B; test splits only judge, and what was chosen between was chosen on other
data. Weight-only schemes are symmetric in groups of 64.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import calib
from calib.evaluate import classification, peak_rss_mib, perplexity, similarity
from calib.export.hf import set_mode
from calib.recipe import FOLDS
from model_zoo.sources import load_model

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared"
WIKITEXT, SST2, STSB = SHARED / "data/wikitext-2", SHARED / "data/sst2", SHARED / "data/stsb"
SST2_MODEL = SHARED / "models/minilm-l6-sst2"


@dataclass(frozen=True)
class Arm:
    """A method with its options; ``more``: an ablation, run with --all only; turned: of
    ``calib.rotate``'s model, which learns for as many steps.
    """

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    more: bool = False
    turned: int | None = None


PLAIN: dict[str, Any] = {"prefix": "none", "sites": FOLDS}  # as published: folds only, no prefix
TAPPED: dict[str, Any] = {**PLAIN, "sites": (*FOLDS, "fused")}  # behind a post-norm a tap takes the fold's place
ON: dict[str, Any] = {"prefix": "on"}
MORE = {"samples": 64}  # static ranges and learned rounding gain from more data; half of calib's own default
LEARNED: dict[str, Any] = {**ON, "refine": 40, "batch_size": 2}  # rounding and clipping, by each block's output
WEIGHT_ONLY = [
    Arm("rtn, min-max", "rtn", {**PLAIN, "scheme_options": {"weight_range": "minmax"}}),
    Arm("rtn", "rtn", PLAIN),
    Arm("awq", "awq", PLAIN),
    Arm("gptq", "gptq", PLAIN),
    Arm("gptq, prefix", "gptq", ON, more=True),
    Arm("gptaq, prefix", "gptaq", ON, more=True),
    Arm("rotate,gptq, prefix", "rotate,gptq", ON, more=True),
    Arm("gptq, prefix, learned", "gptq", LEARNED),
    Arm("rotate,gptq, prefix, learned", "rotate,gptq", LEARNED),
    Arm("auto", "auto"),
]
BOTH = [
    Arm("rtn", "rtn", PLAIN),
    Arm("smoothquant 0.5", "smoothquant:0.5", PLAIN, more=True),
    Arm("smoothquant 0.8", "smoothquant:0.8", PLAIN),
    Arm("awq", "awq", PLAIN, more=True),
    Arm("os+", "os+", PLAIN),
    Arm("os+, shift only", "os+", {**PLAIN, "scale": False}, more=True),
    Arm("os+, scale only", "os+", {**PLAIN, "shift": False}, more=True),
    Arm("os+, norms only", "os+", {**PLAIN, "sites": ("norm",)}, more=True),
    Arm("os+, linear objective", "os+", {**PLAIN, "objective": "output"}, more=True),
    Arm("os+, fused", "os+", TAPPED, more=True),
    Arm("os+, prefix", "os+", ON, more=True),
    Arm("hadamard,os+, prefix", "hadamard,os+", ON),
    Arm("rotate,os+, prefix", "rotate,os+", ON),
    Arm("hadamard,os+, prefix, 64 windows", "hadamard,os+", {**ON, **MORE}, more=True),
    Arm("auto", "auto"),
]
ROUNDED = [
    Arm("hadamard,os+,gptq, prefix", "hadamard,os+,gptq", ON),
    Arm("rotate,os+,gptq, prefix", "rotate,os+,gptq", ON),
    Arm("rotate,os+,gptaq, prefix", "rotate,os+,gptaq", ON, more=True),
    Arm("hadamard,os+,gptq, prefix, learned", "hadamard,os+,gptq", LEARNED, more=True),
    Arm("rotate,os+,gptq, prefix, learned", "rotate,os+,gptq", LEARNED),
    Arm("rotate,os+,gptq, prefix, learned, 64 windows", "rotate,os+,gptq", {**LEARNED, **MORE}, more=True),
]
SAMPLES = [Arm(f"os+, {n} samples", "os+", {**PLAIN, "samples": n}, more=True) for n in (1, 4, 16, 128)]
STOCK = {"format": "compressed-tensors"}  # what plain transformers load
EXACT = Arm("os+, exact folds", "os+", PLAIN)  # of a post-norm encoder: where no tap is needed


def arms(scheme: str, encoder: bool) -> list[Arm]:
    if scheme.endswith("a16"):
        return WEIGHT_ONLY
    found = [*BOTH[:-1], *(SAMPLES if scheme.startswith(("w8", "fp8")) else ROUNDED), BOTH[-1]]
    if not encoder:
        method = "os+" if scheme.startswith(("w8", "fp8")) else "os+,gptq"
        stock = Arm(f"{method}, stock", method, STOCK, more=True)
        turned = [("turned", 0), ("learned turn", 100)]
        return [*found, stock, *(replace(stock, name=f"{how}, {stock.name}", turned=n) for how, n in turned)]
    found = [replace(arm, options=arm.options | TAPPED) if arm.options.get("sites") == FOLDS else arm for arm in found]
    return [EXACT if arm.name == "os+, fused" else arm for arm in found]


SCHEMES = ("w8a8-static", "w8a8", "w6a6-static", "w6a6", "w4a8-static", "w4a8", "w4a4-static", "w4a4", "w4a16", "w3a16")
FLOATS = ("fp8-static", "fp8")


def smollm2(result: calib.Result | None) -> dict[str, Any]:
    """Test perplexity; of None, the float model's."""
    if result is None:
        model, tokenizer = load_model("smollm2-135m", progress=False)
        return {"perplexity": perplexity(model, tokenizer, WIKITEXT / "test.txt", windows=40).value}
    found = perplexity(result.model, result.tokenizer, WIKITEXT / "test.txt", windows=40)
    return {"perplexity": found.value, "ci95": found.ci95, "prefix": result.report["prefix"]}


FLOAT_LOGITS: dict[str, torch.Tensor] = {}


def float_logits() -> dict[str, Any]:
    """The SST-2 classifier's accuracy; its logits, once, go to FLOAT_LOGITS."""
    model, tokenizer = load_model(SST2_MODEL, progress=False)
    found = classification(model, tokenizer, SST2 / "test.tsv")
    FLOAT_LOGITS["logits"] = found.outputs
    return {"accuracy": found.value}


def minilm_sst2(result: calib.Result | None) -> dict[str, Any]:
    """Logits' mean squared error against float, and accuracy."""
    if result is None:
        return float_logits()
    if not FLOAT_LOGITS:
        float_logits()
    found = classification(result.model, result.tokenizer, SST2 / "test.tsv")
    error = float((found.outputs - FLOAT_LOGITS["logits"]).square().mean())
    return {"logits_mse": error, "accuracy": found.value}


def minilm_stsb(result: calib.Result | None) -> dict[str, Any]:
    """Spearman correlation."""
    if result is None:
        model, tokenizer = load_model("minilm-l6", progress=False)
        return {"spearman": similarity(model, tokenizer, STSB / "sts-test.tsv").value}
    return {"spearman": similarity(result.model, result.tokenizer, STSB / "sts-test.tsv").value}


@dataclass(frozen=True)
class Driver:
    model: str | Path
    data: Path
    settings: dict[str, Any]
    measure: Callable[[calib.Result | None], dict[str, Any]]
    key: str
    auto: dict[str, Any] = field(default_factory=dict)  # settings of method auto, where they are others
    encoder: bool = True


DRIVERS = {
    "smollm2": Driver(
        "smollm2-135m", WIKITEXT / "valid.txt", {"samples": 32, "seq_len": 512}, smollm2, "perplexity", MORE, False
    ),
    "minilm-sst2": Driver(SST2_MODEL, SST2 / "train.tsv", {"samples": 128}, minilm_sst2, "logits_mse"),
    "minilm-stsb": Driver("minilm-l6", STSB / "sts-train.tsv", {"samples": 128}, minilm_stsb, "spearman"),
}


def cell(driver: Driver, scheme: str, arm: Arm, seed: int) -> dict[str, Any]:
    """Quantize in memory, on the data of the seed, and judge on test."""
    data = {**driver.settings, **(driver.auto if arm.method == "auto" else {})}
    options = {**data, "seed": seed, "progress": False, **arm.options}
    formats = {**({"weight_bits": 3} if scheme == "w3a16" else {}), **options.pop("scheme_options", {})}
    start = time.process_time()
    preset = "w4a16" if scheme == "w3a16" else scheme  # an affine grid of 3 bits: what the rivals have
    model: Any = driver.model
    if arm.turned is not None:
        text = {"data": driver.data, "learn": arm.turned} if arm.turned else {}
        made = calib.rotate(model, seed=seed, progress=False, **text)
        model, options["tokenizer"] = made.model, made.tokenizer
    result = calib.quantize(model, preset, arm.method, driver.data, scheme_options=formats, **options)
    cpu = time.process_time() - start
    set_mode(result.model, "fake" if scheme.endswith("a16") else "packed")
    bits = [e.bits for e in result.plan.entries.values() if e.status != "excluded"]
    return {
        **driver.measure(result),
        "method": ",".join(result.recipe.methods),
        "bits": round(sum(bits) / len(bits), 3),
        "cpu_seconds": round(cpu, 1),
        "seconds": {k: round(v, 1) for k, v in result.seconds.items()},
        "peak_rss_mib": peak_rss_mib(),
        **({"trials": result.report["auto"]} if "auto" in result.report else {}),
    }


def stored(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {"cells": {}}


def run(name: str, args: argparse.Namespace) -> None:
    driver, file = DRIVERS[name], HERE / f"results-{name}.json"
    about = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "calib": calib.__version__},
    }
    wanted = [
        (scheme, arm)
        for scheme in (*SCHEMES, *FLOATS)
        for arm in arms(scheme, driver.encoder)
        if args.all or not arm.more
    ]
    for scheme, arm in [("float", None), *wanted]:
        label = "float" if arm is None else f"{scheme}, {arm.name}, seed {args.seed}"
        asked = not args.only or label == "float" or any(label.startswith(part) for part in args.only.split(";"))
        if not asked or label in stored(file)["cells"]:
            continue
        found = driver.measure(None) if arm is None else cell(driver, scheme, arm, args.seed)
        found |= {} if arm is None else {"scheme": scheme, "arm": arm.name, "seed": args.seed}
        results = stored(file)  # read anew: two runs may fill one table
        results["cells"][label] = {**found, **about}
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: {label}: {driver.key} {found.get(driver.key, found.get('accuracy', 0)):.5g}", flush=True)


def rows(name: str) -> list[tuple[str, str, list[float], float]]:
    """(scheme, arm, the seeds' values, mean CPU seconds) in the order of the grid."""
    key = DRIVERS[name].key
    cells = [c for c in stored(HERE / f"results-{name}.json")["cells"].values() if "scheme" in c]
    out = []
    for scheme in (*SCHEMES, *FLOATS):
        for arm in arms(scheme, DRIVERS[name].encoder):
            same = [c for c in cells if (c["scheme"], c["arm"]) == (scheme, arm.name)]
            if same:
                out.append((scheme, arm.name, [c[key] for c in same], statistics.mean(c["cpu_seconds"] for c in same)))
    return out


def table() -> None:
    """Markdown: an arm a row, a scheme a column; mean and standard deviation over seeds."""
    for name, driver in DRIVERS.items():
        file = HERE / f"results-{name}.json"
        if not file.exists():
            continue
        found = rows(name)
        schemes = [scheme for scheme in (*SCHEMES, *FLOATS) if any(row[0] == scheme for row in found)]
        print(f"\n{name}: {driver.key}; float {stored(file)['cells'].get('float')}\n")
        print(f"| | {' | '.join(schemes)} |\n|---{'|---' * len(schemes)}|")
        for arm in dict.fromkeys(row[1] for row in found):
            cells = {scheme: (values, cpu) for scheme, other, values, cpu in found if other == arm}
            print(f"| {arm} | {' | '.join(shown(*cells[s]) if s in cells else '' for s in schemes)} |")


def shown(values: list[float], cpu: float) -> str:
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}, {cpu:,.0f} s"


def figure() -> None:
    """What each arm loses, by scheme: perplexity as a ratio to float, squared error of logits, correlation lost."""
    import matplotlib.pyplot as plt

    names = [name for name in DRIVERS if (HERE / f"results-{name}.json").exists()]
    _, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 5.5), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        found, key = rows(name), DRIVERS[name].key
        base = stored(HERE / f"results-{name}.json")["cells"]["float"].get(key, 0.0)
        schemes = [scheme for scheme in (*SCHEMES, *FLOATS) if any(row[0] == scheme for row in found)]
        labels = list(dict.fromkeys(row[1] for row in found))
        colours = plt.get_cmap("tab20")
        for number, arm in enumerate(labels):
            points = [(schemes.index(scheme), statistics.mean(v)) for scheme, other, v, _ in found if other == arm]
            lost = [{"perplexity": y / (base or 1), "spearman": base - y}.get(key, y) for _, y in points]
            at = [x + (number / len(labels) - 0.5) * 0.5 for x, _ in points]
            ax.plot(at, lost, "o", label=arm, color=colours(number % 20))
        wording = {"perplexity": "perplexity over float's", "spearman": "Spearman correlation lost"}.get(
            key, "logits MSE"
        )
        ax.set(title=name, ylabel=wording, yscale="linear" if key == "spearman" else "log")
        ax.set_xticks(range(len(schemes)), schemes, rotation=60)
        ax.grid(axis="y", alpha=0.3)
        ax.legend(fontsize=7)
    plt.tight_layout()
    plt.savefig(HERE / "accuracy.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*DRIVERS, "table", "figure"])
    parser.add_argument("--only", default="", help="beginnings of cells' names, separated by ;")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="ablations as well")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what in DRIVERS:
        run(args.what, args)
    else:
        {"table": table, "figure": figure}[args.what]()


if __name__ == "__main__":
    main()
