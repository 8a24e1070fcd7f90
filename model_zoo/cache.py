"""Folders of the model cache: whole or absent, made by one process while the others wait.

A finished folder appears by one rename and carries a manifest of its files' hashes, checked at every use, so a killed
download or conversion, a damaged cache and two processes at once all end in either the whole model or an error.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from filelock import FileLock
from filelock import Timeout as LockTimeout

from calib.errors import ModelError, OutputError
from calib.files import sha256, sync

MANIFEST = "calib-manifest.json"
LOCK_SECONDS = 1800.0


def cache_dir() -> Path:
    """``$CALIB_CACHE``, else ``~/.cache/calib``."""
    return Path(os.environ.get("CALIB_CACHE") or "~/.cache/calib").expanduser()


def cached_folder(name: str, whole: Callable[[Path], bool], make: Callable[[Path, Path], None], doing: str) -> Path:
    """``models/NAME`` of the cache, made where ``whole`` does not accept what is there.

    make(fresh, work): writes the folder ``fresh`` in a scratch folder ``work``. doing: as in "fetching smollm2-135m".
    Raises ModelError where another process holds the lock for half an hour, OutputError where the cache cannot be
    written.
    """
    root = cache_dir() / "models"
    folder = root / name
    try:
        if whole(folder):
            return folder
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock", timeout=LOCK_SECONDS):
            if whole(folder):  # another process was faster
                return folder
            for stale in root.glob(f".{name}.tmp-*"):  # of killed processes: we hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=root))
            try:
                fresh = work / "model"
                make(fresh, work)
                seal(fresh)
                if folder.exists():
                    shutil.rmtree(folder)
                fresh.replace(folder)
                sync(root)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except LockTimeout as error:
        raise ModelError(
            f"another process has been {doing} for {LOCK_SECONDS / 60:.0f} minutes",
            f"wait for it, or end it and delete {error.lock_file}",
        ) from error
    except OSError as error:
        raise OutputError(
            f"cannot write the model cache {root}: {error.strerror or error}",
            "free some space or set CALIB_CACHE to a folder you can write",
        ) from error
    return folder


def seal(folder: Path) -> None:
    """Flush every file, then write the manifest of their hashes and flush it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        sync(file)
    manifest = {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def manifest_of(folder: Path) -> dict[str, str] | None:
    """File -> sha256 of a folder whose files all have the hash that its manifest gives; None of any other."""
    try:
        manifest: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all(file_sha256(folder / file) == digest for file, digest in manifest.items())
    except (OSError, ValueError, TypeError, AttributeError):  # absent, or cut short, or not a manifest
        return None
    return manifest if whole else None


def file_sha256(path: Path) -> str:
    """The file's sha256, read once a process as long as size and time of change stay."""
    stat = path.stat()
    return _known_sha256(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=256)
def _known_sha256(path: str, size: int, changed: int, inode: int) -> str:
    return sha256(Path(path))
