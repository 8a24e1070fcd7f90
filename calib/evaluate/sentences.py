"""Sentence tasks: classification accuracy, and similarity of mean-pooled embeddings."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from calib.data import batch_rows, encode_rows, read_labelled, read_pairs, sequence_limit
from calib.errors import DataError, ModelError, NumericsError
from calib.evaluate.result import Z95, Result, check_ids, evaluating, peak_rss_mib

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]
_LONGEST = 512  # tokens of a sentence, for models that set no limit


def classification(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike[str],
    batch_size: int = 32,
    *,
    progress: bool = False,
) -> Result:
    """Accuracy in 0..1 on a table of sentences and class numbers, with Wilson's 95 % interval.

    `outputs` are the logits [n, classes], float32, in the file's order: their mean squared error against
    another model's is a finer measure than accuracy. Raises DataError for a label the model has no class
    for.
    """
    start = time.perf_counter()
    sentences, labels = read_labelled(path)
    logits = class_logits(model, tokenizer, sentences, batch_size, progress=progress)
    classes, n = logits.shape[1], len(labels)
    if (bad := next((i for i, label in enumerate(labels) if not 0 <= label < classes), None)) is not None:
        cause = f"{path} row {bad + 1} has label {labels[bad]}, the model has {classes} classes"
        raise DataError(cause, "use data of the task the model was trained for")
    right = int((logits.argmax(dim=1) == torch.tensor(labels)).sum())
    seconds = time.perf_counter() - start
    truth = torch.tensor(labels)
    return Result("classification", "accuracy", right / n, _wilson(right, n), n, seconds, peak_rss_mib(), logits, truth)


def similarity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike[str],
    batch_size: int = 32,
    *,
    progress: bool = False,
) -> Result:
    """Spearman correlation between the cosine of two sentences' embeddings and a human score (STS-B's
    form).

    `ci95` is Fisher's z interval with Bonett and Wright's variance for ranks, (1 + r^2 / 2) / (n - 3)
    (Psychometrika 65, 2000). `outputs` are the cosines [n].
    """
    start = time.perf_counter()
    first, second, scores = read_pairs(path)
    both = embed(model, tokenizer, [*first, *second], batch_size, progress=progress)
    n = len(scores)
    cosines = nn.functional.cosine_similarity(both[:n], both[n:], dim=1)
    if n < 2 or len(set(scores)) < 2:
        raise DataError(f"{path} has {n} pairs and {len(set(scores))} scores", "give 2 pairs or more of several scores")
    value = float(stats.spearmanr(cosines.numpy(), scores).statistic)
    if math.isnan(value):
        raise NumericsError("all sentence pairs have the same cosine", "check the model's weights")
    seconds = time.perf_counter() - start
    truth = torch.tensor(scores)
    return Result("similarity", "spearman", value, _fisher(value, n), n, seconds, peak_rss_mib(), cosines, truth)


def class_logits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    batch_size: int = 32,
    *,
    progress: bool = False,
) -> Tensor:
    """Logits [n, classes], float32 on the CPU, in the order of `sentences`."""

    def pick(output: Any, batch: Batch) -> Tensor:
        logits: Tensor | None = getattr(output, "logits", None)
        if logits is None or logits.dim() != 2:
            fix = "use a model for sequence classification"
            raise ModelError(f"{type(model).__name__} gives no class logits", fix)
        return logits

    return _forward(model, tokenizer, sentences, batch_size, progress, pick)


def embed(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    batch_size: int = 32,
    *,
    progress: bool = False,
) -> Tensor:
    """Embeddings [n, hidden], float32 on the CPU: the mean of the last hidden states over each sentence's
    tokens.
    """

    def pick(output: Any, batch: Batch) -> Tensor:
        hidden: Tensor | None = getattr(output, "last_hidden_state", None)
        if hidden is None:
            raise ModelError(f"{type(model).__name__} gives no hidden states", "load it with task='encoder'")
        mask = batch["attention_mask"].unsqueeze(-1)
        return (hidden.float() * mask).sum(dim=1) / mask.sum(dim=1)

    return _forward(model, tokenizer, sentences, batch_size, progress, pick)


def _forward(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    batch_size: int,
    progress: bool,
    pick: Callable[[Any, Batch], Tensor],
) -> Tensor:
    """What `pick` takes from the output of each batch, [n, ...], float32 on the CPU."""
    limit = sequence_limit(getattr(model, "config", None), tokenizer) or _LONGEST
    rows = encode_rows(tokenizer, sentences, limit)
    picked = []
    with evaluating(model) as device, tqdm(total=len(rows), desc="evaluate", disable=not progress) as bar:
        for batch in batch_rows(rows, tokenizer, batch_size):
            check_ids(model, batch["input_ids"])
            batch = {key: value.to(device) for key, value in batch.items()}
            values = pick(model(**batch), batch).float().cpu()
            if not bool(values.isfinite().all()):
                raise NumericsError("the model's output is not finite", "check its weights for NaN and infinity")
            picked.append(values)
            bar.update(len(values))
    return torch.cat(picked)


def _wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's score interval for a proportion."""
    share, z2 = right / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _fisher(r: float, n: int) -> tuple[float, float] | None:
    if n < 4 or abs(r) >= 1:
        return None
    half = Z95 * math.sqrt((1 + r * r / 2) / (n - 3))
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)
