"""Weights that stay on disk but while they are used: what lets a model larger than memory be calibrated.

The network is built on the meta device. A *unit* is a block, or the own tensors of one module outside the blocks; its
tensors are read when its forward begins (or while it is held) and are gone when it ends. A finished block's tensors
come back from the file that holds its result.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from calib.errors import ModelError, NumericsError
from calib.files import is_file_name
from calib.model.blocks import block_candidates
from calib.nn import QuantLinear
from calib.quantizers import FLOAT8

AGAIN = "download or save the model again"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": FLOAT8,
}
Convert = Callable[[Tensor], Tensor]
Part = tuple[nn.Module, str, str, Convert | None]  # where a stored tensor goes, its name there, how it is made


class TensorFiles:
    """The tensors of safetensors files, by name; nothing stays open.

    safetensors checks a file's header; data are read, not mapped: mapped pages would count as this process's memory
    beside the copy that is made of them.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[torch.dtype, int]] = {}
        for file in files:
            try:
                with safe_open(str(file), framework="pt"):
                    pass
                with file.open("rb") as handle:
                    size = int.from_bytes(handle.read(8), "little")
                    header = json.loads(handle.read(size))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} is truncated or not safetensors ({error})", AGAIN) from error
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] not in DTYPES:
                    raise _odd(file, name, entry["dtype"])
                self.where[name], self.shapes[name] = file, tuple(entry["shape"])
                self._places[name] = DTYPES[entry["dtype"]], 8 + size + entry["data_offsets"][0]

    @classmethod
    def of(cls, folder: Path) -> TensorFiles:
        """Those of a float model's folder, single or sharded. Raises ModelError where weights are float8."""
        files = cls(shards(folder) or _single(folder))
        for name, (dtype, _) in files._places.items():
            if dtype == FLOAT8:  # quantized already, with a scale somewhere that no plan knows
                raise _odd(files.where[name], name, "F8_E4M3")
        return files

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Each named tensor, as it is stored, file by file in the order it lies there."""
        for name in sorted(names, key=lambda name: (self.where[name], self._places[name][1])):
            dtype, offset = self._places[name]
            tensor = torch.empty(self.shapes[name], dtype=dtype)
            try:
                with self.where[name].open("rb", buffering=0) as handle:
                    handle.seek(offset)
                    self._fill(tensor, handle, self.where[name])
            except OSError as error:
                raise ModelError(f"{self.where[name]} cannot be read ({error})", AGAIN) from error
            yield name, tensor

    @staticmethod
    def _fill(tensor: Tensor, handle: IO[bytes], file: Path) -> None:
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        while len(view):  # a single read stops at 2 GiB
            got = handle.readinto(view)  # type: ignore[attr-defined]
            if not got:
                raise ModelError(f"{file} ended early", AGAIN)
            view = view[got:]


def _odd(file: Path, name: str, dtype: str) -> ModelError:
    return ModelError(f"{file}: {name} is of type {dtype}", "give a float or bfloat16 model")


def shards(folder: Path) -> list[Path]:
    """The files that a folder's index names; none without an index. Raises ModelError.

    A name is a file's in the folder and nothing else: an index that leads out of it would have other files read.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} is damaged", AGAIN) from error
    for name in names:
        if not is_file_name(name) or Path(name).suffix != ".safetensors":
            raise ModelError(f"{index} names {name!r}, which is no safetensors file beside it", AGAIN)
        if not (folder / name).is_file():
            raise ModelError(f"{index} names {name}, which is not there", AGAIN)
    return [folder / name for name in names]


def _single(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    raise ModelError(f"{folder} has no model.safetensors and no index of shards", AGAIN)


@dataclass(eq=False)
class _Slot:
    """One tensor of the network: who holds it, what stands there while it is on disk, where it is read."""

    name: str
    owners: list[tuple[nn.Module, str]]
    placeholder: Tensor
    files: TensorFiles
    key: str
    convert: Convert | None = None
    users: int = 0
    checked: bool = False


@dataclass(eq=False)
class _Unit:
    module: nn.Module
    slots: list[_Slot] = field(default_factory=list)
    users: int = 0


class Resident:
    """A model that is in memory as a whole: nothing to load, nothing to release."""

    streamed = False

    def hold(self, *names: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def around(self, module: str) -> contextlib.AbstractContextManager[None]:
        """Hold the unit that has the own tensors of a module outside the blocks."""
        return contextlib.nullcontext()

    def keeping(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def each(self) -> Iterator[Callable[[str], bool]]:
        """Parts of the model in turn, each in memory while it is the current one: tells which names are of it."""
        yield lambda name: True

    def rewritten(self, rewrites: Sequence[Mapping[str, str]]) -> None:
        """The model's products were brought into Linear form."""

    def replaced(self, name: str, files: Callable[[], TensorFiles]) -> None:
        """Unit ``name`` is finished, and its tensors can be read from ``files()``."""


class Streamed(Resident):
    """A model on the meta device over the files that hold its weights, cast to ``dtype`` when read.

    Raises ModelError (the cause says which tensor) where a parameter has no tensor of its name and shape.
    """

    streamed = True

    def __init__(self, model: nn.Module, files: TensorFiles, dtype: torch.dtype) -> None:
        self.model, self.files, self.dtype = model, files, dtype
        self._kept: list[_Unit] | None = None
        self._units: dict[str, _Unit] = {}
        slots: dict[int, _Slot] = {}  # by id of the placeholder: tied tensors share one
        self._blocks = blocks = set(block_candidates(model))  # asked once: finished ones hold no Linear any more
        for name, module in model.named_modules():
            outer = next((b for b in blocks if name == b or name.startswith(b + ".")), None)
            unit_name = name if outer is None else outer
            own = [*module.named_parameters(recurse=False), *_persistent(module)]
            if not own and unit_name != name:
                continue
            if own or unit_name in blocks:
                if unit_name not in self._units:
                    self._units[unit_name] = _Unit(model.get_submodule(unit_name))
                    _wrap(self._units[unit_name].module, functools.partial(self.hold, unit_name))
                unit = self._units[unit_name]
                for attribute, tensor in own:
                    unit.slots.append(self._slot(slots, f"{name}.{attribute}".lstrip("."), module, attribute, tensor))
        for slot in slots.values():
            if slot.key not in files.where:
                raise ModelError(f"no tensor {slot.name} is stored", "load the model as a whole")
            if files.shapes[slot.key] != tuple(slot.placeholder.shape):
                raise ModelError(f"tensor {slot.name} is stored in another shape", "load the model as a whole")

    def _slot(self, slots: dict[int, _Slot], name: str, module: nn.Module, attribute: str, tensor: Tensor) -> _Slot:
        slot = slots.get(id(tensor))
        if slot is None:
            if tensor.device.type != "meta":
                tensor = tensor.to("meta")  # a persistent buffer: the file's value counts
            slot = slots[id(tensor)] = _Slot(name, [], tensor, self.files, name)
        elif name in self.files.where and slot.key not in self.files.where:
            slot.key = name  # of tied names, the one that is stored
        slot.owners.append((module, attribute))
        return slot

    @contextlib.contextmanager
    def hold(self, *names: str) -> Iterator[None]:
        """The units' tensors are in memory inside."""
        units = [self._units[name] for name in names]
        try:
            for unit in units:
                self._load(unit)
            yield
        finally:
            for unit in units:
                if self._kept is None:
                    self._release(unit)
                else:
                    self._kept.append(unit)

    def around(self, module: str) -> contextlib.AbstractContextManager[None]:
        return self.hold(module) if module in self._units else contextlib.nullcontext()

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """What runs inside stays in memory until the end: for modules that run once a batch."""
        self._kept = []
        try:
            yield
        finally:
            kept, self._kept = self._kept, None
            for unit in kept:
                self._release(unit)

    def each(self) -> Iterator[Callable[[str], bool]]:
        for unit in self._units:
            with self.hold(unit):
                if unit in self._blocks:
                    yield lambda name, start=unit + ".": name.startswith(start)  # type: ignore[misc]
                else:
                    yield lambda name, whole=unit: name.rpartition(".")[0] == whole  # type: ignore[misc]

    def _load(self, unit: _Unit) -> None:
        unit.users += 1
        wanted: dict[int, list[_Slot]] = {}
        for slot in unit.slots:
            slot.users += 1
            if slot.users == 1:
                wanted.setdefault(id(slot.files), []).append(slot)
        for slots in wanted.values():
            by_key: dict[str, list[_Slot]] = {}
            for slot in slots:
                by_key.setdefault(slot.key, []).append(slot)
            for key, stored in slots[0].files.read(list(by_key)):
                for slot in by_key[key]:
                    self._put(slot, stored)
        if unit.users == 1:
            _forget(unit.module)

    def _put(self, slot: _Slot, stored: Tensor) -> None:
        value = stored if slot.convert is None else slot.convert(stored)
        original = slot.files is self.files
        if slot.placeholder.is_floating_point() and not value.is_floating_point() and original:
            kind = str(stored.dtype).removeprefix("torch.")
            raise ModelError(f"tensor {slot.name} is stored as {kind}, and the model computes with floats there", AGAIN)
        cast = value.is_floating_point() and original
        tensor = value.to(self.dtype if cast else value.dtype).contiguous()
        if slot.convert is not None and tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()  # a part must not keep the whole alive
        if original and not slot.checked and tensor.is_floating_point():
            if not is_finite(tensor):
                raise NumericsError(f"weight {slot.name} holds NaN or inf", "repair or download the checkpoint again")
            slot.checked = True
        _set(slot, nn.Parameter(tensor, requires_grad=False) if isinstance(slot.placeholder, nn.Parameter) else tensor)

    def _release(self, unit: _Unit) -> None:
        unit.users -= 1
        for slot in unit.slots:
            slot.users -= 1
            if slot.users == 0:
                _set(slot, slot.placeholder)
        if unit.users == 0:
            _forget(unit.module)

    def rewritten(self, rewrites: Sequence[Mapping[str, str]]) -> None:
        """Point the Linears that took the place of other modules at the tensors these were read from."""
        modules = dict(self.model.named_modules())
        for rewrite in rewrites:
            name = rewrite["name"]
            for unit in self._units.values():
                for slot in list(unit.slots):
                    if rewrite["kind"] == "conv1d" and slot.name in (f"{name}.weight", f"{name}.bias"):
                        attribute = slot.name.rpartition(".")[2]
                        convert = Tensor.t if attribute == "weight" else None
                        self._point(unit, slot, [(modules[name], attribute, slot.name, convert)])
                    elif rewrite["kind"] == "parameter" and slot.name == name:
                        new = modules[name]
                        parts: list[Part] = [(new, "weight", f"{name}.weight", None)]
                        if isinstance(new, nn.ModuleList):
                            parts = [
                                (m, "weight", f"{name}.{i}.weight", functools.partial(torch.select, dim=0, index=i))
                                for i, m in enumerate(new)
                            ]
                        self._point(unit, slot, parts)

    def _point(self, unit: _Unit, old: _Slot, parts: Sequence[Part]) -> None:
        unit.slots.remove(old)
        for module, attribute, name, convert in parts:
            placeholder = getattr(module, attribute)
            unit.slots.append(_Slot(name, [(module, attribute)], placeholder, old.files, old.key, convert))

    def replaced(self, name: str, files: Callable[[], TensorFiles]) -> None:
        """The unit's tensors, as they are now, are those of ``files()``; called while it is held."""
        unit, stored = self._units[name], files()
        slots = []
        for path, module in unit.module.named_modules(prefix=name):
            for attribute, tensor in [*module.named_parameters(recurse=False), *_persistent(module)]:
                key = f"{path}.{attribute}"
                placeholder = torch.empty_like(tensor, device="meta")
                if isinstance(tensor, nn.Parameter):
                    placeholder = nn.Parameter(placeholder, requires_grad=False)
                slots.append(_Slot(key, [(module, attribute)], placeholder, stored, key, users=unit.users))
        if missing := [slot.key for slot in slots if slot.key not in stored.where]:
            raise ModelError(f"tensor {missing[0]} is missing from the finished part of {name}", "start anew")
        unit.slots = slots


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity, without a temporary of the tensor's size."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _persistent(module: nn.Module) -> list[tuple[str, Tensor]]:
    skip = module._non_persistent_buffers_set
    return [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if name not in skip]


def _set(slot: _Slot, tensor: Tensor) -> None:
    for module, attribute in slot.owners:
        where: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
        where[attribute] = tensor


def _forget(module: nn.Module) -> None:
    """Drop what kernels prepared from tensors that have come or gone."""
    for part in module.modules():
        if isinstance(part, QuantLinear):
            part.set_mode(part.mode)


def _wrap(module: nn.Module, hold: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with hold():
            return inner(*args, **kwargs)

    module.forward = forward
