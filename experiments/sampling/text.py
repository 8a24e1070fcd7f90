"""The texts of the sampling experiment: three targets and an encyclopaedia, and what a draw makes of them."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from calib.data import read_documents, read_labelled

DATA = Path(__file__).resolve().parents[3] / "shared/data"
TARGETS = ("maths", "code", "reviews")
EXAMPLES = 24_000  # characters of a target
POOL = {"maths": 250_000, "code": 90_000, "reviews": 250_000, "wiki": 450_000}  # characters; code is all there is


@functools.cache
def texts(name: str, split: str) -> list[str]:
    """The texts of one domain's train or test part."""
    if name == "maths":
        rows = map(json.loads, (DATA / f"gsm8k/{split}.jsonl").read_text().splitlines())
        return [f"{row['question']}\n{row['answer']}" for row in rows]
    if name == "code":  # tasks 11 to 510 are MBPP's test part
        rows = map(json.loads, (DATA / "mbpp/mbpp.jsonl").read_text().splitlines())
        return [f"{r['text']}\n{r['code']}" for r in rows if (11 <= r["task_id"] <= 510) == (split == "test")]
    if name == "reviews":
        return read_labelled(DATA / f"sst2/{split}.tsv")[0]
    text = "\n".join(read_documents(DATA / f"wikitext-2/{split}.txt"))
    return [part for part in text.split("\n = ") if len(part) > 200]


def draw_texts(draw: int) -> tuple[dict[str, list[str]], list[dict[str, str]]]:
    """Examples of each target, and the shuffled pool."""
    shuffle = random.Random(draw)
    examples, pool = {}, []
    for name in (*TARGETS, "wiki"):
        mixed = list(texts(name, "train"))
        shuffle.shuffle(mixed)
        rest = iter(mixed)
        if name in TARGETS:
            examples[name] = list(until(rest, EXAMPLES))
        pool += [{"text": text, "label": name} for text in until(rest, POOL[name])]
    shuffle.shuffle(pool)
    return examples, pool


def until(rest: Iterator[str], characters: int) -> Iterator[str]:
    held = 0
    while held < characters:
        held += len(text := next(rest))
        yield text
