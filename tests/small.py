"""A model small enough for every command: a random Llama with a byte tokenizer, text, and a zoo entry of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calib.files import sha256

TRAIN = "The quick brown fox jumps over the lazy dog, then rests for a while. " * 60
TEST = "A slow red hen walks under the eager cat, and later it runs for a day. " * 60
ENTRY = """name: mine
model: m
architecture: llama
source: {hub: a/b}
licence: Apache-2.0
scheme: w8a8
method: os+
data: wikitext
"""


def save_llama(folder: Path, tokenizer: Any) -> Path:
    """A random Llama and its tokenizer, saved as a folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_model(folder: Path, tokenizer: Any) -> dict[str, str]:
    """Paths of ``model``, ``train.txt`` and ``test.txt``, written below folder."""
    save_llama(folder / "model", tokenizer)
    (folder / "train.txt").write_text(TRAIN)
    (folder / "test.txt").write_text(TEST)
    return {name: str(folder / name) for name in ("model", "train.txt", "test.txt")}


def small_entry(file: Path, small: dict[str, str]) -> None:
    """A zoo entry of ``small_model``'s paths."""
    source = f"{{folder: {small['model']}, sha256: {sha256(Path(small['model']) / 'model.safetensors')}}}"
    text = ENTRY.replace("{hub: a/b}", source).replace("data: wikitext", f"data: {small['train.txt']}")
    text += "options: {samples: 4, seq_len: 32, batch_size: 2}\n"
    file.write_text(text + f"test: {{task: perplexity, data: {small['test.txt']}, windows: 4, seq_len: 32}}\n")
