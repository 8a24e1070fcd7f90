"""The AWQ GEMM layout (GPTQModel, vLLM, SGLang): 4 bits, a scale and a zero point a group or a row.

``qweight`` int32 [in, out / 8]: nibble i of word c is output 8c + ORDER[i]; ``qzeros`` int32 [groups, out / 8] in the
same order; ``scales`` fp16 [groups, out]. Codes and zeros are unsigned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from calib.export.compressed import rewrite_reasons
from calib.export.files import Finish
from calib.export.weight_only import grid_of, integer_reasons, reasons_for, save_layout
from calib.export.weight_only import refusals as common_refusals
from calib.nn import QuantLinear
from calib.quantizers import AnyWeight, pack
from calib.recipe import Recipe

FORMAT = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def refusals(recipe: Recipe) -> list[str]:
    """Why a recipe's result will not be `expressible`, as far as it says."""
    return common_refusals(recipe, _format_reasons)


def _format_reasons(weights: AnyWeight) -> list[str]:
    return integer_reasons(weights, (4,))


def unsuited(model: nn.Module, rewrites: Sequence[Mapping[str, str]]) -> list[str]:
    """What is known of an architecture before it is quantized."""
    del model
    return rewrite_reasons(rewrites)


def expressible(model: nn.Module) -> list[str]:
    """Why the AWQ layout cannot hold this model; empty where it can."""
    reasons = reasons_for(model, _linear_reasons)
    if not reasons and len({_group(module) for module in model.modules() if isinstance(module, QuantLinear)}) > 1:
        reasons.append("several weight formats, and its config has one")
    return reasons


def _linear_reasons(module: QuantLinear) -> list[str]:
    reasons = _format_reasons(module.weight_spec)
    if not reasons and grid_of(module).bits != 4:
        reasons.append("levels beyond -8 to 7")
    if module.out_features % 8:
        reasons.append(f"{module.out_features} outputs do not fill int32 words")
    return reasons


def _group(module: QuantLinear) -> int:
    return -1 if module.weight_spec.group_size is None else module.weight_spec.group_size


def tensors_of(module: QuantLinear) -> dict[str, Tensor]:
    """One linear in the layout's names, shapes and dtypes, without its bias."""
    grid = grid_of(module)
    return {
        "qweight": pack(_interleaved(grid.codes.T), 4),
        "qzeros": pack(_interleaved(grid.zero.T), 4),
        "scales": grid.scale.T.contiguous(),
    }


def _interleaved(columns: Tensor) -> Tensor:
    return columns.unflatten(1, (-1, 8))[..., list(ORDER)].flatten(1).contiguous()


def save(
    model: nn.Module,
    tokenizer: Any,
    out: str | Path,
    *,
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    finish: Finish | None = None,
) -> Path:
    """Write a transformers folder in the AWQ layout, as safely as checkpoint.save; for an `expressible` model."""
    entry = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": _group(next(m for m in model.modules() if isinstance(m, QuantLinear))),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [name for name, m in model.named_modules() if isinstance(m, nn.Linear)] or None,
    }
    about = {**manifest, "format": FORMAT}
    return save_layout(model, tokenizer, out, tensors_of, entry, manifest=about, overwrite=overwrite, finish=finish)
