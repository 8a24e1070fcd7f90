"""What an evaluation returns, and the bookkeeping all of them share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.errors import DataError

Z95 = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Result:
    """`value` of `metric` on `n` windows, sentences or pairs, with its 95 % confidence interval (None if
    n is too small).

    `seconds` is wall time, `peak_rss_mib` the process's peak memory so far (None where the system does
    not say). `outputs` are the single results in order and stay out of `as_dict`: mean loss of each
    window in nats [n], class logits [n, classes], or cosines [n]; so do their `truth`, class numbers or human scores.
    `detail`: further figures of the task.
    """

    task: str
    metric: str
    value: float
    ci95: tuple[float, float] | None
    n: int
    seconds: float
    peak_rss_mib: float | None
    outputs: Tensor | None = field(default=None, repr=False, compare=False)
    truth: Tensor | None = field(default=None, repr=False, compare=False)
    detail: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The fields that JSON can hold: task, metric, value, ci95, n, seconds, peak_rss_mib, and what detail adds."""
        return {
            "task": self.task,
            "metric": self.metric,
            "value": self.value,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "n": self.n,
            "seconds": round(self.seconds, 3),
            "peak_rss_mib": self.peak_rss_mib,
            **self.detail,
        }


def peak_rss_mib() -> float | None:
    """The most memory this process has held resident so far, in MiB; None where the system does not count
    it.
    """
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage may report what the parent held before this process began
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def vocabulary(model: nn.Module) -> int | None:
    """How many token ids a model knows; None where it does not say."""
    with suppress(AttributeError, NotImplementedError):  # transformers' way to say that there are none
        count = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return int(count)
    return None


def check_ids(model: nn.Module, ids: Tensor) -> None:
    """Raise DataError for token ids that a model does not know."""
    size, largest = vocabulary(model), int(ids.max()) if ids.numel() else 0
    if size is not None and largest >= size:
        cause = f"the data holds token id {largest}, and the model's vocabulary has {size} entries"
        raise DataError(cause, "use the tokenizer that belongs to the model")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode without gradients; yields the device of the model's inputs and restores the mode."""
    training = model.training
    tensor = next(chain(model.parameters(), model.buffers()), torch.empty(0))
    model.eval()
    try:
        with torch.no_grad():
            yield tensor.device
    finally:
        model.train(training)
