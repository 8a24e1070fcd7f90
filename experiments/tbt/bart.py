"""A small BART that restores WikiText-2 sentences from which tokens were masked and deleted; trained once, cached."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from calib.tuning import Terms, Tuning, objective, tune
from experiments.recovery import ROOT, SHARED, Figures
from model_zoo.sources import load_model

END, PAD, MASK, VOCABULARY = 2, 512, 513, 514  # stories260k's 512 tokens, and two more
SHORTEST, LONGEST, ROWS = 12, 64, 16
MASKED, DELETED = 0.15, 0.05
Batch = dict[str, Tensor]


@functools.cache
def tokenizer() -> Any:
    return load_model(SHARED / "models/stories260k", progress=False)[1]


@functools.cache
def sentences(split: str) -> list[list[int]]:
    """Of 12 to 64 tokens, the end included, in the order of the text."""
    text = (SHARED / f"data/wikitext-2/{split}.txt").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if not line.strip().startswith("=")]
    parts = [f"{part.strip(' .')} ." for line in lines for part in line.split(" . ") if part.strip(" .")]
    short = [part for part in parts if len(part) < 4 * LONGEST]
    ids: list[list[int]] = tokenizer()(short, add_special_tokens=False)["input_ids"]
    return [[*each, END] for each in ids if SHORTEST <= len(each) < LONGEST]


def noised(ids: list[int], generator: torch.Generator) -> list[int]:
    draw = torch.rand(len(ids) - 1, generator=generator).tolist()
    kept = [MASK if d < MASKED else i for i, d in zip(ids[:-1], draw, strict=True) if d < 1 - DELETED]
    return [*kept, END]


def padded(rows: Sequence[list[int]], value: int, length: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def batch_of(rows: Sequence[list[int]], generator: torch.Generator) -> Batch:
    length = max(map(len, rows))  # of both: what calib reads as calibration data
    source = padded([noised(row, generator) for row in rows], PAD, length)
    target = padded(rows, -100, length)
    shifted = torch.cat([torch.full((len(rows), 1), END), target[:, :-1]], dim=1)
    masks = {"attention_mask": source != PAD, "decoder_attention_mask": shifted >= 0}
    given = {"input_ids": source, "decoder_input_ids": shifted.masked_fill(shifted < 0, PAD)}
    return {**given, **{name: mask.long() for name, mask in masks.items()}, "labels": target}


def drawn(split: str, batches: int, seed: int) -> list[Batch]:
    """Batches of sentences of about one length, drawn and noised by the seed."""
    generator = torch.Generator().manual_seed(seed)
    found = sentences(split)
    chosen = torch.randperm(len(found), generator=generator)[: batches * ROWS].tolist()
    rows = sorted((found[i] for i in chosen), key=len)
    parts = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
    return [batch_of(part, generator) for part in parts]


def inputs_of(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


@functools.cache
def trained_bart(steps: int = 1500, lr: float = 1e-3, folder: Path = ROOT / "out/small-bart") -> Any:
    """Two layers a side, 128 wide, 1.0 million parameters: six minutes of a core.

    Cross-attention starts as a copy of what stands at the same position. From random weights it had not learned to look
    at the encoder after 2,400 steps of 32 sentences: the model was a language model (8.7 of perplexity).
    """
    if not folder.is_dir():
        torch.manual_seed(0)
        sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIDE.items()}
        ends = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": END, "decoder_start_token_id": END}
        rest = {
            "d_model": 128,
            "max_position_embeddings": LONGEST,
            "forced_eos_token_id": None,
            "dropout": 0.0,
            "init_std": 0.05,
        }
        made = BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **sides, **ends, **rest)).eval()
        copies_positions(made)
        groups = [(dict(made.named_parameters()), 1.0)]
        epochs = [batch for seed in range(4) for batch in drawn("train", steps, seed)]  # all of it, noised anew
        losses = tune(groups, objective(made, None, Terms(task=1)), epochs, Tuning(steps, lr=lr, warmup=0.05))
        print("small BART, training loss:", [round(sum(losses[i : i + 100]) / 100, 2) for i in range(0, steps, 100)])
        made.save_pretrained(folder)
    return BartForConditionalGeneration.from_pretrained(folder).eval()


SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 512}


@torch.no_grad()
def copies_positions(model: Any) -> None:
    """Cross-attention's projections start as identities, and both sides' positions as the same."""
    encoder, decoder = model.get_encoder(), model.get_decoder()
    decoder.embed_positions.weight.copy_(encoder.embed_positions.weight)
    for layer in decoder.layers:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            torch.nn.init.eye_(layer.encoder_attn.get_submodule(name).weight)


@torch.no_grad()
def perplexity(model: Any, batches: Sequence[Batch]) -> float:
    """Of the sentences given their noised copies, teacher-forced."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(**inputs_of(batch)).logits
        total += float(torch.nn.functional.cross_entropy(logits.mT, batch["labels"], reduction="sum"))
        count += int((batch["labels"] >= 0).sum())
    return math.exp(min(total / count, 50))


def texts(rows: Tensor) -> list[str]:
    return [tokenizer().decode([i for i in row if 2 < i < PAD]) for row in rows.tolist()]


@torch.no_grad()
def rouge(model: Any | None, batches: Sequence[Batch]) -> Figures:
    """F-measures of greedy reconstructions, in percent; without a model, of the noised copies as they are."""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    totals, count = dict.fromkeys(scorer.rouge_types, 0.0), 0
    for batch in batches:
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        made = batch["input_ids"] if model is None else model.generate(
            **given, max_new_tokens=LONGEST, do_sample=False, num_beams=1
        )  # fmt: skip
        for wanted, got in zip(texts(batch["labels"]), texts(made), strict=True):
            for name, score in scorer.score(wanted, got).items():
                totals[name] += score.fmeasure
            count += 1
    return {name: 100 * total / count for name, total in totals.items()}
