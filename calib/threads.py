"""What threads must do one after the other."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_BUILDING = threading.RLock()


def one_at_a_time(build: Callable[P, R]) -> Callable[P, R]:
    """A function that builds transformers models, for one thread at a time.

    transformers builds under patches of its own and of torch's classes (no tying, no initialisation), which two threads
    at once put back wrongly, and for good.
    """

    @functools.wraps(build)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with _BUILDING:
            return build(*args, **kwargs)

    return locked
