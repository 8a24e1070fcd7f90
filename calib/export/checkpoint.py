"""calib's own checkpoint: a transformers folder whose config.json says how its linears are quantized."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calib.errors import OutputError
from calib.export import hf
from calib.export.files import MANIFEST, Finish, finished, made_of, nbytes, staged, write_json, write_tensors
from calib.files import code_sha256

FORMAT = "calib"


def save(
    model: nn.Module,
    tokenizer: Any,
    out: str | Path,
    *,
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    finish: Finish | None = None,
) -> Path:
    """Write a quantized model to the folder ``out``, complete or not at all; returns its path.

    config.json, model.safetensors (sharded past 5 GB, tied weights once, every tensor in its own dtype),
    tokenizer, generation config, and ``calib.json``: the manifest with versions and the sha256 of the weight
    files. finish: called with the complete folder before it takes the place of ``out``, to verify it; what
    it returns goes into the manifest. Raises OutputError for a folder that cannot or must not be written, or
    a model that this format cannot hold.
    """
    stock = require_transformers(model)
    quantization, config = describe(stock)
    tensors = state(stock)
    with staged(out, overwrite=overwrite, needed_bytes=nbytes(tensors)) as stage:
        config.quantization_config = quantization.to_dict()
        write_folder(stage, stock, config, tokenizer, tensors, {**manifest, "format": FORMAT})
        finished(stage, out, finish)
    return Path(out).expanduser().absolute()


def describe(model: PreTrainedModel) -> tuple[hf.CalibConfig, Any]:
    """The quantization config and the plain config that rebuild the model, checked by rebuilding it."""
    quantization = hf.describe(model)
    config = plain_config(model)
    skeleton = stock_on_meta(type(model), config)
    hf.build(skeleton, quantization, model.dtype)
    have, want = _shapes(model), _shapes(skeleton)
    gained = (name.removesuffix(".bias") for name in have.keys() - want.keys() if name.endswith(".bias"))
    quantization.biased_linears = sorted(name for name in gained if f"{name}.weight" in want)
    if quantization.biased_linears:
        skeleton = stock_on_meta(type(model), config)
        hf.build(skeleton, quantization, model.dtype)
        want = _shapes(skeleton)
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise OutputError(
                f"{name} is {have.get(name, 'absent')} in the model and {want.get(name, 'absent')} in its "
                f"class {type(model).__name__}, which no checkpoint can express",
                "save before changing the model by hand, or report this as a bug",
            )
    return quantization, config


def _shapes(model: PreTrainedModel) -> dict[str, str]:
    tied = hf.tied_away(model) if _tied_in_memory(model) else ()
    return {name: str(list(t.shape)) for name, t in model.state_dict().items() if name not in tied}


def require_transformers(model: nn.Module) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise OutputError(
            f"{type(model).__name__} is not a transformers model, and checkpoints are transformers folders",
            "keep the result's .model, or save its state_dict() yourself",
        )
    return model


def plain_config(model: PreTrainedModel) -> Any:
    """A copy of the model's config, unquantized, with ties as they are in memory."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    if getattr(config, "tie_word_embeddings", False) and not _tied_in_memory(model):
        config.tie_word_embeddings = False
    return config


def _tied_in_memory(model: PreTrainedModel) -> bool:
    tensors = model.state_dict(keep_vars=True)
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return all(a in tensors and tensors[a] is tensors.get(b) for a, b in ties.items())


def stock_on_meta(cls: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """The class's own model for a config, without memory."""
    with torch.device("meta"):
        return cls(copy.deepcopy(config)).eval()


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds, by name: persistent ones, tied weights once."""
    tied = hf.tied_away(model) if _tied_in_memory(model) else set()
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return {name: t for name, t in model.state_dict().items() if name not in tied and name not in ignored}


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    """``stored``, with aliases of other tensors copied."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in stored(model).items():
        address = tensor.untyped_storage().data_ptr()
        whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        tensors[name] = tensor.detach() if address not in seen and whole else tensor.detach().clone()
        seen.add(address)
    return tensors


def write_folder(
    stage: Path,
    model: PreTrainedModel,
    config: Any,
    tokenizer: Any,
    tensors: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
) -> None:
    """Everything of a checkpoint, manifest last."""
    write_rest(stage, model, config, tokenizer, manifest, write_tensors(stage, tensors))


def write_rest(
    stage: Path,
    model: PreTrainedModel,
    config: Any,
    tokenizer: Any,
    manifest: Mapping[str, Any],
    hashes: Mapping[str, str],
) -> None:
    """What a checkpoint has beside its weights; hashes: weight file -> sha256."""
    config.save_pretrained(stage)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(stage)
    if tokenizer is not None:
        tokenizer.save_pretrained(stage)
    made = made_of(manifest) | {"code": code_sha256()}
    write_json(stage / MANIFEST, {**manifest, "versions": versions(), "made_of": made, "sha256": hashes})


def versions() -> dict[str, str]:
    """Of everything that decides what is in a checkpoint."""
    from calib import __version__  # not from the metadata: a checkout has none

    found = {"calib": __version__}
    for name in ("torch", "transformers", "safetensors", "compressed-tensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
