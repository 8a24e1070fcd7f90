"""Quality of a model with its uncertainty: perplexity, classification, similarity, generation, lm-eval's tasks."""

from __future__ import annotations

from calib.evaluate.compare import bootstrap95, paired
from calib.evaluate.generation import Continuations, agreement, continuations
from calib.evaluate.harness import harness
from calib.evaluate.perplexity import perplexity
from calib.evaluate.result import Result, peak_rss_mib
from calib.evaluate.sentences import class_logits, classification, embed, similarity

__all__ = [
    "Continuations",
    "Result",
    "agreement",
    "bootstrap95",
    "class_logits",
    "classification",
    "continuations",
    "embed",
    "harness",
    "paired",
    "peak_rss_mib",
    "perplexity",
    "similarity",
]
