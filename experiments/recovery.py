"""What the recovery experiments share: small models with held-out text, one training, results kept as they come.

Two benches. ``stories``: stories260k on text that it writes itself (sampled, its 50 likeliest tokens), windows of other
seeds held out. ``wikitext``: a Llama of 0.9 million parameters trained here on WikiText-2 with stories260k's
tokenizer, cached in out/; train, validation and test splits as they are.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import calib
from calib.data import generate_windows
from calib.export.hf import set_mode
from calib.quantizers import AffineSpec, AnyWeight, bits_per_weight
from calib.recipe import Scheme
from calib.tune import latent_weights
from calib.tuning import Training, TuneRecipe, Tuning, next_token_loss, objective, tune
from experiments.machine import processor
from model_zoo.sources import load_model

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
LENGTH = 128
Figures = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One grid, rounded by one method, then trained or not. elastic: whether static input scales learn too."""

    name: str
    weights: AnyWeight
    recipe: TuneRecipe | None = None
    method: str = "rtn"
    inputs: AffineSpec | None = None
    elastic: bool = True


@dataclass(eq=False)
class Bench:
    """A float model and its text: windows [n, LENGTH]. train: by seed."""

    model: PreTrainedModel
    train: Callable[[int], Tensor]
    held: Mapping[str, Tensor]

    @functools.cached_property
    def answers(self) -> dict[str, Tensor]:
        """The float model's logits on the held-out windows."""
        return {split: loss_on(self.model, ids)[1] for split, ids in self.held.items()}


@functools.cache
def bench(name: str) -> Bench:
    model, tokenizer = load_model(SHARED / "models/stories260k", progress=False)
    if name == "stories":

        @functools.cache
        def written(count: int, seed: int) -> Tensor:
            made = generate_windows(model, tokenizer, count, LENGTH, seed, batch_size=64)
            return torch.cat([batch["input_ids"] for batch in made])

        return Bench(model, lambda seed: written(512, 100 + seed), {"valid": written(64, 1), "test": written(128, 2)})

    def windows(split: str, count: int, seed: int = 0) -> Tensor:
        text = (SHARED / f"data/wikitext-2/{split}.txt").read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text[: 600 * count], add_special_tokens=False, verbose=False)["input_ids"])
        found = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]]

    held = {"valid": windows("valid", 64), "test": windows("test", 128)}
    return Bench(small_llama(windows("train", 8192), held["valid"]), lambda seed: windows("train", 4096, seed), held)


def small_llama(
    train: Tensor, valid: Tensor, steps: int = 3000, folder: Path = ROOT / "out/small-llama"
) -> PreTrainedModel:
    """Trained in float once, then cached: about ten minutes of a core for 3,000 steps.

    After 200 steps it is at 3.66 nats and loses 0.02 at 2 bits: it has too little to lose to be worth measuring.
    """
    if not folder.is_dir():
        torch.manual_seed(0)
        sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
        made = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes, tie_word_embeddings=True)).eval()
        groups = [(dict(made.named_parameters()), 1.0)]
        losses = tune(groups, next_token_loss(made), batches(train), Tuning(steps, lr=4e-3, warmup=0.05))
        print(
            f"small Llama: training loss {losses[0]:.3f} > {losses[-1]:.3f}, validation {loss_on(made, valid)[0]:.3f}"
        )
        made.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def batches(windows: Tensor, rows: int = 16) -> list[dict[str, Tensor]]:
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(rows)]


@torch.no_grad()
def loss_on(model: torch.nn.Module, windows: Tensor, reference: Tensor | None = None) -> tuple[float, Tensor, float]:
    """Mean next-token loss in nats, the logits, and KL(reference || model) at the tenth of positions where the
    reference is least certain."""
    logits = torch.cat([model(input_ids=part).logits for part in windows.split(32)])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    if reference is None:
        return float(loss), logits, 0.0
    wanted, given = reference.log_softmax(-1), logits.log_softmax(-1)
    entropy = -(wanted.exp() * wanted).sum(-1)
    hard = entropy >= entropy.flatten().quantile(0.9)
    kl = (wanted.exp() * (wanted - given)).sum(-1)
    return float(loss), logits, float(kl[hard].mean())


@functools.lru_cache(maxsize=1)
def rounded(bench: Bench, weights: AnyWeight, method: str, inputs: AffineSpec | None, seed: int) -> calib.Result:
    """What arms that differ in their training start from."""
    scheme = Scheme(name="arm", weights=weights, inputs=inputs)
    options = {"prefix": "none", "progress": False, "samples": 64, "seed": seed}
    data = batches(bench.train(seed)[:64])
    return calib.quantize(copy.deepcopy(bench.model), scheme, method, data, **options)  # type: ignore[arg-type]


def run_arm(bench: Bench, arm: Arm, seed: int) -> Figures:
    """Rounded with 64 windows' statistics, trained on the others; figures on held-out windows."""
    result = copy.deepcopy(rounded(bench, arm.weights, arm.method, arm.inputs, seed))
    model, found = result.network, Figures()
    if arm.recipe is not None:
        found = trained(result, bench.model, batches(bench.train(seed)), arm.recipe, seed, arm.elastic)
    set_mode(model, "float")
    for split, ids in bench.held.items():
        found[split], _, found[f"{split}_uncertain_kl"] = loss_on(model, ids, bench.answers[split])
    return {**found, "bits": bits_of(model)}


def trained(
    result: calib.Result,
    teacher: PreTrainedModel,
    data: list[dict[str, Tensor]],
    recipe: TuneRecipe,
    seed: int,
    elastic: bool = True,
) -> Figures:
    """Train the result's network in place, by the steps of calib.tune, but for the input scales that may be held;
    its losses, and how far its weights moved from the float ones, of their norm."""
    model, found = result.network, Figures()
    floats, _ = latent_weights(model, teacher, result._manifest())
    names = ("steps", "lr", "warmup", "decay", "clip")
    training = Training(model, recipe.trainable, floats if "all" in recipe.trainable else {})
    value = objective(model, teacher, recipe.loss)
    settings = Tuning(**{name: getattr(recipe, name) for name in names}, seed=seed)
    groups = [
        ({n: p for n, p in group.items() if elastic or not n.endswith("input_factor")}, rate)
        for group, rate in training.groups
    ]
    losses = tune([each for each in groups if each[0]], value, data, settings, after_step=training.project)
    latents = {name: m.latent.detach() for name, m in training.linears.items() if m.latent is not None}
    if latents:
        moved = sum(float((w - floats[name].detach()).square().sum()) for name, w in latents.items())
        whole = sum(float(floats[name].detach().square().sum()) for name in latents)
        found["movement"] = math.sqrt(moved / whole)
    training.settle()
    return {**found, "training_loss": [losses[0], sum(losses[-10:]) / 10], "trained": training.parameters}


def bits_of(model: torch.nn.Module) -> float:
    """Bits a weight of the quantized linears, scales in fp16 included."""
    bits, weights = 0.0, 0
    for module in model.modules():
        if isinstance(module, calib.nn.QuantLinear):
            shape, spec = (module.out_features, module.in_features), module.weight_spec
            each = (
                bits_per_weight(shape, spec, 16, spec.bits)
                if isinstance(spec, AffineSpec)
                else spec.bits_per_weight(shape)
            )
            bits, weights = bits + each * math.prod(shape), weights + math.prod(shape)
    return bits / weights


class Results:
    """Cells by name and seed in a JSON file, written as they come; those that are there are not run again.

    The file is read anew around every cell, so that several runs may fill one table.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file, self.settings = file, dict(settings)
        self.cells: dict[str, dict[str, Figures]] = {}
        self.read()

    def read(self) -> None:
        before: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.settings, self.cells = {**before.get("settings", {}), **self.settings}, before.get("cells", {})

    def run(self, name: str, seed: int, measure: Callable[[], Figures]) -> Figures:
        self.read()
        if str(seed) not in self.cells.get(name, {}):
            start = time.process_time()
            figures = measure()
            found = {"cpu_seconds": round(time.process_time() - start, 1), "processor": processor(), **figures}
            self.read()
            self.cells.setdefault(name, {})[str(seed)] = found
            self.save()
            print(name, f"seed {seed}", json.dumps(found), flush=True)
        return self.cells[name][str(seed)]

    def save(self) -> None:
        versions = {each.__name__: each.__version__ for each in (torch, transformers, calib)}
        about = {"machine": platform.machine(), "threads": torch.get_num_threads(), "versions": versions}
        everything = {"settings": self.settings, **about, "cells": self.cells}
        self.file.write_text(json.dumps(everything, indent=1) + "\n")

    def table(self, columns: Sequence[str]) -> str:
        """Markdown: means over seeds, and their standard deviations where there are several."""
        lines = [f"| | {' | '.join(columns)} | seeds |", "|---" * (len(columns) + 2) + "|"]
        for name, seeds in self.cells.items():
            cells = []
            for column in columns:
                values = [float(figures[column]) for figures in seeds.values() if column in figures]
                spread = f" ± {statistics.stdev(values):.4f}" if len(set(values)) > 1 else ""
                cells.append(f"{statistics.mean(values):.4f}{spread}" if values else "")
            lines.append(f"| {name} | {' | '.join(cells)} | {len(seeds)} |")
        return "\n".join(lines)
