"""Plain floats: a stock checkpoint for any other tool, everything that calib put into a linear multiplied out.

Codes are decoded, factors and side branches multiplied out, the affine and the rotation before a linear folded into
its weight and bias (y = W R^T diag(1/s) (x - z) + b), and linears turned back into what the class had in their place.
What is lost is the size. Quantized inputs have no place here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from calib.errors import OutputError
from calib.export.checkpoint import require_transformers, state, write_folder
from calib.export.compressed import ATTENTION, stock_config, zero_bias
from calib.export.files import Finish, finished, nbytes, staged
from calib.export.weight_only import ACTIVATIONS, whole_model_reasons
from calib.nn import ActivationQuantizer, LowRankLinear, QuantLinear, block_hadamard, changed_linears
from calib.recipe import Recipe

FORMAT = "float"


def refusals(recipe: Recipe) -> list[str]:
    """Why a recipe's result has no plain form that is the same model."""
    scheme = recipe.scheme
    reasons = [ACTIVATIONS] if scheme.inputs is not None else []
    return reasons + [ATTENTION] * (scheme.attention is not None or scheme.kv is not None)


def expressible(model: nn.Module) -> list[str]:
    """Why plain floats cannot be this model, a line a reason; empty where they can."""
    reasons = whole_model_reasons(model)
    inputs = [name for name, module in model.named_modules() if isinstance(module, QuantLinear) and module.input.spec]
    reasons += [f"{ACTIVATIONS} ({name})" for name in inputs[:1]]
    if not reasons:
        try:
            described(require_transformers(model))
        except OutputError as error:
            reasons.append(error.cause)
    return reasons


def save(
    model: nn.Module,
    tokenizer: Any,
    out: str | Path,
    *,
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    finish: Finish | None = None,
) -> Path:
    """Write a stock transformers folder, as safely as checkpoint.save; for a model that is `expressible`."""
    stock = require_transformers(model)
    config, zero_biases = described(stock)
    rewrites: Any = getattr(stock, "calib_rewrites", ())
    tensors = _merged(state(stock), stock, "", rewrites)
    tensors |= {name: zero_bias(stock, size) for name, size in zero_biases.items()}
    tensors = revert_weight_conversion(stock, tensors)  # the names that other tools know, not transformers' own
    with staged(out, overwrite=overwrite, needed_bytes=nbytes(tensors)) as stage:
        write_folder(stage, stock, config, tokenizer, tensors, {**manifest, "format": FORMAT})
        finished(stage, out, finish)
    return Path(out).expanduser().absolute()


def described(model: PreTrainedModel) -> tuple[Any, dict[str, int]]:
    """``compressed.stock_config`` of the model with all folded; OutputError where a new bias has no place."""
    shifted = {name for name, module in changed_linears(model).items() if _shifted(module)}
    return stock_config(model, {f"{name}.bias" for name in shifted})


def tensors_of(
    part: nn.Module, prefix: str, dtype: torch.dtype, rewrites: Sequence[Mapping[str, str]]
) -> dict[str, Tensor]:
    """The tensors of one block, named from the model's root, all folded."""
    del dtype
    named = {f"{prefix}.{key}": t.detach().contiguous() for key, t in part.state_dict().items()}
    return _merged(named, part, prefix, [r for r in rewrites if r["name"].startswith(f"{prefix}.")])


def _merged(
    tensors: dict[str, Tensor], part: nn.Module, prefix: str, rewrites: Sequence[Mapping[str, str]]
) -> dict[str, Tensor]:
    for path, module in changed_linears(part).items():
        name = f"{prefix}.{path}".lstrip(".")
        for key in module.state_dict():
            tensors.pop(f"{name}.{key}", None)
        weight, bias = folded(module)
        tensors[f"{name}.weight"] = weight
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    for rewrite in rewrites:
        _turn_back(tensors, rewrite["name"], rewrite["kind"])
    return tensors


def _turn_back(tensors: dict[str, Tensor], name: str, kind: str) -> None:
    """Undo model.linears.apply_rewrites on names and shapes."""
    if kind == "conv1d":
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].T.contiguous()
    elif f"{name}.weight" in tensors:
        tensors[name] = tensors.pop(f"{name}.weight")
    else:
        count = sum(key.startswith(f"{name}.") for key in tensors)
        tensors[name] = torch.stack([tensors.pop(f"{name}.{i}.weight") for i in range(count)])


def folded(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of the plain linear that a linear with float inputs is; its dtype."""
    if isinstance(module, LowRankLinear):
        (down, inner), (up, bias) = folded(module.down), folded(module.up)
        if inner is not None:
            moved = up.double() @ inner.double()
            bias = (moved if bias is None else bias.double() + moved).to(up.dtype)
        return (up.double() @ down.double()).to(up.dtype), bias
    if isinstance(module, QuantLinear):
        return _folded_quantizer(module)
    assert isinstance(module, nn.Linear)
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def _folded_quantizer(module: QuantLinear) -> tuple[Tensor, Tensor | None]:
    weight, bias, given = module.dequantize(), module.bias, module.input
    if module.side is None and given.hadamard == 1 and given.shift is None and given.rescale is None:
        return weight, bias
    exact = weight.double()
    if module.side is not None:
        down, up = module.side.factors()
        exact = exact + up.double().T @ down.double()
    if given.hadamard > 1:
        rotation = block_hadamard(torch.eye(given.hadamard, dtype=torch.float64), given.hadamard)
        exact = (exact.unflatten(1, (-1, given.hadamard)) @ rotation.T).flatten(1)
    if given.rescale is not None:
        exact = exact / given.rescale.double()
    if given.shift is not None:
        moved = exact @ given.shift.double()
        bias = (-moved if bias is None else bias.double() - moved).to(weight.dtype)
    return exact.to(weight.dtype), bias


def _shifted(module: QuantLinear | LowRankLinear) -> bool:
    parts = (module.down, module.up) if isinstance(module, LowRankLinear) else (module,)
    inputs = [part.input for part in parts if isinstance(part, QuantLinear)]
    return any(isinstance(q, ActivationQuantizer) and q.shift is not None for q in inputs)
