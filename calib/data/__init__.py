"""Calibration text to token batches, how to choose it, and the labelled files that evaluation reads."""

from __future__ import annotations

from calib.data.builtin import builtin_documents
from calib.data.generate import generate_windows
from calib.data.read import read_documents, read_labelled, read_pairs, read_text
from calib.data.report import coverage
from calib.data.select import Like, Selection, like, select
from calib.data.tokens import TokenData, batch_rows, calibration_data, encode_rows, ids_of, sequence_limit

__all__ = [
    "Like",
    "Selection",
    "TokenData",
    "batch_rows",
    "builtin_documents",
    "calibration_data",
    "coverage",
    "encode_rows",
    "generate_windows",
    "ids_of",
    "like",
    "read_documents",
    "read_labelled",
    "read_pairs",
    "read_text",
    "select",
    "sequence_limit",
]
