"""The vocabulary inside a GGUF file, for byte-level BPE: what llama.cpp tokenizes with."""

from __future__ import annotations

import json
from typing import Any

# pre-tokenizers by the types of their steps, and the name that llama.cpp has for the same splits
SPLITS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> str:
    """Write the vocabulary where GGUF can say how the tokenizer splits text; returns what was written, or why not."""
    described = _described(tokenizer)
    model, steps = described.get("model", {}), _steps(described.get("pre_tokenizer"))
    split = SPLITS.get(steps) if model.get("type") == "BPE" else None
    if split is None:
        writer.add_tokenizer_model("no_vocab")
        found = f"{model.get('type')} after {' and '.join(steps) or 'no split'}" if described else "no tokenizer"
        return f"none in the file ({found}): tokenize with the files beside it"
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, index in model["vocab"].items():
        tokens[index], kinds[index] = token, NORMAL
    for added in described.get("added_tokens", []):
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    return f"gpt2 ({split})"


def _described(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    return described


def _steps(step: dict[str, Any] | None) -> tuple[str, ...]:
    if step is None:
        return ()
    if step["type"] == "Sequence":
        return tuple(name for inner in step["pretokenizers"] for name in _steps(inner))
    return (step["type"],)
