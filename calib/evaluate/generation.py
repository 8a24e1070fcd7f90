"""Does the small model write what the float model writes? Greedy continuations of the same prompts, compared."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from calib.errors import ModelError
from calib.evaluate.perplexity import text_windows
from calib.evaluate.result import Result, check_ids, evaluating, peak_rss_mib

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Continuations:
    """prompts [n, p] and what a model wrote after them, tokens [n, t], by greedy choice."""

    prompts: Tensor
    tokens: Tensor


def continuations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path_or_text: str | os.PathLike[str],
    prompts: int = 40,
    prompt_len: int = 64,
    new_tokens: int = 32,
    batch_size: int = 8,
    *,
    progress: bool = False,
) -> Continuations:
    """What a model writes after the first tokens of a text, cut into disjoint prompts. Ends of text are not chosen.

    Raises DataError where the text is too short, ModelError for a model that does not generate.
    """
    ids = text_windows(tokenizer, path_or_text, prompts, prompt_len, prompt_len)
    return Continuations(ids, _written(model, ids, new_tokens, batch_size, progress))


def agreement(model: nn.Module, wanted: Continuations, batch_size: int = 8, *, progress: bool = False) -> Result:
    """The mean share of each continuation that the model writes alike before it first differs, 0..1, over prompts.

    ``detail['forced_top1']``: the share of all tokens that are also the model's first choice when what came before them
    is the wanted text. `outputs` [n]: each prompt's share. `ci95`: Student's t over prompts.
    """
    start = time.perf_counter()
    written = _written(model, wanted.prompts, wanted.tokens.shape[1], batch_size, progress)
    share = (written == wanted.tokens).long().cumprod(1).double().mean(1)
    check_ids(model, wanted.tokens)
    equal = 0
    with evaluating(model) as device:
        whole = torch.cat([wanted.prompts, wanted.tokens], dim=1)
        for ids in whole.split(batch_size):
            top = model(input_ids=ids.to(device)).logits[:, wanted.prompts.shape[1] - 1 : -1].argmax(-1).cpu()
            equal += int((top == ids[:, wanted.prompts.shape[1] :]).sum())
    n, value = len(share), float(share.mean())
    half = float(stats.t.ppf(0.975, n - 1) * share.std() / math.sqrt(n)) if n > 1 else None
    ci95 = None if half is None else (max(value - half, 0.0), min(value + half, 1.0))
    return Result(
        "generation",
        "agreement",
        value,
        ci95,
        n,
        time.perf_counter() - start,
        peak_rss_mib(),
        share,
        detail={"forced_top1": equal / wanted.tokens.numel()},
    )


def _written(model: nn.Module, prompts: Tensor, new_tokens: int, batch_size: int, progress: bool) -> Tensor:
    """Greedy continuations [n, new_tokens]."""
    if not getattr(model, "can_generate", lambda: False)():
        raise ModelError(f"{type(model).__name__} does not generate text", "use a causal language model")
    check_ids(model, prompts)
    written = []
    with evaluating(model) as device, tqdm(total=len(prompts), desc="generate", disable=not progress) as bar:
        for ids in prompts.split(batch_size):
            given = ids.to(device)
            out = model.generate(  # type: ignore[operator]
                input_ids=given,
                attention_mask=torch.ones_like(given),
                do_sample=False,
                num_beams=1,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
            )
            written.append(out[:, ids.shape[1] :].cpu())
            bar.update(len(ids))
    return torch.cat(written)
