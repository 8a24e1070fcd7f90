"""The one call: model and data in, a verified low-bit checkpoint out. Read it from top to bottom."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from calib import auto, prepare
from calib.data import Like, TokenData, sequence_limit
from calib.engine import Engine, Journal, PrefixBuilder, choose_prefix, trained
from calib.errors import CalibError, InputError
from calib.evaluate import peak_rss_mib
from calib.export import checkpoint, onnx, targets
from calib.export.files import check_out, open_journal, writing
from calib.export.streamed import Shards
from calib.export.targets import Format
from calib.memory import release_pages
from calib.methods import Basel, Hadamard, basel_of, low_rank_of, resolve
from calib.model import Plan, Resident, make_plan, small_batch, takes_rotation
from calib.model.cost import Cost, estimate
from calib.nn import route_attention
from calib.observers import ranks
from calib.prepare import Model
from calib.recipe import Recipe, Scheme
from calib.recipe import recipe as make_recipe
from calib.recipe import scheme as make_scheme
from calib.result import Result

PLAN_TOKENS = 64


def quantize(
    model: Model,
    scheme: str | Scheme = "w8a8-static",
    method: str = "auto",
    data: str | os.PathLike[str] | Iterable[Any] | Like | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    format: Format = "auto",
    overwrite: bool = False,
    verified: bool = True,
    progress: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_memory: int | None = None,
    auto_seconds: float = auto.SECONDS,
    report: bool = True,
    scheme_options: dict[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Quantize ``model`` (a name in the zoo, a folder, a hub id, or an nn.Module, which is changed in place).

    scheme: a preset name or Scheme; scheme_options change a preset (calib.recipe.scheme). method: ``"os+"``,
    ``"hadamard,os+,gptq"``, ``"smoothquant:0.8"``, ``"rtn"``, ...; ``"auto"`` tries the recipes known to be good at the
    scheme on data held out from calibration, for at most auto_seconds, and takes the best (calib.auto). data: file,
    folder, hub id, strings or token dicts, ``calib.data.like(target, pool)``, ``"self"`` for windows that the model
    writes; None uses text that needs no network. out: the folder to write; weights then come from the model's files a
    block at a time, finished blocks are journaled beside it, and the same call goes on where a killed one stopped.
    device: where blocks run on the data (``"cuda"``); they are solved on the CPU.
    max_memory: bytes that the process may take; hidden states that do not fit lie in a file. report: measure a few
    windows before and after, and write report.html and report.json into ``out``. options: fields of
    calib.recipe.Recipe (samples, seq_len, seed, sites, prefix, search, shift, scale, refine, inputs, float_rows,
    batch_size, damp; keep, max_size, select, rank, factors for low_rank; steps, lr, new_bases for basel).

    Raises InputError, DataError, ModelError, NumericsError, OutputError, VerifyError: one line each, cause
    and fix.
    """
    started, seconds = time.perf_counter(), dict[str, float]()
    place = prepare.device_named(device)
    if out is not None:
        prepare.check_apart(out, model, data)
        check_out(out, overwrite=overwrite)
    options = _prefix_for(format, options)
    recipe, tried = _recipe(scheme, method, format, dtype, scheme_options, options), None
    if method == "auto":
        data = data if data is None or isinstance(data, (str, os.PathLike, Like)) else list(data)
        common = {"tokenizer": tokenizer, "format": format, "dtype": dtype, "device": device, "progress": progress}
        with _timed(seconds, "auto"):
            formats = make_scheme(scheme, **(scheme_options or {}))
            kept = None if overwrite else out
            tried = auto.tried(quantize, model, formats, data, kept, auto_seconds, common, options)
        method, options = tried.candidate.method, tried.candidate.options_with(options)
        recipe = _recipe(scheme, method, format, dtype, scheme_options, options)
    prepare.join_ranks(model, out, place)
    progress = progress and ranks.rank() == 0
    training = basel_of(recipe)
    own_tokenizer = tokenizer is None
    with _timed(seconds, "load"):
        whole = training is not None or prepare.is_self(data)  # the model runs as a whole before it is quantized
        network, tokenizer, store, resident = prepare.load_model(
            model, tokenizer, dtype, progress, streamed=out is not None and not whole
        )
        budget = prepare.memory_budget(network, store, recipe, dtype, max_memory)
        if out is not None:
            checkpoint.require_transformers(network)
    with _timed(seconds, "data"):
        tokens = prepare.calibration_tokens(network, tokenizer, data, recipe, progress)
    with _timed(seconds, "plan"):
        plan = _plan(network, recipe, tokens, format, store)
        plan.notes += [resident] if resident else []
        plan.notes += [tried.note] if tried is not None else []
        if out is not None:
            check_out(out, overwrite=overwrite, needed_bytes=prepare.stored_bytes(network, plan))
        measured = report and ranks.rank() == 0 and training is None
        about = prepare.about_model(model, network, dtype) if report else {}
        held = prepare.held_out(network, plan, store, tokenizer, data, recipe, tokens) if measured else None
        prefix = _prefix(network, plan, recipe, tokens, tokenizer)
        prepare.check_cache(network, recipe)
        if recipe.scheme.attention is not None or recipe.scheme.kv is not None:
            route_attention(network)

    if training is not None:
        found = _trained(training, network, plan, model, tokens, dtype, out, seconds, progress)
        result = Result(network, tokenizer, found, seconds, tokens, recipe=recipe, plan=plan, about=about)
        result.source = prepare.source_of(model)
        seconds["total"] = time.perf_counter() - started
        if out is not None:
            result.save(out, format, overwrite=overwrite, verified=verified)
            prepare.forget_training(out)
        return result

    reread = own_tokenizer and store.streamed
    if reread:  # a vocabulary takes as much memory as two small blocks: it is read again to be saved
        tokenizer = None
        release_pages()
    journal, shards = None, None
    if out is not None and not isinstance(model, nn.Module):
        journal = open_journal(out, prepare.fingerprint(model, recipe, tokens, dtype, place), anew=overwrite)
        journal.expect(plan.block_names())
        about |= {"files": journal.fingerprint["model"]} if report else {}
        shards = Shards(checkpoint.require_transformers(network), plan.block_names())
        plan.notes += [f"resumed: {journal.resumed} of {len(shards.blocks)} blocks were finished"] * bool(
            journal.resumed
        )
    with _resumable(journal, len(plan.block_names())):
        engine = Engine(
            network,
            plan,
            recipe,
            prefix,
            progress,
            store=store,
            journal=journal,
            shards=None if shards is None else shards.blocks,
            budget=budget,
            device=place,
        )
        with writing(Path(out)) if out is not None else contextlib.nullcontext():
            outcome = engine.run(tokens.batches)
        if prefix is not None:
            network.calib_prefix = prefix.build()
        network.calib_rewrites = plan.rewrites  # type: ignore[assignment]
        prepare.check_done(network, plan)
        plan.notes += outcome.notes
        found = {
            "sites": outcome.sites,
            "block_error": outcome.blocks,
            "linears": outcome.linears,
            "speed": outcome.speed,
            "prefix": list(plan.prefix or ()),
            "notes": plan.notes,
            **({} if tried is None else {"auto": tried.trials}),
        }
        if held is not None:
            release_pages()
            with _timed(seconds, "quality"):
                found["quality"] = held.quality(network)
            release_pages()
        if reread:
            tokenizer = prepare.tokenizer_of(model)
        seconds |= outcome.seconds | {"total": time.perf_counter() - started}
        result = Result(network, tokenizer, found, seconds, tokens, recipe=recipe, plan=plan, about=about)
        result.pictures, result.peak_rss_mib = outcome.pictures, peak_rss_mib()
        result.source = prepare.source_of(model) if journal is None else journal.fingerprint["model"]
        if journal is not None and shards is not None and out is not None:
            if ranks.rank() == 0:
                result.publish(journal, shards, store, Path(out), format, overwrite, verified)
            ranks.meet("writing the checkpoint")
            result.out = Path(out)
        elif out is not None:
            result.save(out, format, overwrite=overwrite, verified=verified)
    if tried is not None:
        tried.memory.forget()
    return result


def plan(
    model: Model,
    scheme: str | Scheme = "w8a8-static",
    method: str = "auto",
    data: str | os.PathLike[str] | Iterable[Any] | Like | None = None,
    *,
    tokenizer: Any = None,
    format: Format = "auto",
    progress: bool = True,
    scheme_options: dict[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """What ``quantize`` would do to each Linear, without collecting statistics; needs one forward of a few tokens.

    data: as for ``quantize``; a model without a tokenizer needs some of its own inputs.
    """
    short = {**_prefix_for(format, options), "samples": 2, "seq_len": 32}
    recipe = _recipe(scheme, method, format, torch.float32, scheme_options, short)
    network, tokenizer, store, resident = prepare.load_model(model, tokenizer, torch.float32, progress, streamed=True)
    tokens = prepare.calibration_tokens(network, tokenizer, data, recipe)
    found = _plan(network, recipe, tokens, format, store)
    found.notes += [resident] if resident else []
    found.notes += [f"planned as {','.join(recipe.methods)}, the first that auto tries"] if method == "auto" else []
    return found


def cost(
    model: Model,
    scheme: str | Scheme = "w8a8-static",
    method: str = "auto",
    *,
    format: Format = "auto",
    dtype: torch.dtype = torch.float32,
    max_memory: int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    scheme_options: dict[str, Any] | None = None,
    **options: Any,
) -> Cost:
    """What ``quantize`` would take, and its plan from shapes alone: nothing but the model's config is read.

    model: as for quantize, or a config.json. max_memory: bytes a process may hold; calib.model.cost.refuse says whether
    that is enough. out: on whose disk, for its speed.
    """
    recipe = _recipe(scheme, method, format, dtype, scheme_options, _prefix_for(format, options))
    source: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module):
        source = model
        if Path(model).suffix != ".json":
            from model_zoo import sources

            found = sources.resolve(model, progress=progress)
            source = found.path if found.origin == "hub" else Path(found.path)
    folder = None if out is None else next(p for p in Path(out).expanduser().absolute().parents if p.is_dir())
    with contextlib.nullcontext() if folder is None else writing(folder):
        return estimate(source, recipe, dtype=dtype, max_memory=max_memory, folder=folder)


def _prefix_for(format: Format, options: dict[str, Any]) -> dict[str, Any]:
    """The options, without a prefix of our choice where the format has no place for one."""
    free = options.get("prefix", "auto") == "auto" and format == onnx.FORMAT
    return {**options, "prefix": "none"} if free else options


def _recipe(
    scheme: str | Scheme,
    method: str,
    format: Format,
    dtype: torch.dtype,
    scheme_options: dict[str, Any] | None,
    options: dict[str, Any],
) -> Recipe:
    """The recipe, refused here for all that is wrong with it by itself."""
    if format not in get_args(Format):
        raise InputError(f"unknown format {format!r}", f"use {', '.join(get_args(Format))}")
    stock, formats = format in targets.STOCK, make_scheme(scheme, **(scheme_options or {}))
    if method == "auto":  # planned as what it tries first
        first = auto.candidates(formats, stock)[0]
        method, options = first.method, first.options_with(options)
    recipe = make_recipe(formats, method, stock, **options)
    resolve(recipe)  # the methods check their values
    low_rank_of(recipe)
    basel_of(recipe)
    if recipe.truncates and prepare.world_size() > 1:
        raise InputError("truncation looks at the whole model in one process", "run without torchrun")
    targets.refuse(format, recipe, dtype)
    return recipe


def _plan(model: nn.Module, recipe: Recipe, tokens: TokenData, format: Format, store: Resident) -> Plan:
    """The plan, with all that is known before calibration checked against the recipe."""
    plan = make_plan(model, recipe, small_batch(tokens.batches, tokens=PLAN_TOKENS), store)
    targets.refuse(format, recipe, torch.float32, model, plan.rewrites)
    _check_rotation(plan, recipe)
    return plan


def _prefix(network: nn.Module, plan: Plan, recipe: Recipe, tokens: TokenData, tokenizer: Any) -> PrefixBuilder | None:
    """Choose the prefix, note why, and have the network run behind it."""
    batch = small_batch(tokens.batches, rows=2, tokens=256)
    chosen, why = choose_prefix(network, plan, recipe, batch, tokenizer)
    plan.notes += [why] if why else []
    prepare.check_prefix(network, chosen, tokens, sequence_limit(getattr(network, "config", None), tokenizer))
    plan.prefix = chosen or None
    if not chosen:
        return None
    prefix = PrefixBuilder(network, chosen)
    prefix.placeholder().install(network)
    return prefix


def _check_rotation(plan: Plan, recipe: Recipe) -> None:
    """A Hadamard block that was asked for divides the width of every site it would rotate."""
    given = {name: value for method in recipe.methods for name, _, value in [method.partition(":")] if value}
    name = "rotate" if "rotate" in given else "hadamard"
    if name not in given:
        return
    rotation, planned = Hadamard(name, given[name]), set(plan.quantized())
    for name, block in plan.blocks.items():
        for site in block.sites:
            if takes_rotation(site, recipe) and planned.issuperset(f"{name}.{path}" for path in site.consumers):
                rotation.block_for(site.features)


def _trained(
    training: Basel,
    network: nn.Module,
    plan: Plan,
    model: Model,
    tokens: TokenData,
    dtype: torch.dtype,
    out: str | os.PathLike[str] | None,
    seconds: dict[str, float],
    progress: bool,
) -> dict[str, Any]:
    """Train the whole model in the place of the block loop; the report."""
    folder = None
    if out is not None and not isinstance(model, nn.Module):
        folder = prepare.training_folder(out, prepare.fingerprint(model, training.recipe, tokens, dtype))
    with _timed(seconds, "train"):
        report = trained(network, plan, training, tokens.batches, folder=folder, progress=progress)
    network.calib_rewrites = plan.rewrites  # type: ignore[assignment]
    prepare.check_done(network, plan)
    return {**report, "notes": plan.notes}


@contextlib.contextmanager
def _resumable(journal: Journal | None, blocks: int) -> Iterator[None]:
    """Errors inside say how to go on, where there is something to go on from."""
    try:
        yield
    except (CalibError, KeyboardInterrupt) as error:
        if journal is None:
            raise
        journal.close(remove=False)
        if not journal.folder.is_dir():
            raise
        hint = f"{journal.resumed} of {blocks} blocks are finished: run the same command again to go on"
        if isinstance(error, CalibError):
            raise type(error)(error.cause, f"{error.fix}; {hint}") from error
        raise type(error)(hint) from error


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


__all__ = ["CalibError", "Cost", "Format", "Result", "cost", "plan", "quantize"]
