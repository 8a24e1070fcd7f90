"""What stands before a run: the model and where its weights are, the data as tokens, and what is refused by then."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor, nn

from calib.data import TokenData, calibration_data, generate_windows, ids_of, sequence_limit
from calib.data.read import is_path
from calib.errors import DataError, InputError, ModelError, NumericsError, OutputError, VerifyError
from calib.evaluate.held import Held, held_rows
from calib.evaluate.result import vocabulary
from calib.export import checkpoint
from calib.export.files import read_manifest
from calib.export.load import read_config
from calib.files import digest, sha256
from calib.model import Plan, Resident, is_finite, to_dtype
from calib.model.cost import BUDGET, estimate, refuse
from calib.model.skeleton import known_config
from calib.model.store import shards
from calib.nn import changed_linears
from calib.observers import ranks
from calib.recipe import Recipe

Model = str | os.PathLike[str] | nn.Module
DRAWN = 16  # rows that those held out are chosen from


def world_size() -> int:
    """Processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_named(name: str) -> torch.device:
    """The device that blocks run on: under torchrun each process's own of several. Raises InputError for none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}", "use cpu, cuda or cuda:1") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise InputError(f"there is no {device.type} device that torch can use here", "use --device cpu")
    if ":" not in name:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def join_ranks(model: Model, out: str | os.PathLike[str] | None, device: torch.device | None = None) -> None:
    """Take part in the run that torchrun started, if it did. Raises InputError where a run cannot be shared."""
    if world_size() == 1:
        return
    if isinstance(model, nn.Module) or out is None:
        raise InputError("several processes need a model by name and an --out", "give both, or run without torchrun")
    if not dist.is_initialized():
        dist.init_process_group("gloo" if device is None or device.type == "cpu" else "nccl")


def load_model(
    model: Model, tokenizer: Any, dtype: torch.dtype, progress: bool, *, streamed: bool
) -> tuple[nn.Module, Any, Resident, str]:
    """The model, its tokenizer, where its weights are (in its files where that can be, if ``streamed``), and why they
    are in memory where they were meant not to be.
    """
    if isinstance(model, nn.Module):
        if changed_linears(model):
            raise InputError("the model is quantized already", "start from the float model")
        model = model.eval().requires_grad_(False)
        _check_finite(model)
        return to_dtype(model, dtype), tokenizer, Resident(), ""
    from model_zoo import sources, stream

    source = sources.resolve(model, progress=progress)
    if source.gguf_file is None and (Path(source.path) / "config.json").is_file():  # known before it is loaded
        _check_float(source.name, read_config(Path(source.path)).get("quantization_config"))
        shards(Path(source.path))
    store, network, why = Resident(), None, ""
    if streamed:
        try:
            with known_config(source.name):
                network, store, found = stream.open_streamed(source, dtype=dtype, progress=progress)
        except stream.NotStreamable as error:
            why = f"weights are held in memory, not streamed: {error.cause}"
    if network is None:
        with known_config(source.name):
            network, found = sources.load_model(source, dtype=dtype, progress=progress)
        _check_finite(network)
    _check_float(source.name, getattr(network.config, "quantization_config", None))
    network.requires_grad_(False)
    return network, tokenizer if tokenizer is not None else found, store, why


def tokenizer_of(model: Model) -> Any:
    """The tokenizer of a model with files, None where it has none."""
    from model_zoo import sources

    assert not isinstance(model, nn.Module)
    return sources.load_tokenizer(sources.resolve(model, progress=False))


def too_large(model: Model) -> str:
    """Why a model cannot be tried out in memory, beside a copy of itself; empty where it can."""
    if isinstance(model, nn.Module):
        size = sum(p.numel() * p.element_size() for p in model.parameters())
    else:
        from model_zoo import sources

        folder = Path(sources.resolve(model, progress=False).path)
        size = 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))  # fp32 of what may be bf16
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 3
    return f"the model takes {size >> 20} MiB, more than a third of the memory" if size > room else ""


def memory_budget(
    network: nn.Module, store: Resident, recipe: Recipe, dtype: torch.dtype, max_memory: int | None
) -> int | None:
    """Bytes of hidden states to keep in memory. Raises InputError where the run cannot stay within ``max_memory``."""
    if max_memory is None:
        return BUDGET if store.streamed else None
    if not store.streamed:
        cause = "--max-memory holds where weights are streamed from their files, and this model was loaded whole"
        raise InputError(cause, "leave it out, or give a model of another architecture")
    estimated = estimate(network.config, recipe, dtype=dtype, max_memory=max_memory, world=ranks.world())
    return refuse(estimated, max_memory).in_memory


def about_model(model: Model, network: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """What a report says of the float model; ``files``: the sha256 of each, where they are known."""
    owners = {id(p): p for p in network.parameters()}.values()
    return {
        "name": type(model).__name__ if isinstance(model, nn.Module) else str(model),
        "class": type(network).__name__,
        "parameters": sum(p.numel() for p in owners),
        "float_bytes": sum(p.numel() * p.element_size() for p in owners),
        "float_bits": 8 * dtype.itemsize,
        "files": {},
    }


def fingerprint(
    model: str | os.PathLike[str],
    recipe: BaseModel,
    tokens: TokenData,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """All that decides what a run writes."""
    return {
        "model": model_hashes(model),
        "data": tokens.fingerprint,
        "recipe": recipe.model_dump(mode="json"),
        "dtype": str(dtype),
        **({} if device is None or device.type == "cpu" else {"device": device.type}),
        "versions": checkpoint.versions(),
    }


def model_hashes(model: str | os.PathLike[str]) -> dict[str, str] | str:
    """sha256 of a model's weight files and config; its name where it has none here."""
    from model_zoo import sources

    folder = Path(sources.resolve(model, progress=False).path)
    files = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".gguf") or p.name == "config.json")
    return {file.name: sha256(file) for file in files} or str(model)


def source_of(model: Model) -> dict[str, str] | str:
    """``model_hashes`` of a model that has files."""
    return "given in memory" if isinstance(model, nn.Module) else model_hashes(model)


def check_source(folder: Path, model: str | os.PathLike[str]) -> None:
    """Hold what a checkpoint says it was made from against a float model's files. Raises VerifyError."""
    said, found = read_manifest(folder).get("model"), model_hashes(model)
    if not isinstance(said, dict) or not isinstance(found, dict):
        whose = model if isinstance(said, dict) else folder
        raise ModelError(f"{whose} does not name the files of a float model", "verify without --model")
    if changed := sorted(name for name in said.keys() | found.keys() if said.get(name) != found.get(name)):
        cause = f"{folder} was not made from {model}: {changed[0]} differs"
        raise VerifyError(cause, "name the model that it was made from")


def training_folder(out: str | os.PathLike[str], about: dict[str, Any]) -> Path:
    """Where the run that ``about`` describes keeps its training's state: another's is never found."""
    return _training_folders(out) / digest(about)[:16]


def forget_training(out: str | os.PathLike[str]) -> None:
    """Remove what trainings towards ``out`` kept."""
    shutil.rmtree(_training_folders(out), ignore_errors=True)


def _training_folders(out: str | os.PathLike[str]) -> Path:
    path = Path(out).expanduser().absolute()
    return path.parent / f".{path.name}.tuning"


def is_self(data: Any) -> bool:
    """True where the model writes its own data: it then runs, whole, before it is quantized."""
    return isinstance(data, str) and data == "self"


class Drawn(Protocol):
    """How much data a recipe draws."""

    @property
    def samples(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def batch_size(self) -> int: ...


def calibration_tokens(
    model: nn.Module, tokenizer: Any, data: Any, recipe: Recipe, progress: bool = False
) -> TokenData:
    """Windows of running text for generative models, padded sentences for encoders."""
    return model_tokens(model, tokenizer, data, recipe, **_room(recipe), progress=progress)


def model_tokens(
    model: nn.Module, tokenizer: Any, data: Any, drawn: Drawn, *, asked: bool, prefix: int, progress: bool = False
) -> TokenData:
    """Data as the model reads it, in windows it takes after a prefix of so many tokens. asked: seq_len was, and a
    generative model that cannot take it is an error."""
    arguments = _data_arguments(model, tokenizer, drawn, asked=asked, prefix=prefix)
    if getattr(model, "main_input_name", "") == "input_features" and (data is None or is_self(data)):
        raise DataError(
            f"{type(model).__name__} hears sound: no text calibrates it",
            "give dicts of input_features and decoder_input_ids, or a .safetensors file of them, as data",
        )
    if is_self(data):
        data = generate_windows(model, tokenizer, drawn.samples, arguments["seq_len"], drawn.seed, progress=progress)
    return calibration_data(data, tokenizer, **arguments)


def held_out(
    model: nn.Module, plan: Plan, store: Resident, tokenizer: Any, data: Any, recipe: Recipe, tokens: TokenData
) -> Held:
    """The float model's answers on a few rows, drawn once more from the data where that can be, beside ``tokens``."""
    again = None
    local = data is None or isinstance(data, (list, os.PathLike)) or (isinstance(data, str) and is_path(data))
    if local and not is_self(data):
        more = {"samples": DRAWN, "seed": recipe.seed + 1}
        again = {"data": data, "tokenizer": tokenizer}
        again |= _data_arguments(model, tokenizer, recipe, **_room(recipe)) | more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are few rows has been said
        return Held(model, plan.stacks, store, *held_rows(tokens, again))


def _room(recipe: Recipe) -> dict[str, Any]:
    """What ``_data_arguments`` has to know of a recipe beside its sizes."""
    prefix = len(recipe.prefix) if isinstance(recipe.prefix, tuple) else int(recipe.prefix in ("auto", "on"))
    return {"asked": "seq_len" in recipe.model_fields_set, "prefix": prefix}


def _data_arguments(model: nn.Module, tokenizer: Any, drawn: Drawn, *, asked: bool, prefix: int) -> dict[str, Any]:
    """Of calibration_data, as the model and what is drawn say."""
    config, generative = getattr(model, "config", None), is_generative(model)
    limit = sequence_limit(config, tokenizer) if config is not None else None
    room = prefix if generative else 0
    return {
        "samples": drawn.samples,
        "seq_len": drawn.seq_len if (asked and generative) or limit is None else min(drawn.seq_len, limit - room),
        "seed": drawn.seed,
        "pack": generative,
        "batch_size": drawn.batch_size,
        "limit": limit,
        "vocabulary": vocabulary(model),
    }


def is_generative(model: nn.Module) -> bool:
    """True of models that go on with a text: they read windows of it."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(getattr(model, "can_generate", lambda: False)()) and not encodes


def check_cache(model: nn.Module, recipe: Recipe) -> None:
    """Only what writes text keeps keys and values. Raises InputError."""
    if recipe.scheme.kv is not None and not getattr(model, "can_generate", lambda: True)():
        raise InputError(f"{type(model).__name__} keeps no key-value cache to quantize", "drop --kv-bits")


def stored_bytes(model: nn.Module, plan: Plan) -> int:
    """About what the checkpoint will take on disk."""
    owners = {id(parameter): parameter for parameter in model.parameters()}
    total = sum(parameter.numel() * parameter.element_size() for parameter in owners.values())
    for name in plan.quantized():
        entry, weight = plan.entries[name], model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        total -= int(weight.numel() * (weight.element_size() - entry.bits / 8))
    return total


def check_prefix(model: nn.Module, prefix: Sequence[int], data: TokenData, limit: int | None) -> None:
    """The prefix is of the model's vocabulary and leaves room for the windows. Raises InputError."""
    size = vocabulary(model)
    longest = max(ids_of(batch).shape[1] for batch in data)
    if prefix and limit is not None and longest + len(prefix) > limit:
        cause = f"windows of {longest} tokens after {len(prefix)} of a prefix are beyond the model's limit of {limit}"
        raise InputError(cause, f"use --seq-len {limit - len(prefix)}, or --prefix none")
    for token in prefix:
        if token < 0 or (size is not None and token >= size):
            raise InputError(f"prefix token {token} is not in the model's vocabulary of {size}", "choose other tokens")


def check_apart(out: str | os.PathLike[str], *sources: object) -> None:
    """The output must not take the place of what it is made from. Raises OutputError, InputError."""
    if not os.fspath(out):
        raise InputError("the output folder has no name", "give one: --out DIR")
    target = Path(out).expanduser().resolve()
    for source in sources:
        if not isinstance(source, (str, os.PathLike)):
            continue
        with contextlib.suppress(OSError, ValueError):  # text, not a path
            path = Path(source).expanduser().resolve()
            if path.exists() and (path == target or target in path.parents):
                raise OutputError(f"output folder {out} holds the input {source}", "choose another --out")


def check_done(model: nn.Module, plan: Plan) -> None:
    """Every planned Linear is quantized and no other one is. Raises ModelError."""
    done = changed_linears(model).keys()
    planned = set(plan.quantized())
    if done != planned:
        odd: Sequence[str] = sorted(done ^ planned)
        raise ModelError(f"{odd[0]} and {len(odd) - 1} more differ from the plan", "report this model as a bug")


def _check_float(name: str, config: Any) -> None:
    """Refuse what is quantized already; transformers turns a GGUF file's weights into floats."""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    method = getattr(method, "value", method)
    if config is not None and method != "gguf":
        raise InputError(
            f"{name} is quantized already ({method or 'by no method it names'})", "start from the float model"
        )


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise NumericsError(f"weight {name} holds NaN or inf", "repair or download the checkpoint again")
