"""What a command runs under: warnings and library errors as one line each."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
import warnings
from collections.abc import Iterator

from safetensors import SafetensorError

from calib.errors import Interrupted, ModelError, NumericsError, OutputError


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """One line a warning, without the source line that gave it."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, UserWarning):
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C with what it says of how to go on; typer would lose it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted("interrupted", str(stop) or "nothing half-written was left as finished") from stop


@contextlib.contextmanager
def known_causes() -> Iterator[None]:
    """What libraries raise for causes that a user can act on, as one line."""
    try:
        yield
    except SafetensorError as error:
        if "serializing: I/O" in str(error):
            raise OutputError(
                f"cannot write a weight file ({error})", "free some space, or choose another --out"
            ) from error
        raise ModelError(f"a weight file is damaged ({error})", "download or export it again") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"a config or manifest is not JSON ({error})", "download or export it again") from error
    except MemoryError as error:
        raise NumericsError("out of memory", "lower --batch-size, --samples or --seq-len") from error
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        where = f" {error.filename}" if error.filename else ""
        fix = "free some space" if full else "check the path and its permissions"
        raise OutputError(
            f"{error.strerror or error}:{where}" if where else str(error.strerror or error), fix
        ) from error
    except RuntimeError as error:
        texts = "can't allocate memory", "cannot allocate memory", "out of memory"  # torch's, safetensors', CUDA's
        if any(text in str(error).lower() for text in texts):
            raise NumericsError("out of memory", "lower --batch-size, --samples or --seq-len") from error
        raise
