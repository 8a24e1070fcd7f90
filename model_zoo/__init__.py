"""Where each model comes from, how it is loaded, and recipes per model."""

from __future__ import annotations

from model_zoo.sources import WHEELS, ResolvedModel, Task, load_model, resolve

__all__ = ["WHEELS", "ResolvedModel", "Task", "load_model", "resolve"]
