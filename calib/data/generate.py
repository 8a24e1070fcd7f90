"""Calibration windows that the model writes itself, where there are no data at all.

Sampled from the model's own distribution, as LLM-QAT (arXiv 2305.17888) and DB-LLM (arXiv 2402.11960) do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from calib.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate_windows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int,
    seq_len: int,
    seed: int = 0,
    *,
    temperature: float = 1.0,
    top_k: int = 50,
    batch_size: int = 16,
    progress: bool = False,
) -> list[dict[str, Tensor]]:
    """`samples` windows of exactly `seq_len` tokens, in batches of token dicts as `calibration_data` takes them.

    Half of the windows start from the BOS token, which is then dropped; the others from one ordinary token each,
    drawn evenly from the vocabulary without repeats as long as there are enough. Every window is then sampled at
    `temperature` from the `top_k` likeliest tokens. Special tokens are never drawn. The same seed gives the same
    windows; torch's own generator is left as it was. Raises InputError for models that do not generate.
    """
    from transformers import GenerationConfig

    config: Any = getattr(model, "config", None)
    if not getattr(model, "can_generate", lambda: False)() or getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__} writes no text", "give calibration text, or use a causal model")
    size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    begin, special = _special(config, getattr(model, "generation_config", None), tokenizer)
    # rows beyond the tokenizer only fill the table up and were never trained
    ordinary = size if tokenizer is None else min(size, len(tokenizer))
    starts = torch.tensor([token for token in range(ordinary) if token not in special])
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        suppress_tokens=sorted({token for token in special if token < size} | set(range(ordinary, size))) or None,
        top_p=1.0,  # said here, or the model's own defaults would hold
        repetition_penalty=1.0,
        pad_token_id=int(starts[0]),  # never used: no window ends early
    )
    device = next(model.parameters()).device
    windows = []
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        tqdm(total=samples, desc="write windows", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        shuffled = starts[torch.randperm(len(starts))].repeat(-(-samples // len(starts)))
        from_begin = 0 if begin is None else samples // 2
        groups = (torch.full((from_begin,), begin or 0), True), (shuffled[: samples - from_begin], False)
        for first, drop in groups:
            for row in first.split(batch_size) if len(first) else ():
                given = row[:, None].to(device)
                settings.max_new_tokens = seq_len if drop else seq_len - 1
                ids = model.generate(  # type: ignore[operator]
                    given, attention_mask=torch.ones_like(given), generation_config=settings
                ).cpu()[:, int(drop) :]
                windows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
                bar.update(len(ids))
    return windows


def _special(config: Any, defaults: Any, tokenizer: Any) -> tuple[int | None, set[int]]:
    """The token a text begins with, and all that are no text."""
    begin = config.bos_token_id
    special = {begin, config.pad_token_id}
    for said in (config, defaults):
        ends = getattr(said, "eos_token_id", None)
        special |= set(ends) if isinstance(ends, list) else {ends}
    special.discard(None)
    if tokenizer is not None:
        special |= set(tokenizer.all_special_ids)
        begin = begin if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return begin, special
