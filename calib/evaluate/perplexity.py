"""Perplexity of a causal language model on running text."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from calib.data import read_text, sequence_limit
from calib.errors import DataError, InputError, ModelError, NumericsError
from calib.evaluate.result import Result, check_ids, evaluating, peak_rss_mib

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path_or_text: str | os.PathLike[str],
    windows: int = 40,
    seq_len: int = 512,
    batch_size: int = 4,
    *,
    stride: int | None = None,
    progress: bool = False,
) -> Result:
    """exp(mean loss) over the first `windows` windows of `seq_len` tokens, disjoint or `stride` tokens apart.

    The whole text is tokenized as one string without special tokens; each window predicts its tokens
    2..seq_len from those before. With `stride` it predicts its last `stride` tokens only, so that each has at least
    seq_len - stride tokens before it. `path_or_text` is a file, or the text itself if it holds a line break or
    is longer than a path can be.

    `ci95` takes the windows' mean losses as independent draws: Student's t interval of their mean, mapped
    through exp. Its width is the text's spread; two models on the same windows compare far tighter by
    their `outputs` (losses [windows], nats a token).

    Raises DataError when the text has too few tokens, InputError for windows beyond the model's limit,
    NumericsError for a loss that is not finite.
    """
    start = time.perf_counter()
    if windows < 1 or batch_size < 1 or seq_len < 2:
        cause = f"{windows} windows of {seq_len} tokens in batches of {batch_size} measure nothing"
        raise InputError(cause, "use 1 window or more of 2 tokens or more")
    limit = sequence_limit(getattr(model, "config", None), tokenizer)
    if limit is not None and seq_len > limit:
        cause = f"windows of {seq_len} tokens are beyond the model's limit of {limit}"
        raise InputError(cause, f"use at most {limit}")
    if stride is not None and not 1 <= stride < seq_len:
        raise InputError(f"a stride of {stride} in windows of {seq_len}", f"use 1 to {seq_len - 1}")
    ids = text_windows(tokenizer, path_or_text, windows, seq_len, stride or seq_len)
    check_ids(model, ids)
    losses = []
    with evaluating(model) as device, tqdm(total=windows, desc="perplexity", disable=not progress) as bar:
        for batch in ids.split(batch_size):
            losses.append(_window_losses(model, batch.to(device), stride or seq_len - 1))
            bar.update(len(batch))
    loss = torch.cat(losses)
    if not bool(loss.isfinite().all()):
        bad = int((~loss.isfinite()).nonzero()[0]) + 1
        raise NumericsError(f"the loss of window {bad} is not finite", "check the model's weights for NaN and infinity")
    mean = float(loss.mean())
    ci95 = None
    if windows > 1:
        half = float(stats.t.ppf(0.975, windows - 1) * loss.std() / math.sqrt(windows))
        ci95 = (_exp(mean - half), _exp(mean + half))
    seconds = time.perf_counter() - start
    return Result("perplexity", "perplexity", _exp(mean), ci95, windows, seconds, peak_rss_mib(), loss)


def text_windows(
    tokenizer: PreTrainedTokenizerBase, path_or_text: str | os.PathLike[str], windows: int, seq_len: int, step: int
) -> Tensor:
    """Token ids [windows, seq_len] from the start of a text, one window every `step` tokens."""
    given = path_or_text
    if isinstance(given, str) and ("\n" in given or len(given) > 1024):
        source, text = "the given text", given
    else:
        source, text = str(given), read_text(Path(given).expanduser())
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    needed = (windows - 1) * step + seq_len
    if len(ids) < needed:
        full = max(0, (len(ids) - seq_len) // step + 1)
        cause = f"{source} holds {len(ids)} tokens, fewer than {windows} windows of {seq_len}"
        raise DataError(cause, f"use --windows {full}" if full else "give more text or use shorter windows")
    return torch.tensor(ids[:needed], dtype=torch.int64).unfold(0, seq_len, step).contiguous()


def _window_losses(model: nn.Module, ids: Tensor, last: int) -> Tensor:
    """Mean next-token loss of the last tokens of each row of `ids` [B, T], in nats, float64 [B]."""
    output = model(input_ids=ids)
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:2] != ids.shape:
        raise ModelError(f"{type(model).__name__} gives no next-token logits", "use a causal language model")
    rows = [  # row by row: float32 logits of a whole batch would double the peak
        nn.functional.cross_entropy(row[-last - 1 : -1].float(), target[-last:], reduction="none").double().mean()
        for row, target in zip(logits, ids, strict=True)
    ]
    return torch.stack(rows).cpu()


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError as error:
        raise NumericsError(f"a mean loss of {value:.0f} nats has no perplexity", "check the model") from error
