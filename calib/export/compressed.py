"""compressed-tensors: checkpoints that transformers, and others, load without calib.

Layouts: ``int-quantized`` (integer weights and activations) keeps one int8 per weight; ``pack-quantized`` (weights
only) packs codes into int32 words; ``float-quantized`` keeps float8. Scales are stored in the model's dtype. What the
format cannot say exactly is refused with the reason, never approximated.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calib.errors import OutputError
from calib.export import hf
from calib.export.checkpoint import plain_config, require_transformers, state, stock_on_meta, write_folder
from calib.export.files import Finish, finished, nbytes, staged
from calib.model import Resident
from calib.nn import LowRankLinear, Prefix, QuantLinear, SideBranch
from calib.quantizers import FLOAT8, AffineSpec, AnyWeight, Float8Spec, pack
from calib.recipe import Recipe

FORMAT = "compressed-tensors"
ATTENTION = "attention matmuls or the key-value cache are quantized dynamically"
HADAMARD = "an online Hadamard precedes a linear"
LOW_RANK = "low-rank factors stand for a linear, or beside one"
FUSED = "a shift or scale is fused into an activation quantizer"
PREFIX = "a prefix is kept in float keys and values"
FLOAT_ROWS = "rows beyond the static range are computed in float"


def expressible(model: nn.Module, store: Resident | None = None) -> list[str]:
    """Why compressed-tensors cannot hold this model exactly, a line a reason; empty where it can. store: where its
    weights are."""
    if not isinstance(model, PreTrainedModel):
        return [f"{type(model).__name__} is not a transformers model"]
    reasons: dict[str, str] = {}  # reason -> first module
    if isinstance(getattr(model, "calib_prefix", None), Prefix):
        reasons[PREFIX] = ""
    if any(hasattr(module, "calib_attention") for module in model.modules()):
        reasons[ATTENTION] = ""
    reasons |= dict.fromkeys(rewrite_reasons(getattr(model, "calib_rewrites", ())), "")
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    if not quantized:
        reasons["no linear is quantized"] = ""
    factors = [name for name, m in model.named_modules() if isinstance(m, (LowRankLinear, SideBranch))]
    reasons |= dict.fromkeys([LOW_RANK] if factors else [], factors[0] if factors else "")
    for present in (store or Resident()).each():
        for name, module in quantized.items():
            if present(name):
                for reason in _module_reasons(module, model.dtype):
                    reasons.setdefault(reason, name)
    if not reasons:
        dynamic = {n: m for n, m in quantized.items() if m.input.spec is not None and m.input.spec.dynamic}
        try:
            for name, dims in _input_dims(model, dynamic).items():
                if dims != 3:  # there, its package takes the ranges of something else than one token
                    reasons.setdefault(f"dynamic ranges per token on a {dims}-dimensional input", name)
        except (TypeError, ValueError, RuntimeError, IndexError):
            reasons["dynamic ranges, and the model does not run on its dummy batch"] = ""
        try:
            stock_config(model)
        except OutputError as error:
            reasons[error.cause] = ""
    return [f"{reason} ({name})" if name else reason for reason, name in reasons.items()]


def refusals(recipe: Recipe, dtype: torch.dtype) -> list[str]:
    """What `expressible` will object to that the recipe says. Biases that a class lacks, and inputs that are not
    [batch, tokens, channels], show later.
    """
    scheme = recipe.scheme
    formats = dict.fromkeys([scheme.weights, *(each.weights for each in scheme.overrides)])
    reasons = list(dict.fromkeys(reason for weights in formats for reason in _format_reasons(weights, scheme.inputs)))
    if recipe.float_rows:
        reasons.append(FLOAT_ROWS)
    if recipe.prefixes:
        reasons.append(PREFIX)
    if scheme.attention is not None or scheme.kv is not None:
        reasons.append(ATTENTION)
    if any(method.partition(":")[0] in ("hadamard", "rotate") for method in recipe.methods):
        reasons.append(HADAMARD)
    if any(method.partition(":")[0] == "low_rank" for method in recipe.methods):
        reasons.append(LOW_RANK)
    if dtype not in (torch.float32, torch.float64):
        reasons.append(_rounded_scales(dtype))
    return reasons


def unsuited(model: nn.Module, rewrites: Sequence[Mapping[str, str]]) -> list[str]:
    """What is known of an architecture before it is quantized."""
    del model
    return rewrite_reasons(rewrites)


def rewrite_reasons(rewrites: Sequence[Mapping[str, str]]) -> list[str]:
    """One reason a kind, with the first module."""
    kinds = {"conv1d": "a transposed Conv1D", "parameter": "a bare parameter"}
    first = {rewrite["kind"]: rewrite["name"] for rewrite in reversed(rewrites)}
    return [f"{kinds[kind]} was turned into a linear ({name})" for kind, name in first.items()]


def _rounded_scales(dtype: torch.dtype) -> str:
    return f"scales would be rounded to the model's {str(dtype).removeprefix('torch.')}"


def _module_reasons(module: QuantLinear, dtype: torch.dtype) -> list[str]:
    quantizer = module.input
    reasons = _format_reasons(module.weight_spec, quantizer.spec)
    if quantizer.shift is not None or quantizer.rescale is not None:
        reasons.append(FUSED)
    if quantizer.hadamard > 1:
        reasons.append(HADAMARD)
    if quantizer.float_rows:
        reasons.append(FLOAT_ROWS)
    scales = [module.weight_scale, *([quantizer.scale] if quantizer.scale is not None else [])]
    if any(not torch.equal(s.to(dtype).float(), s) for s in scales):
        reasons.append(_rounded_scales(dtype))
    return reasons


def _format_reasons(weights: AnyWeight, spec: AffineSpec | None) -> list[str]:
    """Why it cannot hold these weight and input formats."""
    reasons = []
    if isinstance(spec, Float8Spec) and not isinstance(weights, Float8Spec):
        return ["integer weights with float8 inputs"]
    if not isinstance(weights, AffineSpec) and weights.kind != "lsq":  # those levels are integers from the lowest code
        return [f"weights on a {weights.kind} grid"]
    if spec is None:
        if not weights.symmetric and weights.granularity != "tensor":
            # transformers 5.23 expects unpacked what compressed-tensors 0.20 packs: its own files fail too
            reasons.append("zero points of packed weights, which transformers does not load")
    elif spec.bits == 1:
        reasons.append("one-bit activations")
    elif spec.symmetric and spec.integer and not _full_range(spec):
        reasons.append("symmetric activations on calib's narrow grid (its own uses the lowest code too)")
    elif spec.dynamic and spec.granularity not in ("token", "tensor"):
        reasons.append(f"dynamic activation ranges per {spec.granularity}")
    elif not spec.dynamic and spec.granularity != "tensor":
        reasons.append(f"static activation ranges per {spec.granularity}")
    return reasons


def _full_range(spec: AffineSpec) -> bool:
    """Whether a symmetric grid is compressed-tensors' own: every code, step absmax / (2^bits - 1) * 2."""
    return bool(spec.qmin == -(2 ** (spec.bits - 1)))


def _input_dims(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Dimensions of each module's input on the model's dummy batch: 3 is [batch, tokens, channels]."""
    dims: dict[str, int] = {}
    hooks = []
    for name, module in modules.items():

        def note(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            dims[name] = args[0].dim()

        hooks.append(module.register_forward_pre_hook(note))
    try:
        if modules:
            with torch.no_grad():
                model(**model.dummy_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return dims


def save(
    model: nn.Module,
    tokenizer: Any,
    out: str | Path,
    *,
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    finish: Finish | None = None,
) -> Path:
    """Write a stock transformers folder in compressed-tensors format, as safely as checkpoint.save.

    Raises OutputError with the reasons where `expressible` has any.
    """
    model = require_transformers(model)
    if reasons := expressible(model):
        raise OutputError(
            f"compressed-tensors cannot express this model: {'; '.join(reasons)}",
            "use --format calib, or auto",
        )
    config, zero_biases = stock_config(model)
    tensors = _tensors(model)
    for name, size in zero_biases.items():
        tensors[name] = zero_bias(model, size)
    config.quantization_config = quantization_config(model)
    with staged(out, overwrite=overwrite, needed_bytes=nbytes(tensors)) as stage:
        write_folder(stage, model, config, tokenizer, tensors, {**manifest, "format": FORMAT})
        finished(stage, out, finish)
    return Path(out).expanduser().absolute()


def zero_bias(model: PreTrainedModel, size: int) -> Tensor:
    """A bias that the stock class needs and the model does without."""
    return torch.zeros(size, dtype=model.dtype)


def tensors_of(
    part: nn.Module, prefix: str, dtype: torch.dtype, rewrites: Sequence[Mapping[str, str]]
) -> dict[str, Tensor]:
    """The tensors of one block, named from the model's root, in compressed-tensors' form."""
    del rewrites  # refused
    return _converted(
        {f"{prefix}.{key}": t.detach().contiguous() for key, t in part.state_dict().items()}, part, prefix, dtype
    )


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return _converted(state(model), model, "", model.dtype)


def _converted(tensors: dict[str, Tensor], part: nn.Module, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    for name, module in part.named_modules(prefix=prefix):
        if isinstance(module, QuantLinear):
            for key in module.state_dict():
                tensors.pop(f"{name}.{key}", None)
            tensors.update({f"{name}.{k}": v for k, v in _linear_tensors(module, dtype).items()})
    return tensors


def _linear_tensors(module: QuantLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """One linear in compressed-tensors' names, shapes and dtypes."""
    spec, quantizer = module.weight_spec, module.input
    shape = {"tensor": (1,), "group": (module.out_features, -1)}.get(spec.granularity, (module.out_features, 1))
    tensors = {"weight_scale": module.weight_scale.reshape(shape).to(dtype)}
    if _layout(module) == "pack-quantized":
        words = pack(module.codes(), 8) if module.weight_packed is None else module.weight_packed
        tensors["weight_packed"] = words
        tensors["weight_shape"] = torch.tensor([module.out_features, module.in_features])
    else:
        codes = module.codes()
        tensors["weight"] = codes.view(FLOAT8) if isinstance(spec, Float8Spec) else codes
    if module.weight_zero_point is not None:
        tensors["weight_zero_point"] = module.weight_zero_point.reshape(shape).to(torch.int8)
    if quantizer.spec is not None and quantizer.scale is not None and quantizer.zero_point is not None:
        tensors["input_scale"] = quantizer.scale.to(dtype)
        if not quantizer.spec.symmetric:
            tensors["input_zero_point"] = quantizer.zero_point.to(torch.int8)
    if module.bias is not None:
        tensors["bias"] = module.bias
    return tensors


def quantization_config(model: PreTrainedModel) -> dict[str, Any]:
    """The config.json entry, validated by compressed-tensors' own classes."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig

    groups: dict[str, dict[str, Any]] = {}
    ignore = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            scheme = {
                "weights": _args(module.weight_spec),
                "input_activations": None if module.input.spec is None else _args(module.input.spec),
                "output_activations": None,
                "format": _layout(module),
            }
            groups.setdefault(repr(scheme), {**scheme, "targets": []})["targets"].append(name)
        elif isinstance(module, nn.Linear):
            ignore.append(name)
    schemes = list(groups.values())
    if len(schemes) == 1:
        schemes[0]["targets"] = ["Linear"]
    formats = {scheme["format"] for scheme in schemes}
    config = QuantizationConfig.model_validate(
        {
            "config_groups": {f"group_{i}": scheme for i, scheme in enumerate(schemes)},
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": ignore,
        }
    )
    dumped: dict[str, Any] = config.model_dump(mode="json")
    return {
        "version": compressed_tensors.__version__,
        "sparsity_config": {},
        "transform_config": {},
        **dumped,
    }


def _layout(module: QuantLinear) -> str:
    if isinstance(module.weight_spec, Float8Spec):
        return "float-quantized"
    return "pack-quantized" if module.input.spec is None else "int-quantized"


def _args(spec: AnyWeight) -> dict[str, Any]:
    return {
        "num_bits": int(spec.bits),
        "type": "float" if isinstance(spec, Float8Spec) else "int",
        "symmetric": spec.symmetric,
        "strategy": spec.granularity,
        "group_size": spec.group_size,
        "dynamic": isinstance(spec, AffineSpec) and spec.dynamic,
    }


def stock_config(model: PreTrainedModel, new_biases: Set[str] = frozenset()) -> tuple[Any, dict[str, int]]:
    """The config that gives the stock class every bias ours has or gets, and the sizes of those it adds: zeros.

    Biases that the class lacks by default are looked for behind its config's boolean ``*bias*`` flags.
    """
    config = plain_config(model)
    factored = {f"{name}.bias" for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    ours = {
        f"{name}.bias"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "bias", None), Tensor) and f"{name.rpartition('.')[0]}.bias" not in factored
    } | new_biases
    flags = [k for k, v in config.to_dict().items() if "bias" in k and v is False]
    for count in range(min(len(flags), 4) + 1):
        for chosen in itertools.combinations(flags, count):
            candidate = copy.deepcopy(config)
            for flag in chosen:
                setattr(candidate, flag, True)
            theirs = stock_on_meta(type(model), candidate).state_dict()
            if ours <= theirs.keys():
                extra = {k: t.shape[0] for k, t in theirs.items() if k.endswith(".bias") and k not in ours}
                return candidate, extra
    lacking = sorted(ours - stock_on_meta(type(model), config).state_dict().keys())
    raise OutputError(f"{type(model).__name__} has no place for {hf.some(lacking)}", "use --format calib, or auto")
