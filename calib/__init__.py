"""calib: post-training quantization of transformers, from outlier suppression to verified checkpoints.

`quantize` does it all, `plan` says before any work what it would do, `tune` trains what calibration alone cannot bring
back, `load` and `verify` read a result back, `convert` writes it for other programs.
Importing calib also teaches transformers its checkpoints: ``AutoModel*.from_pretrained(folder)`` then works.
"""

from __future__ import annotations

from calib.errors import (
    CalibError,
    DataError,
    InputError,
    ModelError,
    NumericsError,
    OutputError,
    VerifyError,
)
from calib.export import hf as _hf
from calib.export.load import load, load_tokenizer
from calib.export.targets import convert
from calib.export.verify import VerifyReport, verify
from calib.inspection import inspect
from calib.quantize import Result, cost, plan, quantize  # `calib.quantize` is the function, not its module
from calib.result import Tuned
from calib.rotate import Rotated, rotate  # so is `calib.rotate`
from calib.tune import tune

__version__ = "0.1.0"
_hf.register()

__all__ = [
    "CalibError",
    "DataError",
    "InputError",
    "ModelError",
    "NumericsError",
    "OutputError",
    "Result",
    "Rotated",
    "Tuned",
    "VerifyError",
    "VerifyReport",
    "convert",
    "cost",
    "inspect",
    "load",
    "load_tokenizer",
    "plan",
    "quantize",
    "rotate",
    "tune",
    "verify",
]
