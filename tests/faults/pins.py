"""The pinned versions against the package index and against public advisories.

``python -m tests.faults.pins`` asks pip's own index, by ``pip index versions``, which releases of every pin of
constraints.txt it offers; a yanked release is not offered. ``--offline`` asks nothing. ``--advisories PATH`` holds the
pins against advisories in the OSV format: JSON or YAML, in a folder or a zip (pypa/advisory-database, OSV's all.zip).

Nothing is installed or downloaded but index pages. What was not asked is named, never counted as clean. Exit code 1: a
pin is hit or not offered; 2: a question asked had no answer. Where its services can be reached, ``pip-audit -r
constraints.txt`` asks the same of today's advisories.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

PINS = Path(__file__).parents[2] / "constraints.txt"
SILENT = 3  # questions in a row without an answer, after which the index is out of reach
KINDS = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Pin:
    """One ``name==version``; `here`: whether its marker holds for this Python."""

    name: str
    version: Version
    here: bool = True


@dataclass(frozen=True)
class Hit:
    pin: Pin
    names: tuple[str, ...]  # the advisory's id, then its aliases
    fixed: str

    def __str__(self) -> str:
        also = f" ({', '.join(self.names[1:])})" if self.names[1:] else ""
        return f"hit: {self.pin.name} {self.pin.version}: {self.names[0]}{also}, {self.fixed}"


@dataclass
class Advisories:
    """What was read of a folder or a zip: advisories by package, as (advisory, its `affected` entry)."""

    of: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = field(default_factory=dict)
    read: int = 0
    withdrawn: int = 0
    latest: str = ""
    unread: list[str] = field(default_factory=list)


def read_pins(file: Path) -> list[Pin]:
    """The pins of a constraints file. ValueError names a line that pins nothing."""
    pins = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        if not text:
            continue
        try:
            found = Requirement(text)
            ((operator, version),) = ((part.operator, part.version) for part in found.specifier)
            if operator != "==":
                raise ValueError(operator)
            pins.append(
                Pin(canonicalize_name(found.name), Version(version), found.marker is None or found.marker.evaluate())
            )
        except (InvalidRequirement, InvalidVersion, ValueError) as error:
            raise ValueError(f"{file.name}, line {number}: {text!r} is no name==version") from error
    return pins


def affected(version: Version, entry: dict[str, Any]) -> bool:
    """Whether an `affected` entry names a version: listed, or within an ECOSYSTEM range (OSV schema, evaluation)."""
    if any(str(version) == listed or version == version_of(listed) for listed in entry.get("versions") or ()):
        return True
    return any(within(version, span["events"]) for span in entry.get("ranges") or () if span.get("type") == "ECOSYSTEM")


def version_of(text: str) -> Version | None:
    """Releases older than today's rules bear names that are no version: None."""
    try:
        return Version(text)
    except InvalidVersion:
        return None


def within(version: Version, events: Iterable[dict[str, str]]) -> bool:
    """Walk a range's events in the order of their versions; a limit (other than ``*``) ends the range for good."""
    told = [(kind, value) for event in events for kind, value in event.items()]
    limits = [value for kind, value in told if kind == "limit"]
    if limits and not any(limit == "*" or version < Version(limit) for limit in limits):
        return False
    inside = False
    for kind, value in sorted((e for e in told if e[0] != "limit"), key=lambda event: Version(event[1])):
        if kind == "introduced" and version >= Version(value):
            inside = True
        elif (kind == "fixed" and version >= Version(value)) or (kind == "last_affected" and version > Version(value)):
            inside = False
    return inside


def fix_of(version: Version, entry: dict[str, Any]) -> str:
    """The first release after `version` that an entry calls fixed."""
    spans = (span for span in entry.get("ranges") or () if span.get("type") == "ECOSYSTEM")
    fixes = [Version(event["fixed"]) for span in spans for event in span["events"] if "fixed" in event]
    later = [fix for fix in fixes if fix > version]
    return f"fixed in {min(later)}" if later else "no fix named"


def documents(place: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every JSON and YAML file in a folder or a zip."""
    if place.is_dir():
        for file in sorted(place.rglob("*")):
            if file.suffix in KINDS and file.is_file():
                yield str(file.relative_to(place)), file.read_bytes()
        return
    with zipfile.ZipFile(place) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(KINDS):
                yield name, archive.read(name)


def read_advisories(place: Path) -> Advisories:
    """Every advisory that stands and names a PyPI package. What is no advisory is named in `unread`."""
    found = Advisories()
    for name, data in documents(place):
        try:
            advisory = json.loads(data) if name.endswith(".json") else yaml.safe_load(data)
            entries = [e for e in advisory["affected"] if e["package"]["ecosystem"] == "PyPI"]
            for entry in entries:
                affected(Version("0"), entry)  # every version in it can be compared
            dated = str(advisory.get("modified") or advisory.get("published") or "")[:10]
            named = [(canonicalize_name(entry["package"]["name"]), entry) for entry in entries]
            advisory["id"] = str(advisory["id"])
        except (ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            found.unread.append(f"{name} ({type(error).__name__})")
            continue
        found.read += 1
        found.latest = max(found.latest, dated)
        if advisory.get("withdrawn"):
            found.withdrawn += 1
            continue
        for package, entry in named:
            found.of.setdefault(package, []).append((advisory, entry))
    return found


def hits(pins: Iterable[Pin], advisories: Advisories) -> list[Hit]:
    return [
        Hit(pin, (advisory["id"], *map(str, advisory.get("aliases") or ())), fix_of(pin.version, entry))
        for pin in pins
        for advisory, entry in advisories.of.get(pin.name, ())
        if affected(pin.version, entry)
    ]


def offered(name: str, seconds: int = 20) -> list[Version]:
    """The releases that pip's index offers this Python, newest first; yanked ones are not among them. LookupError: why
    there is no answer.
    """
    command = [sys.executable, "-m", "pip", "index", "versions", name, "--timeout", str(seconds), "--retries", "1"]
    command += ["--disable-pip-version-check", "--no-color", "--no-input"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=4 * seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LookupError(type(error).__name__) from error
    listed = re.search(r"^Available versions: (.+)$", done.stdout, re.MULTILINE)
    if done.returncode or not listed:
        said = (done.stderr.strip() or f"pip ended with {done.returncode}").splitlines()[-1]
        raise LookupError(re.sub(r"\w+://\S+", "...", said))  # an index's address may hold a password
    found = [version_of(text.strip()) for text in listed[1].split(",")]
    return [version for version in found if version is not None]


def ask_index(pins: list[Pin], ask: Callable[[str], list[Version]] | None) -> tuple[int, int]:
    """Print what the index says of the pins: how many are not offered, how many questions had no answer."""
    if ask is None:
        print(f"index: not asked (--offline): whether {len(pins)} pins are offered, yanked or behind is unknown")
        return 0, 0
    gone: list[str] = []
    behind: list[str] = []
    unasked = [f"{pin.name} (not for Python {platform.python_version()})" for pin in pins if not pin.here]
    mute: dict[str, str] = {}
    row = 0
    for pin in pins:
        if not pin.here:
            continue
        if row >= SILENT:
            mute[pin.name] = "not asked after these"
            continue
        try:
            releases, row = ask(pin.name), 0
        except LookupError as error:
            mute[pin.name], row = str(error), row + 1
            continue
        if pin.version not in releases:
            gone.append(f"not offered (yanked, or gone): {pin.name} {pin.version}, newest {releases[0]}")
        if releases[0] > pin.version:
            behind.append(f"{pin.name} {pin.version} < {releases[0]}")
    answered = len(pins) - len(unasked) - len(mute)
    print(f"index: answered for {answered} of {len(pins)} pins: {len(gone)} not offered, {len(behind)} behind")
    for line in gone:
        print(line)
    for what, which in (("behind", behind), ("not asked", unasked)):
        if which:
            print(f"{what}: {', '.join(which)}")
    for name, why in mute.items():
        print(f"no answer: {name}: {why}")
    return len(gone), len(mute)


def ask_advisories(pins: list[Pin], place: Path | None) -> tuple[int, int]:
    """Print what advisories say of the pins: how many hits, how many files could not be read."""
    if place is None:
        print(f"advisories: none given (--advisories): whether {len(pins)} pins are named by one is unknown")
        return 0, 0
    found = read_advisories(place)
    names = {pin.name for pin in pins}
    of = {name: len({advisory["id"] for advisory, _ in found.of[name]}) for name in sorted(names & found.of.keys())}
    hit = hits(pins, found)
    print(
        f"advisories: {found.read} read, the newest of {found.latest or 'no date'}, {found.withdrawn} withdrawn; "
        f"{len(of)} of {len(names)} packages are named by one; {len({h.pin.name for h in hit})} pins hit"
    )
    if of:
        print(f"held against: {', '.join(f'{name} {count}' for name, count in of.items())}")
    if names - of.keys():
        print(f"no advisory at hand: {', '.join(sorted(names - of.keys()))}")
    for name in found.unread:
        print(f"not an advisory: {name}")
    for each in hit:
        print(each)
    return len(hit), len(found.unread)


def main(arguments: list[str] | None = None, ask: Callable[[str], list[Version]] = offered) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.pins", description=__doc__.splitlines()[0])
    parser.add_argument("--pins", type=Path, default=PINS, help="a file of name==version lines")
    parser.add_argument("--advisories", type=Path, help="a folder or zip of OSV files")
    parser.add_argument("--offline", action="store_true", help="ask no index")
    options = parser.parse_args(arguments)
    if options.offline and options.advisories is None:
        parser.error("nothing to ask: --offline without --advisories")
    try:
        pins = read_pins(options.pins)
        print(f"{options.pins.name}: {len(pins)} pins, {datetime.date.today()}, Python {platform.python_version()}")
        gone, mute = ask_index(pins, None if options.offline else ask)
        hit, unread = ask_advisories(pins, options.advisories)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        parser.error(str(error))
    return 1 if gone or hit else 2 if mute or unread else 0


if __name__ == "__main__":
    sys.exit(main())
