"""A journal becomes a checkpoint: the blocks' shards are there already, the rest is added, the whole is moved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calib.engine import Journal
from calib.errors import VerifyError
from calib.export import checkpoint, compressed, plain
from calib.export.files import Finish, check_out, finished, publish, write_json, writing
from calib.files import sha256
from calib.model import Resident, TensorFiles
from calib.nn import Prefix

CONVERTED = {compressed.FORMAT: compressed.tensors_of, plain.FORMAT: plain.tensors_of}
SHARD_BYTES = 256 * 2**20  # of what is outside the blocks, together in a file


class Shards:
    """Which file takes which tensors: one a block, the others in groups of at most 256 MiB, in order."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[str]) -> None:
        self.groups: list[list[str]] = [[]]
        size = 0
        for name, tensor in checkpoint.stored(model).items():
            if any(name.startswith(f"{block}.") for block in blocks):
                continue
            bytes_ = tensor.numel() * tensor.element_size()
            if self.groups[-1] and size + bytes_ > SHARD_BYTES:
                self.groups.append([])
                size = 0
            self.groups[-1].append(name)
            size += bytes_
        count = len(blocks) + len(self.groups)
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self.blocks = dict(zip(blocks, files, strict=False))
        self.outside = files[len(blocks) :]


def write(
    journal: Journal,
    shards: Shards,
    model: PreTrainedModel,
    store: Resident,
    tokenizer: Any,
    out: Path,
    *,
    format: str,
    manifest: Mapping[str, Any],
    overwrite: bool,
    finish: Finish,
) -> Path:
    """Complete the journal's ``model`` folder and move it to ``out``. finish: verifies it, as in checkpoint.save."""
    out = check_out(out, overwrite=overwrite)
    with writing(out):
        stage = journal.model
        zero_biases: dict[str, int] = {}
        if format in CONVERTED:
            if format == compressed.FORMAT:
                config, zero_biases = compressed.stock_config(model)
                config.quantization_config = compressed.quantization_config(model)
            else:
                config, zero_biases = plain.described(model)
            stage = journal.folder / "converted"
            stage.mkdir(exist_ok=True)
            _convert(journal, shards, model, store, stage, CONVERTED[format])
        else:
            quantization, config = checkpoint.describe(model)
            config.quantization_config = quantization.to_dict()
        extra = {name: compressed.zero_bias(model, size) for name, size in zero_biases.items()}
        prefix = getattr(model, "calib_prefix", None)
        if isinstance(prefix, Prefix):
            extra |= {f"calib_prefix.{name}": tensor for name, tensor in prefix.state_dict().items()}
        for number, (file, names) in enumerate(zip(shards.outside, shards.groups, strict=True)):
            last = number == len(shards.groups) - 1
            _store_outside(journal, f"{stage.name}/{file}", model, store, names, extra if last else {})
        files = [stage / file for file in [*shards.blocks.values(), *shards.outside]]
        _index(stage, files)
        hashes = {file.name: sha256(file) for file in files}
        checkpoint.write_rest(stage, model, config, tokenizer, {**manifest, "format": format}, hashes)
        try:
            finished(stage, out, finish)
        except VerifyError:
            journal.close(remove=True)  # another run would only come to the same
            raise
        publish(stage, out)
    journal.close(remove=True)
    return out


def _store_outside(
    journal: Journal,
    file: str,
    model: PreTrainedModel,
    store: Resident,
    names: Sequence[str],
    extra: Mapping[str, Tensor],
) -> None:
    """Write tensors outside the blocks, which are in memory only meanwhile."""
    parents = {name: name.rpartition(".")[0] for name in names}
    with contextlib.ExitStack() as held:
        for parent in dict.fromkeys(parents.values()):
            held.enter_context(store.around(parent))
        found = {name: getattr(model.get_submodule(parents[name]), name.rpartition(".")[2]) for name in names}
        journal.store(file, {name: tensor.detach().contiguous() for name, tensor in found.items()} | dict(extra))


def _convert(
    journal: Journal,
    shards: Shards,
    model: PreTrainedModel,
    store: Resident,
    stage: Path,
    tensors_of: Callable[[nn.Module, str, torch.dtype, Sequence[Mapping[str, str]]], dict[str, Tensor]],
) -> None:
    """The blocks' shards in another form."""
    rewrites: Any = getattr(model, "calib_rewrites", ())
    for block, file in shards.blocks.items():
        with store.hold(block):
            tensors = tensors_of(model.get_submodule(block), block, model.dtype, rewrites)
            journal.store(f"{stage.name}/{file}", tensors)


def _index(stage: Path, files: Sequence[Path]) -> None:
    stored = TensorFiles(files)
    weight_map = {name: file.name for name, file in sorted(stored.where.items())}
    total = sum(file.stat().st_size for file in files)
    write_json(stage / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
