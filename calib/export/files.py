"""Output folders that are finished or absent: staged beside the target, moved into place at the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from calib.engine import Journal
from calib.errors import CalibError, ModelError, OutputError
from calib.files import check_files, digest, is_special, sha256, sync

MANIFEST = "calib.json"  # in every export, whatever its format: what makes a folder ours to replace
HISTORY = ("model", "data", "recipe", "plan", "tuning", "tuning_data")  # of a manifest: how it was made
MAX_SHARD = "5GB"
SLACK_BYTES = 32 * 2**20  # tokenizer, config, manifest, verification batch
Finish = Callable[[Path], Mapping[str, Any]]


def check_out(out: str | os.PathLike[str], *, overwrite: bool = False, needed_bytes: int = 0) -> Path:
    """The absolute path of an output folder; refuses, before any work, one that could not be written.

    A missing or empty folder, or an earlier calib output, is fine. Anything else needs ``overwrite``, and
    even then a folder that holds the working directory, the home directory or a repository is never replaced.
    """
    path = Path(out).expanduser().absolute()
    with writing(path):
        _sweep(path)
        check_place(path)
        if path.exists() and not path.is_dir():
            if not overwrite:
                raise OutputError(f"{path} is a file, not a folder", "choose another --out, or pass --overwrite")
        elif path.is_dir() and not _ours(path):
            if not overwrite:
                raise OutputError(
                    f"{path} exists and holds something that calib did not write",
                    "choose another --out, or pass --overwrite",
                )
            here = (Path.cwd(), Path.home())
            if any(path == p or path in p.parents for p in here) or (path / ".git").exists():
                raise OutputError(f"{path} holds more than a model and is never replaced", "choose another --out")
        parent = next(p for p in path.parents if p.exists())  # the rest is made when there is something to write
        Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=parent)).rmdir()
        free = shutil.disk_usage(parent).free
    if needed_bytes and free < needed_bytes + SLACK_BYTES:
        raise OutputError(
            f"{parent} has {free / 2**20:.0f} MiB free and the checkpoint needs "
            f"{(needed_bytes + SLACK_BYTES) / 2**20:.0f}",
            "free some space or choose another --out",
        )
    return path


def open_journal(out: str | os.PathLike[str], fingerprint: Mapping[str, Any], *, anew: bool) -> Journal:
    """The journal of the run that writes ``out``, beside it so that the last step is a rename; see Journal."""
    path = Path(out).expanduser().absolute()
    with writing(path):
        return Journal(path.parent / f".{path.name}.partial", fingerprint, anew=anew)


def _ours(path: Path) -> bool:
    names = [p.name for p in path.iterdir()]
    return MANIFEST in names or all(name.startswith(".calib") for name in names)


@contextlib.contextmanager
def writing(path: Path, option: str = "--out") -> Iterator[None]:
    """Turn what the file system says into one line. option: what named the path."""
    try:
        yield
    except Exception as error:
        # safetensors raises a class of its own, tokenizers a plain Exception that quotes the system
        known = isinstance(error, (OSError, SafetensorError)) or "os error" in str(error)
        if not known or isinstance(error, CalibError):
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        cause = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        fix = f"free some space or choose another {option}" if full else f"choose an {option} that this user can write"
        raise OutputError(f"cannot write {path}: {cause}", fix) from error


@contextlib.contextmanager
def staged(out: str | Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary sibling folder to write into; on success it becomes ``out``, on failure it is gone."""
    path = check_out(out, overwrite=overwrite, needed_bytes=needed_bytes)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
    try:
        with writing(path), _held(stage):
            yield stage
            publish(stage, path)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Keep other runs from sweeping a folder; False where another one keeps it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Remove what killed runs left beside ``path``; what one of them had just moved out of its place is put back."""
    ours = re.compile(re.escape(f".{path.name}.") + r"(tmp|old)-[a-z0-9_]{8}")
    for stray in path.parent.iterdir() if path.parent.is_dir() else ():
        if not ours.fullmatch(stray.name) or not stray.is_dir():
            continue
        with contextlib.suppress(FileNotFoundError), _held(stray) as held:
            if not held:
                continue
            if (stray / path.name).exists() and ".old-" in stray.name and not path.exists():
                (stray / path.name).rename(path)
            shutil.rmtree(stray, ignore_errors=True)


def publish(stage: Path, path: Path) -> None:
    """Put a complete folder in the place of ``path``, on the same file system, readable as the umask says."""
    mask = _umask()  # mkdtemp and safetensors write private files, an output folder is not
    for file in [*stage.rglob("*"), stage]:
        file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)
        sync(file)
    _move(stage, path)
    sync(path.parent)


def finished(stage: Path, out: str | Path, finish: Finish | None) -> None:
    """Call finish on a written stage and add what it returns to the manifest; its errors name ``out``."""
    if finish is None:
        return
    path = Path(out).expanduser().absolute()
    try:
        added = finish(stage)
    except CalibError as error:
        cause = error.cause.replace(str(stage), str(path))
        raise type(error)(f"{cause}, so {path.name} was not written", error.fix) from error
    file = stage / MANIFEST
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **added})


def _move(stage: Path, path: Path) -> None:
    if not path.exists():
        stage.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent)) / path.name
    with _held(old.parent):
        path.rename(old)
        try:
            stage.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old.parent, ignore_errors=True)  # not where it was stopped: _sweep puts it back


def check_place(path: Path, option: str = "--out") -> None:
    """Refuse to put anything in the place of a pipe or a device (/dev/null, for root). Raises OutputError."""
    if is_special(path):
        raise OutputError(f"{path} is a pipe or a device, not a file", f"choose another {option}")


@contextlib.contextmanager
def placed(path: Path, option: str = "--out") -> Iterator[Path]:
    """A file beside ``path`` that takes its place when it is finished, and is gone where it is not.

    A killed run leaves it; the next one that writes ``path`` begins it anew.
    """
    check_place(path, option)
    with writing(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            yield part
            sync(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write ``model.safetensors`` (past 5 GB shards and their index); returns file name -> sha256."""
    plan = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD
    )
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous() for key in keys}, str(folder / name), metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return {name: sha256(folder / name) for name in plan.filename_to_tensors}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an export says of itself; empty where it says nothing. Raises ModelError."""
    file = folder / MANIFEST
    check_files(folder)
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is damaged", "export the model again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} is damaged", "export the model again")
    return found


def made_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of each part of what a manifest says a checkpoint was made of."""
    return {key: digest(manifest[key]) for key in HISTORY if key in manifest}


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
