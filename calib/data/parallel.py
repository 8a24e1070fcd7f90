"""A map over batches in several processes, in order and in constant memory."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from calib.errors import NumericsError

T = TypeVar("T")
R = TypeVar("R")
_work: Callable[[Any], Any]


def ordered_map(work: Callable[[T], R], batches: Iterable[T], processes: int) -> Iterator[R]:
    """work(batch) of each batch, in the order of the batches, however many processes share them."""
    if processes == 1:
        yield from map(work, batches)
        return
    # forked processes share the libraries' memory; elsewhere than on Linux forking is not safe
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(processes, context, _start, (work,)) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_run, batch))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise NumericsError(
                "a process ended before its work", "use fewer --processes: memory may be short"
            ) from error


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    _work = work


def _run(batch: Any) -> Any:
    return _work(batch)
