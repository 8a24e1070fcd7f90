"""Recovery training of a quantized model, end to end: a checkpoint and its float model in, a better checkpoint out."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calib import prepare
from calib.data import Like, TokenData, batch_rows, encode_rows, read_labelled, sequence_limit
from calib.errors import DataError, InputError, ModelError
from calib.evaluate import peak_rss_mib
from calib.evaluate.result import vocabulary
from calib.export.files import HISTORY, check_out, read_manifest
from calib.export.load import load_pair
from calib.export.targets import Format
from calib.model import Batch
from calib.nn import QuantLinear, changed_linears
from calib.observers import ranks
from calib.result import Result, Tuned
from calib.tuning import Terms, Training, TuneRecipe, Tuning, checkpointed, objective, tune_recipe
from calib.tuning import tune as train

Data = str | os.PathLike[str] | Iterable[Any] | Like | None


def tune(
    model: str | os.PathLike[str] | Result,
    teacher: prepare.Model | None = None,
    data: Data = None,
    out: str | os.PathLike[str] | None = None,
    *,
    preset: Literal["paretoq", "tbt", "db-llm", "ackd"] | None = None,
    loss: str | Terms | None = None,
    format: Format = "auto",
    overwrite: bool = False,
    verified: bool = True,
    progress: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tuned:
    """Train a quantized model on its grids until it answers more like its teacher, or better.

    model: a folder that ``quantize`` wrote, or its Result, whose network is changed in place. teacher: the float model
    it came from (name, folder, or module); the loss compares with it, latent weights start from it. data: as for
    ``quantize``, ``self`` written by the teacher; of a classifier whose loss has a task, a table of sentences and
    labels. preset: ``paretoq``, ``tbt``, ``db-llm``, ``ackd`` (calib.tuning.PRESETS). loss: ``ce``, ``kd``, ``dad``,
    ``tbt``, ``ackd``, or Terms. options: fields of calib.tuning.TuneRecipe (trainable, steps, lr, accumulate,
    precision, checkpointing, samples, seq_len, batch_size, seed, every, ...), gamma and temperature. out: the folder
    to write, by the same path as every export; training state lies beside it until then, and the same call, with model
    and teacher by name, goes on where a killed one stopped.

    Raises InputError, DataError, ModelError, NumericsError, OutputError, VerifyError.
    """
    started = time.perf_counter()
    asked = options.get("seq_len") is not None
    recipe = tune_recipe(preset, loss, **options)
    if teacher is None and recipe.loss.distils:
        raise InputError("the loss compares with a teacher, and none is given", "name the float model, or use loss ce")
    if out is not None:
        prepare.check_apart(out, model, teacher, data)
        check_out(out, overwrite=overwrite)
    prepare.join_ranks(model.network if isinstance(model, Result) else model, out)
    progress = progress and ranks.rank() == 0
    network, tokenizer, origin = _student(model, dtype, progress)
    guide = None
    if teacher is not None:
        guide = prepare.load_model(teacher, tokenizer, dtype, progress, streamed=False)[0]
        if guide is network:
            raise InputError("the teacher is the model that is trained", "load the float model again")
        if (a := vocabulary(guide)) != (b := vocabulary(network)):
            raise InputError(f"the teacher knows {a} token ids, the model {b}", "name the float model it came from")
    tokens = _tokens(network, guide, tokenizer, data, recipe, asked, progress)
    file = None
    if out is not None and not isinstance(model, Result) and not isinstance(teacher, nn.Module):
        about = prepare.fingerprint(model, recipe, tokens, dtype)
        about |= {"teacher": None if teacher is None else prepare.model_hashes(teacher)}
        file = prepare.training_folder(out, about) / "state.safetensors"

    floats, whence = latent_weights(network, guide, origin) if "all" in recipe.trainable else ({}, "")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for each in (network, guide):
        if each is not None:
            each.to(device)
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in tokens]
    losses, trained = fit(network, guide, batches, recipe, floats, file=file, progress=progress)
    network.cpu()
    report: dict[str, Any] = {"loss": losses, "trained": trained, "notes": [whence] if whence else []}
    seconds = {"total": time.perf_counter() - started}
    tuned = Tuned(network, tokenizer, report, seconds, tokens, recipe=recipe, origin=origin)
    tuned.peak_rss_mib = peak_rss_mib()
    if out is not None:
        if ranks.rank() == 0:
            tuned.save(out, format, overwrite=overwrite, verified=verified)
            prepare.forget_training(out)
        ranks.meet("writing the checkpoint")
        tuned.out = Path(out)
    return tuned


def fit(
    model: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[Batch],
    recipe: TuneRecipe,
    floats: Mapping[str, Tensor],
    *,
    file: Path | None = None,
    progress: bool = False,
) -> tuple[list[float], int]:
    """Train the model in place on batches as it reads them (and ``labels``); losses and how many numbers were trained.

    floats: float weights behind the codes, by name (``latent_weights``). file: keeps the state of the training.
    """
    model.eval().requires_grad_(False)
    value = objective(model, teacher, recipe.loss)
    names = ("steps", "lr", "warmup", "decay", "clip", "seed", "every", "accumulate", "precision")
    settings = Tuning(**{name: getattr(recipe, name) for name in names})
    training = Training(model, recipe.trainable, floats)
    try:
        with checkpointed(model) if recipe.checkpointing else contextlib.nullcontext():
            losses = train(
                training.groups,
                value,
                list(batches),
                settings,
                after_step=training.project,
                file=file,
                progress=progress,
            )
    finally:
        training.settle()
    return losses, training.parameters


def latent_weights(
    model: nn.Module, teacher: nn.Module | None, origin: Mapping[str, Any]
) -> tuple[dict[str, Tensor], str]:
    """The teacher's weights that the model's codes were rounded from, by name; and what is to say of the others.

    A model whose weights were transformed before they were rounded has none: latent weights then start at the codes'
    values.
    """
    linears = [name for name, m in model.named_modules() if isinstance(m, QuantLinear)]
    if teacher is None:
        return {}, "latent weights start at their codes' values: there is no teacher"
    if origin.get("plan", {}).get("transformed", 1):
        return {}, "latent weights start at their codes' values: the model was transformed before it was rounded"
    modules = dict(teacher.named_modules())
    found = {name: modules[name].weight for name in linears if type(modules.get(name)) is nn.Linear}
    rest = len(linears) - len(found)
    note = f"{rest} of {len(linears)} latent weights start at their codes' values: the teacher has no such linear"
    return found, note if rest else ""


def _student(model: str | os.PathLike[str] | Result, dtype: torch.dtype, progress: bool) -> tuple[nn.Module, Any, Any]:
    """The quantized model, its tokenizer, and its manifest as far as it says how the model was made."""
    if isinstance(model, Result):
        return model.model, model.tokenizer, model._manifest()
    folder = Path(model)
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}", "name a folder that calib quantize wrote")
    network, tokenizer = load_pair(folder, "fake", dtype, progress=progress)
    if not changed_linears(network):
        raise InputError(f"{folder} holds no quantized model", "run calib quantize first; it may be the --teacher")
    manifest = read_manifest(folder)
    return network, tokenizer, {key: manifest[key] for key in HISTORY if key in manifest}


def _tokens(
    network: nn.Module,
    teacher: nn.Module | None,
    tokenizer: Any,
    data: Data,
    recipe: TuneRecipe,
    asked: bool,
    progress: bool,
) -> TokenData:
    prefix = getattr(network, "calib_prefix", None)
    room = 0 if prefix is None else len(prefix)
    tables = recipe.loss.task > 0 and not prepare.is_generative(network)
    if not tables:
        reader = teacher if teacher is not None and prepare.is_self(data) else network  # who writes well, writes
        return prepare.model_tokens(reader, tokenizer, data, recipe, asked=asked, prefix=room, progress=progress)
    if not isinstance(data, (str, os.PathLike)):
        raise DataError("the task's loss needs labels", "give a table of sentences and labels, or use loss kd")
    return _labelled(network, tokenizer, data, recipe)


def _labelled(network: nn.Module, tokenizer: Any, data: str | os.PathLike[str], recipe: TuneRecipe) -> TokenData:
    """Labelled sentences as batches with ``labels``: a seeded sample."""
    sentences, labels = read_labelled(data)
    draw = torch.randperm(len(labels), generator=torch.Generator().manual_seed(recipe.seed))
    chosen = draw[: recipe.samples].tolist()
    limit = sequence_limit(getattr(network, "config", None), tokenizer) or recipe.seq_len
    rows = encode_rows(tokenizer, [sentences[i] for i in chosen], min(recipe.seq_len, limit))
    tokens = prepare.model_tokens(
        network, tokenizer, batch_rows(rows, tokenizer, recipe.batch_size), recipe, asked=False, prefix=0
    )
    parts = torch.tensor([labels[i] for i in chosen]).split(recipe.batch_size)
    batches = tuple({**batch, "labels": part} for batch, part in zip(tokens, parts, strict=True))
    return replace(tokens, batches=batches, source=str(data), fingerprint=f"{tokens.fingerprint} {labels}")
