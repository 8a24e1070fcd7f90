"""calib's format inside transformers: what ``AutoModel*.from_pretrained`` does after ``import calib``.

``config.json`` holds a `CalibConfig`: what each quantized linear looks like, in groups; which plain linears
gained a bias; which stock modules became linears first; the prefix. The stock class is built on the meta
device, rebuilt from that description, and the tensors are loaded by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from calib.errors import ModelError
from calib.memory import keep_pages
from calib.nn import (
    AttentionFormat,
    Prefix,
    QuantLinear,
    changed_linears,
    describe_linear,
    linear_group,
    quant_linear,
    route_attention,
    use_int8_cache,
)
from calib.nn.kv_cache import INT8
from calib.quantizers import AffineSpec

METHOD = "calib"
FORMAT_VERSION = 3  # 2: integer sums were rescaled by two factors, one after the other
MODE_VARIABLE = "CALIB_MODE"  # 'packed' (default) or 'fake': what from_pretrained leaves the linears in


class CalibConfig(QuantizationConfigMixin):
    """``quantization_config`` of a calib checkpoint, plain JSON values. Raises ModelError."""

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]] = (),
        biased_linears: Sequence[str] = (),
        rewrites: Sequence[Mapping[str, str]] = (),
        prefix: Mapping[str, Any] | None = None,
        attention: Mapping[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ModelError(
                f"the checkpoint has calib format version {format_version}, this one reads {FORMAT_VERSION}",
                "install a newer calib, or export the model again",
            )
        if unknown:
            raise ModelError(
                f"quantization_config has unknown keys {sorted(unknown)}", "install the calib that wrote it"
            )
        for key, value in {"groups": groups, "rewrites": rewrites}.items():
            if not isinstance(value, Sequence) or not all(isinstance(each, Mapping) for each in value):
                raise ModelError(f"quantization_config: {key} is no list of objects", "install the calib that wrote it")
        for key, each in {"prefix": prefix, "attention": attention}.items():
            if each is not None and not isinstance(each, Mapping):
                raise ModelError(f"quantization_config: {key} is no object", "install the calib that wrote it")
        if isinstance(biased_linears, str) or not isinstance(biased_linears, Sequence):
            raise ModelError("quantization_config: biased_linears is no list", "install the calib that wrote it")
        for group in groups:
            if not isinstance(targets := group.get("targets"), list) or not all(isinstance(t, str) for t in targets):
                raise ModelError("quantization_config: a group names no targets", "install the calib that wrote it")
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' own is an enum of strings
        self.format_version = format_version
        self.groups = [dict(group) for group in groups]
        self.biased_linears = list(biased_linears)
        self.rewrites = [dict(rewrite) for rewrite in rewrites]
        self.prefix = None if prefix is None else dict(prefix)
        self.attention = None if attention is None else dict(attention)  # modules: names; matmuls, cache: formats


def describe(model: nn.Module) -> CalibConfig:
    """The CalibConfig of a quantized model in memory, without ``biased_linears`` (see checkpoint.py)."""
    groups: dict[str, dict[str, Any]] = {}
    for name, module in changed_linears(model).items():
        entry = describe_linear(module)
        groups.setdefault(repr(entry), {**entry, "targets": []})["targets"].append(name)
    prefix = getattr(model, "calib_prefix", None)
    shape = None
    if isinstance(prefix, Prefix):
        keys: Any = prefix.keys
        layers, kv_heads, _, head_dim = keys.shape
        shape = {"tokens": list(prefix.tokens), "layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
    rewrites: Any = getattr(model, "calib_rewrites", ())
    return CalibConfig(list(groups.values()), rewrites=rewrites, prefix=shape, attention=describe_attention(model))


def describe_attention(model: nn.Module) -> dict[str, Any] | None:
    """Which modules quantize their attention, and how; one format for all."""
    forms = {n: m.calib_attention for n, m in model.named_modules() if hasattr(m, "calib_attention")}
    if not forms:
        return None
    form = next(iter(forms.values()))
    assert isinstance(form, AttentionFormat)
    return {"modules": list(forms), **dataclasses.asdict(form)}


def install_attention(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Set the formats that ``describe_attention`` wrote."""
    specs = {k: None if config[k] is None else AffineSpec(**config[k]) for k in ("matmuls", "cache")}
    route_attention(model)
    for name in config["modules"]:
        form: Any = AttentionFormat(specs["matmuls"], specs["cache"], config["prefix"], config.get("turned", False))
        model.get_submodule(name).calib_attention = form


def build(model: PreTrainedModel, config: CalibConfig, dtype: torch.dtype) -> None:
    """Turn a stock model on the meta device into the skeleton that the checkpoint's tensors fit.

    Names of a model with a head also serve its headless class and the reverse, as everywhere in transformers.
    """
    from calib.model.linears import apply_rewrites

    rewrites = [{**r, "name": name} for r in config.rewrites if (name := _resolve(model, r["name"])) is not None]
    apply_rewrites(model, rewrites)
    with torch.device("meta"):
        for group in config.groups:
            for target in group["targets"]:
                name = _resolve(model, target)
                if name is not None:
                    _replace(model, name, quant_linear(model.get_submodule(name), group, target, dtype))
        for target in config.biased_linears:
            name = _resolve(model, target)
            if name is not None:
                module: Any = model.get_submodule(name)
                module.bias = nn.Parameter(torch.empty(len(module.weight), dtype=dtype))
        if config.prefix is not None:
            p = config.prefix
            model.calib_prefix = Prefix(p["tokens"], p["layers"], p["kv_heads"], p["head_dim"], dtype)


def _resolve(model: PreTrainedModel, name: str) -> str | None:
    """The name this class has for a module or parameter of the checkpoint's class; None: it has none."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        with contextlib.suppress(AttributeError):
            parent, _, leaf = candidate.rpartition(".")
            if hasattr(model.get_submodule(parent), leaf):
                return candidate
    if type(model).__name__ in (model.config.architectures or ()):
        raise ModelError(
            f"{type(model).__name__} has no {name}, which the checkpoint quantizes",
            "use the transformers that wrote it",
        )
    return None


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def tied_away(model: nn.Module) -> set[str]:
    """Parameter names that are copies of another and never stored."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def check_files(model: PreTrainedModel, files: Iterable[str | Path]) -> None:
    """Every tensor of the skeleton is in the files with its shape, and nothing else is; raises ModelError."""
    expected = {k: tuple(t.shape) for k, t in model.state_dict().items() if k not in tied_away(model)}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    names = []
    for file in files:
        names.append(Path(file).name)
        try:
            with safe_open(str(file), framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    found[key] = (names[-1], tuple(handle.get_slice(key).get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} is truncated or not safetensors: {error}", "export or copy the model again"
            ) from error
    if missing := sorted(expected.keys() - found.keys()):
        raise ModelError(f"{', '.join(names)}: tensor {some(missing)} is missing", "export the model again")
    if extra := sorted(found.keys() - expected.keys() - tied_away(model)):
        raise ModelError(
            f"{found[extra[0]][0]}: tensor {some(extra)} is not part of the model", "export the model again"
        )
    for key, shape in expected.items():
        file, stored = found[key]
        if stored != shape:
            raise ModelError(
                f"{file}: tensor {key} has shape {list(stored)}, the model needs {list(shape)}",
                "export the model again",
            )


def some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


class CalibHfQuantizer(HfQuantizer):
    """What transformers' from_pretrained calls for ``quant_method: calib``."""

    requires_calibration = True  # from_pretrained loads what calib.quantize wrote, and quantizes nothing
    quantization_config: CalibConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        build(model, self.quantization_config, kwargs.get("dtype") or model.dtype)
        files = kwargs.get("checkpoint_files")
        if files and type(model).__name__ in (model.config.architectures or ()):
            check_files(model, files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model.calib_rewrites = self.quantization_config.rewrites  # type: ignore[assignment]
        mode = os.environ.get(MODE_VARIABLE, "packed")
        if mode not in ("packed", "fake"):
            raise ModelError(f"{MODE_VARIABLE}={mode} is not a mode", "set it to packed or fake")
        set_mode(model, mode)
        keep_pages()
        prefix = getattr(model, "calib_prefix", None)
        if isinstance(prefix, Prefix):
            prefix.install(model)
        if self.quantization_config.attention is not None:
            install_attention(model, self.quantization_config.attention)
            if mode == "packed" and rounds_to_int8(model):
                use_int8_cache(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        return []  # stored under the names of the modules, as rebuilt: nothing to merge or rename

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def rounds_to_int8(model: nn.Module) -> bool:
    """Whether its cache is simulated in the very format that an int8 cache holds."""
    forms = [form for m in model.modules() if isinstance(form := getattr(m, "calib_attention", None), AttentionFormat)]
    return bool(forms) and all(form.cache == INT8 for form in forms)


def set_mode(model: nn.Module, mode: str) -> nn.Module:
    """Switch every quantized linear to 'packed', 'fake' or 'float' (see QuantLinear)."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.set_mode(mode)  # type: ignore[arg-type]
    return model


def register() -> None:
    """Make transformers know ``quant_method: calib``; safe to call again."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(CalibConfig)
        register_quantizer(METHOD)(CalibHfQuantizer)


__all__ = [
    "CalibConfig",
    "CalibHfQuantizer",
    "build",
    "check_files",
    "describe",
    "describe_linear",
    "linear_group",
    "register",
    "set_mode",
    "some",
    "tied_away",
]
