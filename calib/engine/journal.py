"""What lets a killed run go on: a folder beside the output with one shard and one line for each finished block.

It holds ``model/``, which becomes the checkpoint by a rename, and beside it what only a later run needs. The first
line of ``journal.jsonl`` is the fingerprint of the run: model, data, recipe, versions. A block's tensors are written
to a file of their own, which is synced and renamed before its line is added, so a line stands for a whole file; a
line cut short by a kill is dropped.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calib.errors import CalibError, InputError, ModelError, OutputError
from calib.files import sha256, sync
from calib.model import Resident, TensorFiles
from calib.nn import AttentionFormat, changed_linears, describe_linear, quant_linear
from calib.observers import ranks
from calib.quantizers import AffineSpec

LINES, LOCK, CARRIED = "journal.jsonl", ".lock", "carried"
ANEW = "pass --overwrite to start anew"


class Journal:
    """The working folder of one run. Raises InputError where an earlier run there was another one, by what differs;
    OutputError where its files are not what it wrote, or another process is at work."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], *, anew: bool = False) -> None:
        """Rank 0 of a distributed run writes the journal; the others open it when rank 0 has, and read it."""
        if ranks.rank() > 0:
            ranks.meet("opening the journal")
        self.folder = folder
        self.records: dict[str, dict[str, Any]] = {}
        self.model = folder / "model"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / LOCK).open("w")
        self._head = json.loads(json.dumps(fingerprint, default=str))
        if ranks.rank() > 0:
            self.read()
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"another process is writing {folder}", "wait for it, or choose another --out") from error
        if anew or not self.model.is_dir():  # without it the run that this was has ended
            self._clear()
        self._open()
        ranks.meet("opening the journal")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the journal's run was begun with."""
        return dict(self._head)

    @property
    def resumed(self) -> int:
        """How many blocks an earlier run finished."""
        return len(self.records)

    def _open(self) -> None:
        file = self.folder / LINES
        lines = _whole_lines(file)
        if not lines:
            self._clear()
            _append(file, self._head)
            return
        head = lines[0]
        if head != self._head:
            name, before, now = _difference(head, self._head)
            raise InputError(f"{self.folder} was begun with another {name} ({before}, now {now})", ANEW)
        self.read()
        for record in self.records.values():
            for shard in ("shard", "carried"):
                if record.get(shard) is not None:
                    self._check(record[shard])

    def read(self) -> None:
        """Take the finished blocks from the file, where another process may have added some."""
        self.records = {record["block"]: record for record in _whole_lines(self.folder / LINES)[1:]}

    def expect(self, blocks: Collection[str]) -> None:
        """Raise OutputError for a finished block that the model does not have."""
        if odd := [name for name in self.records if name not in blocks]:
            raise OutputError(f"the journal in {self.folder} is of another model: it holds {odd[0]}", ANEW)

    def _clear(self) -> None:
        for stray in self.folder.iterdir():
            if stray.name != LOCK:
                shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
        self.model.mkdir()

    def _check(self, entry: Mapping[str, str]) -> None:
        file = self.folder / entry["file"]
        if ".." in file.parts or file.parts[: len(self.folder.parts)] != self.folder.parts:
            raise OutputError(f"the journal in {self.folder} names {entry['file']}, which is not of it", ANEW)
        if not file.is_file():
            raise OutputError(f"{file} is missing, which the journal calls finished", ANEW)
        if sha256(file) != entry["sha256"]:
            raise OutputError(f"{file} is not the file that was written (sha256 differs)", ANEW)

    def write(
        self, name: str, block: nn.Module, shard: str, record: Mapping[str, Any], carried: Mapping[str, Tensor]
    ) -> None:
        """A finished block: its tensors, the tensors that later blocks need, and what is known of it."""
        tensors = {f"{name}.{key}": value.detach().contiguous() for key, value in block.state_dict().items()}
        line = {
            "block": name,
            "shard": self.store(f"model/{shard}", _unaliased(tensors)),
            "carried": self.store(f"{CARRIED}-{len(self.records)}.safetensors", carried) if carried else None,
            "structure": _structure(block),
            **record,
        }
        _append(self.folder / LINES, line)
        self.records[name] = json.loads(json.dumps(line, default=str))

    def store(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Write a safetensors file, whole or not at all; its name and sha256."""
        part, file = self.folder / f"{name}.part", self.folder / name
        save_file(dict(tensors), str(part), metadata={"format": "pt"})
        sync(part)
        part.replace(file)
        sync(file.parent)
        return {"file": name, "sha256": sha256(file)}

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """What is found out before the first block, for a later run."""
        entry = self.store(f"{name}.safetensors", tensors)
        part = self.folder / f"{name}.json.part"
        part.write_text(json.dumps(entry))
        sync(part)
        part.replace(self.folder / f"{name}.json")

    def kept(self, name: str) -> dict[str, Tensor] | None:
        """What ``keep`` was given; None where no run came so far."""
        file = self.folder / f"{name}.json"
        if not file.is_file():
            return None
        entry = json.loads(file.read_text())
        self._check(entry)
        return load_file(self.folder / entry["file"])

    def files(self, name: str) -> TensorFiles:
        """Where a finished block's tensors are."""
        return TensorFiles([self.folder / self.records[name]["shard"]["file"]])

    def carried(self, name: str) -> dict[str, Tensor]:
        """The tensors ``write`` was given beside the block."""
        entry = self.records[name]["carried"]
        return {} if entry is None else load_file(self.folder / entry["file"])

    def restore(self, name: str, block: nn.Module, store: Resident, dtype: torch.dtype) -> None:
        """Give an untouched block the form of the finished one, and its tensors (when held, if it is streamed)."""
        structure = self.records[name]["structure"]
        try:
            with torch.device("meta"):
                for path, form in structure["linears"].items():
                    block.set_submodule(path, quant_linear(block.get_submodule(path), form, f"{name}.{path}", dtype))
            for path, form in structure["attention"].items():
                formats = {k: None if form[k] is None else AffineSpec(**form[k]) for k in ("matmuls", "cache")}
                block.get_submodule(path).calib_attention = AttentionFormat(
                    **formats, prefix=form["prefix"], turned=form["turned"]
                )  # type: ignore[assignment]
        except (CalibError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"the record of {name} in {self.folder / LINES} is damaged ({error})", ANEW) from error
        files = self.files(name)
        have = block.state_dict()
        for key in files.where:
            path = key.removeprefix(name + ".")
            if path not in have:  # a bias that the fold brought
                parent, _, leaf = path.rpartition(".")
                empty = torch.empty(files.shapes[key], dtype=dtype, device="meta")
                setattr(block.get_submodule(parent), leaf, nn.Parameter(empty, requires_grad=False))
        if store.streamed:
            store.replaced(name, lambda: files)
            return
        tensors = {key.removeprefix(name + "."): t.clone() for key, t in files.read(list(files.where))}
        missing, unexpected = block.load_state_dict(tensors, strict=False, assign=True)
        if missing or unexpected:
            raise ModelError(f"{self.folder}: {(missing or unexpected)[0]} does not fit {name}", ANEW)
        for parameter in block.parameters():
            parameter.requires_grad_(False)

    def close(self, *, remove: bool) -> None:
        """Let go of the folder; what is worth nothing to a later run is removed."""
        if ranks.rank() == 0 and (remove or not self.records):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def _structure(block: nn.Module) -> dict[str, Any]:
    linears = {path: describe_linear(module) for path, module in changed_linears(block).items()}
    forms = {path: m.calib_attention for path, m in block.named_modules() if hasattr(m, "calib_attention")}
    return {
        "linears": linears,
        "attention": {p: dataclasses.asdict(f) for p, f in forms.items() if isinstance(f, AttentionFormat)},
    }


def _unaliased(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors stores no two names for one memory."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen and tensor.numel():
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """The journal's lines; the last is dropped where a kill cut it short, and cut off the file."""
    if not file.is_file():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with file.open("r+b") as handle:
            handle.truncate(len(whole))
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(json.loads(line))
            if number > 1:
                lines[-1]["block"], lines[-1]["shard"]["file"], lines[-1]["shard"]["sha256"]
                lines[-1]["structure"]["linears"].items(), lines[-1]["structure"]["attention"].items()
            lines[-1].keys()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise OutputError(f"line {number} of {file} is damaged", ANEW) from error
    return lines


def _append(file: Path, line: Mapping[str, Any]) -> None:
    with file.open("ab") as handle:
        handle.write(json.dumps(line, default=str).encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())
    sync(file.parent)


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str, str]:
    """The innermost name whose values differ, and both values."""
    for key in dict.fromkeys([*before, *now]):
        a, b = before.get(key), now.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            name, x, y = _difference(a, b)
            return f"{key} {name}", x, y
        return key, _short(a), _short(b)
    return "run", "?", "?"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
