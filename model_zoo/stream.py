"""A model whose weights stay in its files: the stock class on the meta device over safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calib.errors import ModelError
from calib.threads import one_at_a_time
from model_zoo.sources import ResolvedModel, Task, _auto_class, _check_folder, _one_line, _quiet, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from calib.model import Streamed

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model"]


@one_at_a_time
def open_streamed(
    found: ResolvedModel, task: Task = "auto", dtype: torch.dtype = torch.float32, *, progress: bool = True
) -> tuple[PreTrainedModel, Streamed, PreTrainedTokenizerBase | None]:
    """The model on the meta device, what loads its weights, and its tokenizer.

    Raises ModelError for a damaged model, and NotStreamable (a ModelError) with the reason where the stored tensors
    are not the class's own by name and shape: such a model must be loaded as a whole.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig

    from calib.model import Streamed, TensorFiles

    if found.gguf_file:
        raise NotStreamable(f"{found.name} is a GGUF file", "load it as a whole")
    folder = Path(found.path)
    with _quiet(progress), _one_line(found):
        if found.origin == "hub":
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(found.path, allow_patterns=HUB_FILES))
        else:
            _check_folder(found)
        config = AutoConfig.from_pretrained(folder)
        kind = _auto_class(config, task)
        with init_empty_weights(include_buffers=False):
            model: Any = kind.from_config(config, dtype=dtype)
        model.tie_weights()
        if model.can_generate() and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        tokenizer = load_tokenizer(found)
    files = TensorFiles.of(folder)
    if dtype != torch.float32 and getattr(model, "_keep_in_fp32_modules", None):
        raise NotStreamable(f"{type(model).__name__} keeps modules in fp32", "load it as a whole")
    try:
        store = Streamed(model.eval(), files, dtype)
    except ModelError as error:
        raise NotStreamable(error.cause, error.fix) from error
    return model, store, tokenizer


class NotStreamable(ModelError):
    """The stored tensors are not those of the class; loading it as a whole may convert them."""
