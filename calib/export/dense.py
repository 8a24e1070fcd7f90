"""Truncated models as stock float checkpoints: factors are multiplied out, biases have a place, nothing is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calib.errors import OutputError
from calib.export.checkpoint import require_transformers, state, write_folder
from calib.export.compressed import rewrite_reasons, stock_config, zero_bias
from calib.export.files import Finish, finished, nbytes, staged
from calib.nn import LowRankLinear, QuantLinear
from calib.recipe import Recipe

FORMAT = "dense"


def refusals(recipe: Recipe) -> list[str]:
    """Why a recipe's result has no dense form that is the same model."""
    return ["weights or inputs are rounded (scheme none is not)"] if recipe.scheme.rounds else []


def save(
    model: nn.Module,
    tokenizer: Any,
    out: str | Path,
    *,
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    finish: Finish | None = None,
) -> Path:
    """Write a stock transformers folder, as safely as checkpoint.save. OutputError where the model has no such form."""
    stock = require_transformers(model)
    config, zero_biases = described(stock)
    tensors = _merged(state(stock), stock, "")
    tensors |= {name: zero_bias(stock, size) for name, size in zero_biases.items()}
    with staged(out, overwrite=overwrite, needed_bytes=nbytes(tensors)) as stage:
        write_folder(stage, stock, config, tokenizer, tensors, {**manifest, "format": FORMAT})
        finished(stage, out, finish)
    return Path(out).expanduser().absolute()


def described(model: PreTrainedModel) -> tuple[Any, dict[str, int]]:
    """``compressed.stock_config`` of a model that can be written dense."""
    reasons = rewrite_reasons(getattr(model, "calib_rewrites", ()))
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        reasons.append("a linear is quantized")
    if reasons:
        raise OutputError(f"a dense checkpoint cannot hold this model: {'; '.join(reasons)}", "use --format calib")
    return stock_config(model)


def tensors_of(part: nn.Module, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one block, named from the model's root, factors multiplied out."""
    del dtype
    named = {f"{prefix}.{key}": t.detach().contiguous() for key, t in part.state_dict().items()}
    return _merged(named, part, prefix)


def _merged(tensors: dict[str, Tensor], part: nn.Module, prefix: str) -> dict[str, Tensor]:
    for name, module in part.named_modules(prefix=prefix):
        if isinstance(module, LowRankLinear):
            for key in module.state_dict():
                tensors.pop(f"{name}.{key}", None)
            tensors[f"{name}.weight"] = module.merged()
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias.detach()
    return tensors
