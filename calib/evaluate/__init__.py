"""Quality of a model with its uncertainty: perplexity, classification accuracy, sentence similarity."""

from __future__ import annotations

from calib.evaluate.perplexity import perplexity
from calib.evaluate.result import Result, peak_rss_mib
from calib.evaluate.sentences import class_logits, classification, embed, similarity

__all__ = [
    "Result",
    "class_logits",
    "classification",
    "embed",
    "peak_rss_mib",
    "perplexity",
    "similarity",
]
