"""Errors a user can act on: one line that names the cause and the fix, and an exit code for the command
line.
"""

from __future__ import annotations

__all__ = [
    "CalibError",
    "DataError",
    "InputError",
    "ModelError",
    "NumericsError",
    "OutputError",
    "VerifyError",
]


class CalibError(Exception):
    """A known failure. ``str(error)`` is one line, ``"cause; fix"``; `exit_code` is what the command line
    exits with.
    """

    exit_code = 1

    def __init__(self, cause: str, fix: str = "") -> None:
        super().__init__(cause, fix)  # both as args, so that it survives pickling between processes
        self.cause = " ".join(str(cause).split())
        self.fix = " ".join(str(fix).split())

    def __str__(self) -> str:
        return f"{self.cause}; {self.fix}" if self.fix else self.cause


class InputError(CalibError):
    """What the user asked for does not exist or does not fit together: a scheme, a method, a name."""

    exit_code = 2


class ModelError(CalibError):
    """The model cannot be fetched, read or understood."""

    exit_code = 3


class DataError(CalibError):
    """Calibration or evaluation data is missing, empty, too short or unreadable."""

    exit_code = 4


class NumericsError(CalibError):
    """NaN or infinity in weights, activations or results."""

    exit_code = 5


class OutputError(CalibError):
    """The output folder or a cache cannot be written (full, read-only, holds something else)."""

    exit_code = 6


class VerifyError(CalibError):
    """A written checkpoint does not answer like the model it came from."""

    exit_code = 7


class Interrupted(CalibError):
    """Ctrl-C, with what there is to go on from."""

    exit_code = 130
