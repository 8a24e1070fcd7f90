"""Text of a domain and models for it: what every part of the experiment starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.model import Batch, call_model, observing
from calib.observers import Moments
from calib.solvers import (
    InputStatistics,
)
from calib.tuning import next_token_loss
from model_zoo.sources import load_model

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared"
RATIOS = (0.9, 0.8, 0.7, 0.5, 0.3)
Figures = dict[str, Any]


def text_of(domain: str, split: str) -> str:
    """A domain's text; split: 'train' (WikiText-2: valid) or 'test'."""
    if domain == "wikitext-2":
        return (SHARED / "data/wikitext-2" / ("test.txt" if split == "test" else "valid.txt")).read_text()
    if domain == "gsm8k":
        rows = [json.loads(line) for line in (SHARED / f"data/gsm8k/{split}.jsonl").read_text().splitlines()]
        return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)
    rows = [json.loads(line) for line in (SHARED / "data/mbpp/mbpp.jsonl").read_text().splitlines()]
    span = range(11, 511) if split == "test" else range(601, 975)  # the data set's own splits
    return "\n\n".join(f"{row['text']}\n{row['code']}" for row in rows if row["task_id"] in span)


def windows(tokenizer: Any, domain: str, split: str, count: int, length: int) -> Tensor:
    """Token ids [count, length], evenly spread over the text."""
    ids = tokenizer(text_of(domain, split), add_special_tokens=False, verbose=False)["input_ids"]
    step = (len(ids) - length) // max(count - 1, 1)
    return torch.tensor([ids[i * step : i * step + length] for i in range(count)])


def in_batches(ids: Tensor, size: int = 8) -> list[Batch]:
    return [{"input_ids": part} for part in ids.split(size)]


def loss_on(model: nn.Module, ids: Tensor) -> float:
    """Mean next-token loss, nats."""
    with torch.no_grad():
        losses = [float(next_token_loss(model)(batch)) * len(batch["input_ids"]) for batch in in_batches(ids, 2)]
    return sum(losses) / len(ids)


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{n}"}


def observed(model: nn.Module, ids: Tensor) -> dict[str, InputStatistics]:
    """Of every block Linear's input; those that share one share its statistics."""
    linears = block_linears(model)
    same = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    owner = {
        name: name.replace(name.split(".")[-1], same.get(name.split(".")[-1], name.split(".")[-1])) for name in linears
    }
    moments = {name: Moments(linears[name].in_features, gram=True) for name in set(owner.values())}
    sums = {name: torch.zeros(linears[name].in_features, dtype=torch.float64) for name in moments}

    def take(name: str, x: Tensor) -> None:
        moments[name].update(x.reshape(-1, x.shape[-1]))
        sums[name] += x.abs().double().sum((0, 1))

    with torch.no_grad(), observing({name: linears[name] for name in moments}, take):
        for batch in in_batches(ids, 4):
            call_model(model, batch)
    known = {}
    for name, each in moments.items():
        assert each.gram is not None
        known[name] = InputStatistics(each.gram / each.count, sums[name] / each.count)
    return {name: known[owner[name]] for name in linears}


def output_error(weight: Tensor, change: Tensor, gram: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T)."""
    d, w, h = change.double(), weight.double(), gram.double()
    return float(((d @ h) * d).sum() / ((w @ h) * w).sum())


def smollm2() -> tuple[Any, Any]:
    model, tokenizer = load_model("smollm2-135m", progress=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, tokenizer
