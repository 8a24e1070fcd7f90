"""The GPTQ layout (GPTQModel, vLLM, SGLang, ExLlama): 4 or 8 bits, a scale a group or a row.

``qweight`` int32 [in b / 32, out] packs along the inputs, ``qzeros`` int32 [groups, out b / 32] along the outputs,
codes unsigned; ``scales`` fp16 [groups, out]; ``g_idx`` int32 [in]. Version 1 stores zero - 1, and a zero of 0 would
borrow from its neighbour: symmetric grids, whose zero is 2^(b-1), are written so; asymmetric ones as version 2, which
stores the zero itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.export.compressed import rewrite_reasons
from calib.export.files import Finish
from calib.export.weight_only import grid_of, integer_reasons, reasons_for, save_layout
from calib.export.weight_only import refusals as common_refusals
from calib.nn import QuantLinear
from calib.quantizers import AnyWeight, pack
from calib.recipe import Recipe

FORMAT = "gptq"


def refusals(recipe: Recipe) -> list[str]:
    """Why a recipe's result will not be `expressible`, as far as it says."""
    reasons = common_refusals(recipe, _format_reasons)
    return reasons + ["several weight formats, and its config has one"] * bool(recipe.scheme.overrides)


def _format_reasons(weights: AnyWeight) -> list[str]:
    return integer_reasons(weights, (4, 8))


def unsuited(model: nn.Module, rewrites: Sequence[Mapping[str, str]]) -> list[str]:
    """What is known of an architecture before it is quantized."""
    del model
    return rewrite_reasons(rewrites)


def expressible(model: nn.Module) -> list[str]:
    """Why the GPTQ layout cannot hold this model; empty where it can."""
    reasons = reasons_for(model, _linear_reasons)
    if reasons:
        return reasons
    forms = {_form(module) for module in model.modules() if isinstance(module, QuantLinear)}
    lists = sorted(set(_blocks(model)))
    if len(forms) > 1:
        reasons.append("several weight formats, and its config has one")
    if len(lists) > 1:
        reasons.append(f"quantized linears in several lists of blocks ({', '.join(lists)})")
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith(f"{lists[0]}.")]
    if plain:
        reasons.append(f"a linear of the blocks is left in float ({plain[0]})")
    return reasons


def _linear_reasons(module: QuantLinear) -> list[str]:
    reasons = _format_reasons(module.weight_spec)
    if not reasons:
        word = 32 // grid_of(module).bits
        if module.in_features % word or module.out_features % word:
            reasons.append(f"{module.in_features} inputs or {module.out_features} outputs do not fill int32 words")
    return reasons


def _form(module: QuantLinear) -> tuple[int, int, bool]:
    """Bits, group (-1: all inputs of a row) and symmetry."""
    size = module.weight_spec.group_size
    return grid_of(module).bits, -1 if size is None else size, module.weight_spec.symmetric


def _blocks(model: nn.Module) -> list[str]:
    """Of each quantized linear: the list of blocks that holds it."""
    names = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    paths = [name.split(".") for name in names]
    cut = [next((i for i, part in enumerate(path) if part.isdigit()), len(path) - 1) for path in paths]
    return [".".join(path[:i]) for path, i in zip(paths, cut, strict=True)]


def tensors_of(module: QuantLinear) -> dict[str, Tensor]:
    """One linear in the layout's names, shapes and dtypes, without its bias."""
    grid = grid_of(module)
    group = module.in_features // grid.scale.shape[1]
    stored = grid.zero - 1 if module.weight_spec.symmetric else grid.zero
    return {
        "qweight": pack(grid.codes, grid.bits).T.contiguous(),
        "qzeros": pack(stored.T.contiguous(), grid.bits),
        "scales": grid.scale.T.contiguous(),
        "g_idx": (torch.arange(module.in_features) // group).to(torch.int32),
    }


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The config.json entry."""
    bits, group, symmetric = _form(next(m for m in model.modules() if isinstance(m, QuantLinear)))
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": symmetric,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "lm_head": False,
        "block_name_to_quantize": _blocks(model)[0],
    }


def save(
    model: nn.Module,
    tokenizer: Any,
    out: str | Path,
    *,
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    finish: Finish | None = None,
) -> Path:
    """Write a transformers folder in the GPTQ layout, as safely as checkpoint.save; for an `expressible` model."""
    entry, about = quantization_config(model), {**manifest, "format": FORMAT}
    return save_layout(model, tokenizer, out, tensors_of, entry, manifest=about, overwrite=overwrite, finish=finish)
