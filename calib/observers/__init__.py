"""Streaming, mergeable statistics of a site. Knows neither models nor bits."""

from calib.observers.base import Observer, check_finite, row_blocks, rows_of
from calib.observers.moments import Moments
from calib.observers.picture import moved, outliers, picture
from calib.observers.quantile import Quantile
from calib.observers.range import Range
from calib.observers.sample import RowSample

__all__ = [
    "Moments",
    "Observer",
    "Quantile",
    "Range",
    "RowSample",
    "check_finite",
    "moved",
    "outliers",
    "picture",
    "row_blocks",
    "rows_of",
]
