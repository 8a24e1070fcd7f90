"""GGUF files become safetensors folders once: reading fp32 tensors takes a second, dequantizing takes twenty-five.

The conversion runs in a process of its own, so that its memory (about twice the model) is not part of the caller's
peak.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from calib.errors import CalibError, ModelError, OutputError
from model_zoo.cache import cached_folder, file_sha256, manifest_of

VERSION = 1  # of what a conversion writes; a new one converts again
SHARD = "5GB"
# By text, so that no folder but ours comes first on the path (running this file would put its neighbours there).
CHILD = "import sys; sys.path[0] = sys.argv[1]; from model_zoo.convert import main; sys.exit(main(sys.argv[2:]))"


def safetensors_folder(gguf: Path, name: str, *, progress: bool = True) -> Path:
    """The cached folder with ``gguf``'s model: fp32 safetensors, config, generation config, tokenizer.

    Converts where the cache has no whole folder for this file and this VERSION; one process does, the others wait.
    Raises ModelError for a file that transformers cannot read, OutputError where the cache cannot be written.
    """
    try:
        key = file_sha256(gguf)[:12]
    except OSError as error:
        raise ModelError(
            f"cannot read {gguf}: {error.strerror or error}", "check the path and its permissions"
        ) from error

    def convert(fresh: Path, _: Path) -> None:
        if progress:
            print(f"{name}: converting the GGUF file to safetensors, once", file=sys.stderr, flush=True)
        _convert_apart(gguf.absolute(), fresh, name)

    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", gguf.stem)[:80]
    return cached_folder(f"{safe}-{key}-fp32-v{VERSION}", is_whole, convert, f"converting {name}")


def is_whole(folder: Path) -> bool:
    """True where the folder has every file of its manifest, with its hash, and no weights beside them."""
    manifest = manifest_of(folder) or {}
    weights = {file.name for file in folder.glob("*.safetensors")}
    return "config.json" in manifest and bool(weights) and weights <= set(manifest)


def _convert_apart(gguf: Path, folder: Path, name: str) -> None:
    """`main` in a fresh process; its errors come back as what they are."""
    said = folder.with_name("error.json")
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",  # a local file needs nothing from there
        "CUDA_VISIBLE_DEVICES": "",  # on a GPU transformers may keep the weights packed
        "PYTHONWARNINGS": "ignore",
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD, root, str(gguf), str(folder), str(said), name],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        check=False,
    )
    if child.returncode == 0 and (folder / "config.json").is_file():
        return
    with contextlib.suppress(OSError, ValueError, KeyError):
        report = json.loads(said.read_text(encoding="utf-8"))
        kinds: dict[str, type[CalibError]] = {kind.__name__: kind for kind in CalibError.__subclasses__()}
        raise kinds[report["kind"]](report["cause"], report["fix"])
    if child.returncode == -9:
        raise ModelError(f"converting {name} was killed, most likely for lack of memory", "free memory and try again")
    lines = [line for line in child.stderr.splitlines() if line.strip()] or [f"exit code {child.returncode}"]
    raise ModelError(f"cannot convert {name}: {lines[-1][:200]}", "check the GGUF file")


def _convert(gguf: Path, folder: Path, name: str) -> None:
    """Write the model of a GGUF file as fp32 safetensors. In the child process only."""
    import torch
    from transformers.utils import logging

    from model_zoo.sources import ResolvedModel, load_model

    logging.set_verbosity_error()
    found = ResolvedModel(name, str(gguf.parent), "folder", name, gguf_file=gguf.name)
    model, tokenizer = load_model(found, dtype=torch.float32, progress=False)
    state = model.state_dict()
    if packed := [key for key, value in state.items() if not value.dtype.is_floating_point]:
        raise ModelError(f"{name} keeps {packed[0]} packed", "update transformers")
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):  # from here on plain floats
        model.__dict__.pop(mark, None)
    model._weight_conversions = None  # type: ignore[assignment]  # those that loaded it have GGUF's names
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    needed = sum({v.data_ptr(): v.nbytes for v in state.values()}.values())  # tied weights count once
    free = shutil.disk_usage(folder.parent).free
    try:
        if free < needed + (64 << 20):
            raise OSError(errno.ENOSPC, f"{free >> 20} MiB free, {needed >> 20} needed")
        folder.mkdir()
        model.save_pretrained(folder, max_shard_size=SHARD)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except Exception as error:  # safetensors raises a class of its own, tokenizers a plain Exception
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise OutputError(
            f"cannot write {name} in fp32 to the model cache {folder.parents[1]}: {' '.join(str(error).split())[:160]}",
            "free some space or set CALIB_CACHE to another disk",
        ) from error


def main(arguments: list[str]) -> int:
    """What the child runs: GGUF FOLDER ERROR.json NAME."""
    gguf, folder, said, name = arguments
    try:
        _convert(Path(gguf), Path(folder), name)
    except CalibError as error:
        report = {"kind": type(error).__name__, "cause": error.cause, "fix": error.fix}
        Path(said).write_text(json.dumps(report), encoding="utf-8")
        return error.exit_code
    return 0
