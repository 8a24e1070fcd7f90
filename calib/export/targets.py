"""Every format that a model can be written in, by name, and the way from a finished checkpoint to another format."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from calib.errors import InputError, ModelError, OutputError
from calib.export import awq, checkpoint, compressed, gguf, gptq, onnx, plain
from calib.export.files import HISTORY, Finish, check_out, read_manifest
from calib.export.load import load_pair
from calib.export.verify import REFERENCE, VerifyReport, reference_of, verifying
from calib.export.weight_only import ACTIVATIONS, drop_inputs
from calib.nn import changed_linears
from calib.recipe import Recipe

Format = Literal["auto", "calib", "compressed-tensors", "float", "gptq", "awq", "gguf", "onnx"]
WRITERS: Mapping[str, Any] = {w.FORMAT: w for w in (checkpoint, compressed, plain, gptq, awq, gguf, onnx)}
STREAMED = (checkpoint.FORMAT, compressed.FORMAT, plain.FORMAT)  # written block by block; the others from the whole
STOCK = (compressed.FORMAT, gptq.FORMAT, awq.FORMAT, gguf.FORMAT)  # hold no fused transform and no prefix
PACKAGES = {gguf.FORMAT: ("gguf",), onnx.FORMAT: ("onnx", "onnxscript", "onnxruntime")}
NEAREST = (
    compressed.FORMAT,
    onnx.FORMAT,
    gguf.FORMAT,
    awq.FORMAT,
    plain.FORMAT,
)  # what is offered instead, in this order


def require(format: str) -> None:
    """Raise InputError where a format's packages are missing."""
    missing = [name for name in PACKAGES.get(format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        cause = (
            f"format {format} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        )
        raise InputError(cause, f"pip install 'calib[{format}]'")


def refuse(
    format: str,
    recipe: Recipe,
    dtype: torch.dtype,
    model: nn.Module | None = None,
    rewrites: Sequence[Mapping[str, str]] = (),
) -> None:
    """Raise InputError for what a format cannot hold of any result of the recipe, before anything is computed.

    model, rewrites: the float model and its plan's, where they are known already.
    """

    def why(each: str) -> list[str]:
        writer: Any = WRITERS.get(each)  # None: auto
        if each in (compressed.FORMAT, onnx.FORMAT):
            found = writer.refusals(recipe, dtype)
        else:
            found = writer.refusals(recipe) if hasattr(writer, "refusals") else []
        return found + (writer.unsuited(model, rewrites) if model is not None and hasattr(writer, "unsuited") else [])

    if reasons := why(format):
        nearest = next((each for each in NEAREST if each != format and not why(each)), checkpoint.FORMAT)
        raise InputError(
            f"{format} cannot express this: {'; '.join(reasons)}",
            "use --format calib, or auto"
            if nearest == checkpoint.FORMAT
            else f"use --format {nearest}, or --format calib",
        )
    require(format)


def reasons(model: nn.Module, format: str) -> list[str]:
    """Why a format cannot hold this model; empty where it can."""
    if format == checkpoint.FORMAT:
        return []
    found: list[str] = WRITERS[format].expressible(model)
    return found


def save(
    model: nn.Module,
    tokenizer: Any,
    out: str | os.PathLike[str],
    format: str,
    *,
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    finish: Finish | None = None,
) -> Path:
    """Write the model, complete or not at all. OutputError says why a format cannot hold it and which can."""
    if why := reasons(model, format):
        nearest = next((each for each in NEAREST if each != format and not reasons(model, each)), checkpoint.FORMAT)
        more = ", or --weights-only" if all(ACTIVATIONS in reason for reason in why) else ""
        raise OutputError(f"{format} cannot express this model: {'; '.join(why)}", f"use --format {nearest}{more}")
    require(format)
    path: Path = WRITERS[format].save(
        model, tokenizer, Path(out), manifest=manifest, overwrite=overwrite, finish=finish
    )
    return path


def convert(
    source: str | os.PathLike[str],
    format: str,
    out: str | os.PathLike[str],
    *,
    weights_only: bool = False,
    overwrite: bool = False,
    verified: bool = True,
) -> VerifyReport | None:
    """Write a finished checkpoint (calib's, or compressed-tensors on grids that calib knows) in another format.

    weights_only: leave the inputs' grids behind, as formats of weights need; the model is then another one, and that is
    what the target is verified against. Returns the verification, done by the target's own loader in a fresh process
    before anything stands at ``out``. Raises InputError, ModelError, OutputError, VerifyError.
    """
    if format not in WRITERS:
        raise InputError(f"unknown format {format!r}", f"use {', '.join(WRITERS)}")
    folder = Path(source)
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}", "name a folder that calib quantize wrote")
    if folder.resolve() == Path(out).expanduser().resolve():
        raise OutputError(f"{out} is the checkpoint to convert", "choose another --out")
    require(format)
    check_out(out, overwrite=overwrite)
    model, tokenizer = load_pair(folder, "fake")
    if not changed_linears(model):
        raise ModelError(f"{folder} holds no linear that calib quantized", "name a folder that calib quantize wrote")
    if weights_only:
        drop_inputs(model)
    finish, reports = None, list[VerifyReport]()
    if verified:
        inputs = _stored_inputs(folder)
        finish, reports = verifying(reference_of(model, inputs, format), inputs)

    save(model, tokenizer, out, format, manifest=_history(folder, weights_only), overwrite=overwrite, finish=finish)
    return reports[0] if reports else None


def _stored_inputs(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / REFERENCE
    try:
        found = {k.removeprefix("input."): t for k, t in load_file(file).items() if k.startswith("input.")}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file} is missing or damaged", "quantize with --verify, or export with --no-verify"
        ) from error
    if not found:
        raise ModelError(f"{file} holds no inputs", "quantize again, or export with --no-verify")
    return found


def _history(folder: Path, weights_only: bool) -> dict[str, Any]:
    """What the source's manifest says of its making, and from which files it was converted."""
    before = read_manifest(folder)
    kept: dict[str, Any] = {key: before[key] for key in HISTORY if key in before}
    return {**kept, "converted_from": before.get("sha256"), "weights_only": weights_only}
