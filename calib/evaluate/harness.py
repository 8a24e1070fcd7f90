"""Tasks of lm-evaluation-harness (extra ``eval``), from a file that lies here."""

from __future__ import annotations

import contextlib
import io
import math
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from calib.errors import DataError, InputError
from calib.evaluate.result import Z95, Result, evaluating, peak_rss_mib

FILES = ("json", "csv", "parquet", "text")  # of datasets' loaders, those that read files


def harness(
    model: nn.Module,
    tokenizer: Any,
    task: str | os.PathLike[str],
    limit: int | None = None,
    batch_size: int = 8,
    *,
    progress: bool = False,
) -> Result:
    """The first metric of a task's ``metric_list`` (default: acc), mean over its documents, at most ``limit`` of them.

    task: a YAML file as lm-eval takes it. It is read as data: a ``!function`` or an ``include`` in it is refused, for
    they run or fetch what is not in the file. ``data_files`` are sought beside it. ``outputs`` are the documents' own
    values [n]; ``detail``: the other metrics. Raises InputError without lm-eval, DataError for what is no such task.
    """
    start = time.perf_counter()
    config = read_task(Path(task))
    try:
        from jinja2 import TemplateError
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("task harness runs lm-eval, which is not installed", "pip install 'calib[eval]'") from error
    name = config["task"]
    quiet = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())  # it has no switch
    with evaluating(model), quiet:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            found: Any = simple_evaluate(
                wrapped,
                tasks=[config],
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                task_manager=TaskManager(include_defaults=False),  # reading its own thousands takes half a minute
            )
        except (KeyError, ValueError, TypeError, AssertionError, OSError, TemplateError) as error:
            raise DataError(f"{task} is no task that lm-eval runs ({_line(error)})", "try it with lm_eval") from error
    samples, totals = found["samples"][name], found["results"][name]
    metric = (config.get("metric_list") or [{"metric": "acc"}])[0]["metric"]
    values = [float(each[metric]) for each in samples if isinstance(each.get(metric), (int, float))]
    if not values or len(values) != len(samples):
        raise DataError(f"{task}: metric {metric!r} has no value for each document", "put a mean, say acc, first")
    mean = statistics.fmean(values)
    reach = Z95 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    detail = {key: float(value) for key, value in totals.items() if isinstance(value, float) and "stderr" not in key}
    return Result(
        "harness",
        metric,
        mean,
        (mean - reach, mean + reach) if math.isfinite(reach) else None,
        len(values),
        time.perf_counter() - start,
        peak_rss_mib(),
        torch.tensor(values, dtype=torch.float64),
        detail=detail,
    )


def read_task(path: Path) -> dict[str, Any]:
    """A task's config, its data files found beside it. Raises DataError."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path} is no task of plain YAML ({_line(error)})", "write out what it would run") from error
    if not isinstance(config, dict) or not isinstance(config.get("task"), str) or "include" in config:
        raise DataError(f"{path} is no task: a mapping with a name under 'task', whole in one file", "see lm-eval")
    options = config.get("dataset_kwargs")
    if config.get("dataset_path") in FILES and isinstance(options, Mapping):
        config["dataset_kwargs"] = {**options, "data_files": _beside(path.parent, options.get("data_files"))}
    return config


def _beside(folder: Path, files: Any) -> Any:
    if isinstance(files, Mapping):
        return {split: _beside(folder, each) for split, each in files.items()}
    if isinstance(files, list):
        return [_beside(folder, each) for each in files]
    if not isinstance(files, str) or not (folder / files).is_file():
        raise DataError(f"a task's data file {files!r} does not exist", f"put it beside the task, in {folder}")
    return str((folder / files).resolve())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
