"""What every room that reads or writes files needs of the file system."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from calib.errors import ModelError


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_special(path: Path) -> bool:
    """True of a pipe, a device or a socket: reading one may never end, and writing must not put a file in its place."""
    try:
        return path.exists() and not path.is_file() and not path.is_dir()
    except OSError:  # out of reach; whoever opens it says why
        return False


def check_files(folder: Path) -> None:
    """Refuse, before anything in it is opened, a model folder with a pipe or a device in it. Raises ModelError."""
    for path in (*folder.glob("*"), *folder.glob("verify/*")):
        if is_special(path):
            raise ModelError(f"{path} is a pipe or a device, not a file", "download or export the model again")


def is_file_name(name: object) -> bool:
    """True of a plain name of a file in a folder, which leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def digest(value: Any) -> str:
    """Hex sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@functools.lru_cache
def code_sha256() -> str:
    """Of the package's own source files: a checkout has one version number for many states."""
    root = Path(__file__).parent
    return digest({file.relative_to(root).as_posix(): sha256(file) for file in sorted(root.rglob("*.py"))})
