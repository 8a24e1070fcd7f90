"""GGUF files become safetensors folders once: reading fp32 tensors takes a second, dequantizing takes twenty-five.

The conversion runs in a process of its own, so that its memory (about twice the model) is not part of the caller's
peak. A finished folder appears by one rename and carries the hashes of its files, as in fetch.py.
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
import tempfile
from functools import lru_cache
from pathlib import Path

from filelock import FileLock
from filelock import Timeout as LockTimeout

from calib.errors import CalibError, ModelError, OutputError
from model_zoo.fetch import MANIFEST, _sha256, cache_dir

VERSION = 1  # of what a conversion writes; a new one converts again
LOCK_SECONDS = 1800.0
SHARD = "5GB"
# By text, so that no folder but ours comes first on the path (running this file would put its neighbours there).
CHILD = "import sys; sys.path[0] = sys.argv[1]; from model_zoo.convert import main; sys.exit(main(sys.argv[2:]))"


def file_sha256(path: Path) -> str:
    """The file's sha256, read once a process as long as size and time of change stay."""
    stat = path.stat()
    return _known_sha256(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=256)
def _known_sha256(path: str, size: int, changed: int, inode: int) -> str:
    return _sha256(Path(path))


def safetensors_folder(gguf: Path, name: str, *, progress: bool = True) -> Path:
    """The cached folder with ``gguf``'s model: fp32 safetensors, config, generation config, tokenizer.

    Converts where the cache has no whole folder for this file and this VERSION; one process does, the others wait.
    Raises ModelError for a file that transformers cannot read, OutputError where the cache cannot be written.
    """
    root = cache_dir() / "models"
    try:
        key = file_sha256(gguf)[:12]
    except OSError as error:
        raise ModelError(
            f"cannot read {gguf}: {error.strerror or error}", "check the path and its permissions"
        ) from error
    folder = root / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', gguf.stem)[:80]}-{key}-fp32-v{VERSION}"
    try:
        if is_whole(folder):
            return folder
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{folder.name}.lock", timeout=LOCK_SECONDS):
            if is_whole(folder):  # another process was faster
                return folder
            for stale in root.glob(f".{folder.name}.tmp-*"):  # of killed conversions: we hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=root))
            try:
                if progress:
                    print(f"{name}: converting the GGUF file to safetensors, once", file=sys.stderr, flush=True)
                fresh = work / "model"
                _convert_apart(gguf.absolute(), fresh, name)
                _seal(fresh)
                if folder.exists():
                    shutil.rmtree(folder)
                fresh.replace(folder)
                _fsync(root)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except LockTimeout as error:
        raise ModelError(
            f"another process has been converting {name} for {LOCK_SECONDS / 60:.0f} minutes",
            f"wait for it, or end it and delete {error.lock_file}",
        ) from error
    except OSError as error:
        raise OutputError(
            f"cannot write the model cache {root}: {error.strerror or error}",
            "free some space or set CALIB_CACHE to a folder you can write",
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """True where the folder has every file of its manifest, with its hash, and no weights beside them."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        weights = {file.name for file in folder.glob("*.safetensors")}
        whole = "config.json" in manifest and bool(weights) and weights <= set(manifest)
        return whole and all(file_sha256(folder / file) == digest for file, digest in manifest.items())
    except (OSError, ValueError, TypeError):
        return False


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


def _seal(folder: Path) -> None:
    """Flush every file, then write the manifest of their hashes and flush it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        _fsync(file)
    manifest = {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _fsync(folder / MANIFEST)
    _fsync(folder)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
