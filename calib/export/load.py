"""Read a checkpoint back: calib's own, compressed-tensors, or plain floats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from calib.errors import InputError, ModelError
from calib.export import compressed_load, hf
from calib.files import check_files
from calib.memory import keep_pages
from calib.model.skeleton import known_config
from calib.model.store import shards
from calib.nn import use_int8_cache
from calib.threads import one_at_a_time

AGAIN = "export or copy the model again"


def load(
    path: str | Path,
    mode: Literal["packed", "fake"] = "packed",
    dtype: torch.dtype | None = None,
    *,
    kv_cache: Literal["int8"] | None = None,
    progress: bool = False,
) -> nn.Module:
    """The model of a folder (or a name that model_zoo knows), in eval mode, with its prefix where it has one.

    mode: 'packed' runs integer kernels where this machine has one for the format, 'fake' the arithmetic that
    defines their result; both for calib's own format and for compressed-tensors, as far as its grids are
    calib's own (else its package runs it). dtype: of everything that is not codes or scales; default: as stored.
    kv_cache: 'int8' holds the keys and values of forward and ``generate`` as int8, one range a token and head, of any
    decoder; a packed checkpoint of --kv-bits 8 does so anyway. Raises ModelError, one line that names file and tensor,
    for what is missing, truncated, unknown or too new.
    """
    return _load(path, mode, dtype, kv_cache, progress, tokenizer=False)[0]


def load_pair(
    path: str | Path,
    mode: Literal["packed", "fake"] = "packed",
    dtype: torch.dtype | None = None,
    *,
    kv_cache: Literal["int8"] | None = None,
    progress: bool = False,
) -> tuple[nn.Module, Any]:
    """`load`'s model and its tokenizer (None where the folder has none)."""
    return _load(path, mode, dtype, kv_cache, progress, tokenizer=True)


@one_at_a_time
def _load(
    path: str | Path, mode: str, dtype: torch.dtype | None, kv_cache: str | None, progress: bool, *, tokenizer: bool
) -> tuple[nn.Module, Any]:
    """tokenizer: read, too; it takes some 40 MiB of which most is garbage at once."""
    from model_zoo.sources import load_model, load_network

    if mode not in ("packed", "fake"):
        raise InputError(f"unknown mode {mode!r}", "use packed or fake")
    if kv_cache not in (None, "int8"):
        raise InputError(f"unknown kv_cache {kv_cache!r}", "use int8, or None for floats")
    if Path(path).is_dir():
        config = check_folder(Path(path))
        if (config.get("quantization_config") or {}).get("quant_method") == compressed_load.METHOD:
            model = compressed_load.load_integer(Path(path), config, dtype)
            if model is not None:
                return _ready(model, mode, kv_cache), load_tokenizer(path) if tokenizer else None
    given: Any = {"dtype": "auto" if dtype is None else dtype, "progress": progress}
    with known_config(path):
        network, words = load_model(str(path), **given) if tokenizer else (load_network(str(path), **given), None)
    return _ready(network, mode, kv_cache), words


def _ready(model: nn.Module, mode: str, kv_cache: str | None) -> nn.Module:
    keep_pages()
    hf.set_mode(model, mode)
    if kv_cache is not None:
        return use_int8_cache(model)
    if mode == "fake" and hasattr(model, "calib_int8_cache"):
        model.calib_int8_cache = False  # type: ignore[assignment]  # simulated, as all the rest
    return model


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a folder or a name that model_zoo knows; None where there is none."""
    from model_zoo import sources

    found = sources.resolve(str(path), progress=False)
    try:
        return sources.load_tokenizer(found)
    except (OSError, ValueError):
        return None


def check_folder(path: Path) -> dict[str, Any]:
    """The folder's config.json; every safetensors header is read and held against its file's size."""
    check_files(path)
    config = read_config(path)
    shards(path)
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is truncated or not safetensors ({error})", AGAIN) from error
    return config


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dict; its calib section, if any, is validated. Raises ModelError."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read ({error.strerror})", "name a folder that holds a saved model"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON ({error})", AGAIN) from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a model's config", AGAIN)
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == hf.METHOD:
        hf.CalibConfig.from_dict(quantization)
    return config
