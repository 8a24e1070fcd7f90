"""compressed-tensors checkpoints on calib's own linears, so that they run on integer kernels here."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from calib.errors import CalibError, ModelError
from calib.export import hf
from calib.nn import linear_group
from calib.quantizers import AffineSpec, Float8Spec, pack, unpack

METHOD = "compressed-tensors"
LAYOUTS = ("int-quantized", "pack-quantized", "float-quantized")


def load_integer(folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module | None:
    """The folder's model with QuantLinears; None where calib's grids are not exactly those of the checkpoint.

    Raises ModelError where tensors are missing.
    """
    groups = _groups(config["quantization_config"])
    kind = getattr(transformers, (config.get("architectures") or [""])[0], None)
    if groups is None or kind is None:
        return None
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    names = [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]
    described: dict[str, dict[str, Any]] = {}
    for name in names:
        spec, inputs = groups.get(name) or groups.get("Linear") or (None, None)
        if spec is None or not _held(tensors[f"{name}.weight_scale"], spec.scale_dtype):
            return None
        group = _take(tensors, name, spec, inputs)
        described.setdefault(repr(group), {**group, "targets": []})["targets"].append(name)
    plain = copy.deepcopy(transformers.AutoConfig.from_pretrained(folder))
    plain.quantization_config = hf.CalibConfig(list(described.values())).to_dict()
    model, info = kind.from_pretrained(
        None, config=plain, state_dict=tensors, dtype=dtype or "auto", output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{folder}: tensor {hf.some(missing)} is missing", "export or copy the model again")
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


def _groups(quantization: Mapping[str, Any]) -> dict[str, tuple[AffineSpec, AffineSpec | None]] | None:
    """Target -> weight and input format; None for what calib computes otherwise, or not at all."""
    if quantization.get("kv_cache_scheme") or quantization.get("transform_config"):
        return None
    found: dict[str, tuple[AffineSpec, AffineSpec | None]] = {}
    for scheme in quantization.get("config_groups", {}).values():
        if (scheme.get("format") or quantization.get("format")) not in LAYOUTS or scheme.get("output_activations"):
            return None
        weights, inputs = scheme.get("weights"), scheme.get("input_activations")
        if weights is None:
            return None
        if inputs is not None and inputs.get("type", "int") == "int" and inputs.get("symmetric", True):
            return None  # a symmetric grid has one code more there than here
        try:
            pair = (_spec(weights), None if inputs is None else _spec(inputs))
        except (CalibError, KeyError, TypeError):
            return None
        if any(target.startswith("re:") for target in scheme["targets"]):
            return None
        found.update(dict.fromkeys(scheme["targets"], pair))
    return found


def _held(scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether every scale stays what it is in ``dtype``."""
    return torch.equal(scale.to(dtype).double(), scale.double())


def _spec(args: Mapping[str, Any]) -> AffineSpec:
    if args.get("strategy") not in ("tensor", "channel", "group", "token"):
        raise KeyError(args.get("strategy"))
    return {"int": AffineSpec, "float": Float8Spec}[args.get("type", "int")](
        bits=args["num_bits"],
        symmetric=args["symmetric"],
        granularity=args["strategy"],
        group_size=args.get("group_size") if args["strategy"] == "group" else None,
        dynamic=bool(args.get("dynamic")),
    )


def _take(tensors: dict[str, Tensor], name: str, spec: AffineSpec, inputs: AffineSpec | None) -> dict[str, Any]:
    """Rename and reshape one linear's tensors in place; returns its group entry."""

    def move(old: str, new: str, dtype: torch.dtype) -> None:
        if (value := tensors.pop(f"{name}.{old}", None)) is not None:
            tensors[f"{name}.{new}"] = value.to(dtype)

    shape = tensors.pop(f"{name}.weight_shape", None)
    if isinstance(spec, Float8Spec):
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].view(torch.int8)
    elif spec.bits == 8 and shape is not None:
        tensors[f"{name}.weight"] = unpack(tensors.pop(f"{name}.weight_packed"), 8, int(shape[1]))
    elif spec.bits < 8 and f"{name}.weight" in tensors:
        tensors[f"{name}.weight_packed"] = pack(tensors.pop(f"{name}.weight"), spec.bits)
    for key, dtype in (("weight_scale", spec.scale_dtype), ("weight_zero_point", torch.int8)):
        move(key, key, dtype)
        if spec.granularity == "group" and f"{name}.{key}" in tensors:
            tensors[f"{name}.{key}"] = tensors[f"{name}.{key}"].unsqueeze(-1)
    move("input_scale", "input.scale", torch.float32)
    move("input_zero_point", "input.zero_point", torch.int32)
    if inputs is not None and inputs.symmetric and not inputs.dynamic:  # it keeps no zeros
        tensors[f"{name}.input.zero_point"] = torch.zeros(1, dtype=torch.int32)
    return linear_group(spec, inputs, bias=f"{name}.bias" in tensors)
