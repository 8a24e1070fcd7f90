"""What the weight-only formats share: integer weights and fp16 scales, and what none of them can say.

GPTQ, AWQ and GGUF keep codes and nothing of the inputs. Codes go over bit for bit; scales are rounded to fp16, the
formats' own (2^-11 of each weight, at most).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calib.errors import OutputError
from calib.export.checkpoint import require_transformers, state, write_folder
from calib.export.compressed import (
    ATTENTION,
    FUSED,
    HADAMARD,
    LOW_RANK,
    PREFIX,
    rewrite_reasons,
    stock_config,
    zero_bias,
)
from calib.export.files import Finish, finished, nbytes, staged
from calib.nn import LowRankLinear, Prefix, QuantLinear, SideBranch
from calib.quantizers import AffineSpec, AnyWeight
from calib.recipe import Recipe

ACTIVATIONS = "inputs are quantized, and the format holds weights only"


@dataclass(frozen=True)
class Grid:
    """value = (code - zero) * scale. codes int8 [out, in], scale fp16 and zero int8 [out, groups], all signed."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def bits(self) -> int:
        """4 where every code fits, else 8."""
        return 4 if int(self.codes.min()) >= -8 and int(self.codes.max()) <= 7 else 8

    def per(self, group: int) -> Grid:
        """The same values with scales repeated for every ``group`` inputs, a divisor of the grid's own groups."""
        times = self.codes.shape[1] // self.scale.shape[1] // group
        return Grid(self.codes, *(t.repeat_interleave(times, dim=1) for t in (self.scale, self.zero)))


def grid_of(module: QuantLinear) -> Grid:
    """A linear's integers with one scale a group, or a row. The spec must be ``integer``."""
    shape = (1, 1) if module.weight_spec.granularity == "tensor" else (module.out_features, -1)
    scale = module.weight_scale.reshape(shape).to(torch.float16)
    zero = module.weight_zero_point
    zero = torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero.reshape(shape).to(torch.int8)
    rows = module.out_features
    return Grid(
        module.weight_spec.integers(module.codes()),
        scale.expand(rows, -1).contiguous(),
        zero.expand(rows, -1).contiguous(),
    )


def refusals(recipe: Recipe, format_reasons: Callable[[AnyWeight], list[str]]) -> list[str]:
    """What `reasons_for` will object to that the recipe says already."""
    scheme, names = recipe.scheme, {method.partition(":")[0] for method in recipe.methods}
    reasons = [ACTIVATIONS] if scheme.inputs is not None else []
    reasons += [ATTENTION] if scheme.attention is not None or scheme.kv is not None else []
    reasons += [HADAMARD] if names & {"hadamard", "rotate"} else []
    reasons += [LOW_RANK] if names & {"low_rank", "basel"} else []
    reasons += [PREFIX] if recipe.prefixes else []
    formats = dict.fromkeys([scheme.weights, *(each.weights for each in scheme.overrides)])
    return [*reasons, *dict.fromkeys(reason for weights in formats for reason in format_reasons(weights))]


def whole_model_reasons(model: nn.Module) -> list[str]:
    """Why no format of plain weights holds this model."""
    if not isinstance(model, PreTrainedModel):
        return [f"{type(model).__name__} is not a transformers model"]
    reasons = [PREFIX] if isinstance(getattr(model, "calib_prefix", None), Prefix) else []
    return reasons + [ATTENTION] * any(hasattr(module, "calib_attention") for module in model.modules())


def reasons_for(
    model: nn.Module, of_linear: Callable[[QuantLinear], list[str]], *, rewritten: bool = False
) -> list[str]:
    """Why a weight-only format cannot hold this model, each with its first module; of_linear: the format's own reasons.

    rewritten: linears that were a Conv1D or a bare parameter are fine.
    """
    reasons = dict.fromkeys(whole_model_reasons(model), "")
    if not rewritten:
        reasons |= dict.fromkeys(rewrite_reasons(getattr(model, "calib_rewrites", ())), "")
    found = False
    for name, module in model.named_modules():
        if isinstance(module, (LowRankLinear, SideBranch)):
            reasons.setdefault(LOW_RANK, name)
        if isinstance(module, QuantLinear):
            found = True
            for reason in [*_linear_reasons(module), *of_linear(module)]:
                reasons.setdefault(reason, name)
    if not found:
        reasons["no linear is quantized"] = ""
    if not reasons and not rewritten:
        try:
            stock_config(require_transformers(model))
        except OutputError as error:
            reasons[error.cause] = ""
    return [f"{reason} ({name})" if name else reason for reason, name in reasons.items()]


def _linear_reasons(module: QuantLinear) -> list[str]:
    given = module.input
    reasons = [ACTIVATIONS] if given.spec is not None else []
    reasons += [FUSED] if given.shift is not None or given.rescale is not None else []
    reasons += [HADAMARD] if given.hadamard > 1 else []
    scale = module.weight_scale.to(torch.float16)
    odd = not bool(scale.isfinite().all()) or bool(((scale.float().abs() < 2**-14) & (module.weight_scale != 0)).any())
    return reasons + ["a scale is outside the normal range of fp16"] * odd


def integer_reasons(weights: AnyWeight, bits: Sequence[int]) -> list[str]:
    """Whether a weight grid is integers times scales, in containers of some of ``bits``."""
    if not weights.integer:
        return [f"weights on a {getattr(weights, 'kind', 'dual-binary')} grid"]
    if isinstance(weights, AffineSpec) and not any(weights.bits <= width for width in bits):
        return [f"{weights.bits}-bit weights"]
    return []


def drop_inputs(model: nn.Module) -> None:
    """Take the grids off every input, in place: what a weight-only format makes of a model."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            given = module.input
            given.spec, given.scale, given.zero_point, given.float_rows = None, None, None, False
            module.set_mode(module.mode)


def save_layout(
    model: nn.Module,
    tokenizer: Any,
    out: str | Path,
    tensors_of: Callable[[QuantLinear], dict[str, Tensor]],
    quantization_config: Mapping[str, Any],
    *,
    manifest: Mapping[str, Any],
    overwrite: bool,
    finish: Finish | None,
) -> Path:
    """Write a transformers folder whose quantized linears are what ``tensors_of`` makes of them."""
    stock = require_transformers(model)
    config, zero_biases = stock_config(stock)
    tensors = state(stock)
    for name, module in stock.named_modules():
        if isinstance(module, QuantLinear):
            for key in module.state_dict():
                tensors.pop(f"{name}.{key}", None)
            tensors |= {f"{name}.{key}": tensor for key, tensor in tensors_of(module).items()}
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias
    tensors |= {name: zero_bias(stock, size) for name, size in zero_biases.items()}
    config.quantization_config = dict(quantization_config)
    with staged(out, overwrite=overwrite, needed_bytes=nbytes(tensors)) as stage:
        write_folder(stage, stock, config, tokenizer, tensors, manifest)
        finished(stage, out, finish)
    return Path(out).expanduser().absolute()
