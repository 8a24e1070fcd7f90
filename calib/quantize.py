"""The one call: model and data in, a verified low-bit checkpoint out. Read it from top to bottom."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calib.data import TokenData, calibration_data, sequence_limit
from calib.engine import Engine, Journal, PrefixBuilder, choose_prefix, trained
from calib.errors import CalibError, InputError, ModelError, NumericsError, OutputError
from calib.evaluate import peak_rss_mib
from calib.export import checkpoint, compressed, dense
from calib.export.files import check_out, open_journal, sha256, writing
from calib.export.hf import set_mode
from calib.export.load import load, read_config
from calib.export.streamed import Shards
from calib.export.streamed import write as write_streamed
from calib.export.verify import answer, reference_batch, verify
from calib.methods import Hadamard, basel_of, low_rank_of, resolve
from calib.model import Plan, Resident, is_finite, make_plan, small_batch, takes_rotation
from calib.model.cost import BUDGET, Cost, estimate, refuse
from calib.nn import changed_linears, route_attention
from calib.observers import ranks
from calib.recipe import Recipe, Scheme
from calib.recipe import recipe as make_recipe
from calib.recipe import scheme as make_scheme

Format = Literal["auto", "calib", "compressed-tensors", "dense"]
Model = str | os.PathLike[str] | nn.Module
PLAN_TOKENS = 64


@dataclass
class Result:
    """What ``quantize`` gives: the plan, the report, the model.

    ``model`` gives the bits that the packed checkpoint gives on integer kernels. Where the weights were streamed it
    is loaded from ``out`` when first asked for.
    """

    network: nn.Module
    tokenizer: Any
    recipe: Recipe
    plan: Plan
    report: dict[str, Any]
    seconds: dict[str, float]
    data: TokenData
    out: Path | None = None
    peak_rss_mib: float | None = field(default=None)

    @property
    def model(self) -> nn.Module:
        if self.out is not None and any(p.device.type == "meta" for p in self.network.parameters()):
            self.network = load(self.out, mode="fake")
        return self.network

    def save(
        self,
        out: str | os.PathLike[str],
        format: Format = "auto",
        *,
        overwrite: bool = False,
        verified: bool = True,
    ) -> Path:
        """Write the checkpoint; ``auto`` is compressed-tensors where it can express the model, else calib's.

        The folder is reloaded in a fresh process, whose logits must match (``verified``), before it takes its
        place: what lies at ``out`` is finished. Raises OutputError, VerifyError.
        """
        model = self.model
        chosen = self._choose(format, compressed.expressible(model) if format in ("auto", compressed.FORMAT) else ())
        writer = {compressed.FORMAT: compressed, dense.FORMAT: dense}.get(chosen, checkpoint)
        finish = self._finisher(model, chosen, verified)
        self.out = writer.save(
            model, self.tokenizer, Path(out), manifest=self._manifest(), overwrite=overwrite, finish=finish
        )
        return self.out

    def _publish(
        self,
        journal: Journal,
        shards: Shards,
        store: Resident,
        out: Path,
        format: Format,
        overwrite: bool,
        verified: bool,
    ) -> None:
        """Make the journal the checkpoint at ``out``: as ``save``, but the blocks are written already."""
        model = checkpoint.require_transformers(self.network)
        chosen = self._choose(
            format, compressed.expressible(model, store) if format in ("auto", compressed.FORMAT) else ()
        )
        self.out = write_streamed(
            journal,
            shards,
            model,
            store,
            self.tokenizer,
            out,
            format=chosen,
            manifest=self._manifest(),
            overwrite=overwrite,
            finish=self._finisher(model, chosen, verified),
        )

    def _choose(self, format: Format, reasons: Sequence[str]) -> str:
        chosen = format if format != "auto" else ("calib" if reasons else compressed.FORMAT)
        if format == "auto" and reasons:
            self.report["format"] = f"calib: compressed-tensors cannot express {'; '.join(reasons)}"
        else:
            self.report["format"] = chosen
        return chosen

    def _manifest(self) -> dict[str, Any]:
        data = {"source": self.data.source, "fingerprint": self.data.fingerprint, "tokens": self.data.tokens}
        return {"recipe": self.recipe.model_dump(mode="json"), "plan": self.plan.summary(), "data": data}

    def _finisher(self, model: nn.Module, format: str, verified: bool) -> Callable[[Path], dict[str, Any]]:
        """What verifies a written folder against the model and adds report and times to its manifest."""
        start = time.perf_counter()
        before = self.seconds.get("total", 0.0)
        inputs = reference_batch(self.data[0])
        # other programs simulate in floats: what they are held against has to as well
        set_mode(model, "float" if format == compressed.FORMAT else "fake")
        reference = answer(model, inputs)
        set_mode(model, "fake")
        self.report.pop("verify", None)

        def finish(stage: Path) -> dict[str, Any]:
            written = time.perf_counter()
            self.seconds["save"] = written - start
            if verified:
                self.report["verify"] = verify(stage, reference, inputs).as_dict()
                self.seconds["verify"] = time.perf_counter() - written
            self.seconds["total"] = before + time.perf_counter() - start
            self.peak_rss_mib = peak_rss_mib()
            return {"report": self.report, "seconds": self.seconds, "peak_rss_mib": self.peak_rss_mib}

        return finish


def quantize(
    model: Model,
    scheme: str | Scheme = "w8a8-static",
    method: str = "os+",
    data: str | os.PathLike[str] | Iterable[Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    format: Format = "auto",
    overwrite: bool = False,
    verified: bool = True,
    progress: bool = True,
    dtype: torch.dtype = torch.float32,
    max_memory: int | None = None,
    scheme_options: dict[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Quantize ``model`` (a name in the zoo, a folder, a hub id, or an nn.Module, which is changed in place).

    scheme: a preset name or Scheme; scheme_options change a preset (calib.recipe.scheme). method: ``"os+"``,
    ``"os+,gptq"``, ``"hadamard,os+"``, ``"smoothquant:0.8"``, ``"rtn"``. data: file, folder, hub id, strings or token
    dicts; None uses text that needs no network. out: the folder to write; weights then come from the model's files a
    block at a time, finished blocks are journaled beside it, and the same call goes on where a killed one stopped.
    max_memory: bytes that the process may take; hidden states that do not fit lie in a file. options: fields of
    calib.recipe.Recipe (samples, seq_len, seed, sites, prefix, search, shift, scale, inputs, float_rows, batch_size,
    damp; keep, max_size, select, rank, factors for low_rank; steps, lr, new_bases
    for basel).

    Raises InputError, DataError, ModelError, NumericsError, OutputError, VerifyError: one line each, cause
    and fix.
    """
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    recipe = _recipe(scheme, method, format, dtype, scheme_options, options)
    _join_ranks(model, out)
    progress = progress and ranks.rank() == 0
    if out is not None:
        _check_apart(out, model, data)
        check_out(out, overwrite=overwrite)
    training = basel_of(recipe)
    network, tokenizer, store = _load(model, tokenizer, dtype, progress, streamed=out is not None and training is None)
    budget = _budget(network, store, recipe, dtype, max_memory)
    if out is not None:
        checkpoint.require_transformers(network)
    seconds["load"] = time.perf_counter() - started

    start = time.perf_counter()
    tokens = _data(network, tokenizer, data, recipe)
    seconds["data"] = time.perf_counter() - start

    start = time.perf_counter()
    plan = _plan(network, recipe, tokens, format, store)
    if out is not None:
        check_out(out, overwrite=overwrite, needed_bytes=_stored_bytes(network, plan))
    batch = small_batch(tokens.batches, rows=2, tokens=256)
    prefix_tokens, why = choose_prefix(network, plan, recipe, batch, tokenizer)
    plan.notes += [why] if why else []
    _check_prefix(network, prefix_tokens, tokens, sequence_limit(getattr(network, "config", None), tokenizer))
    plan.prefix = prefix_tokens or None
    prefix = PrefixBuilder(network, prefix_tokens) if prefix_tokens else None
    if prefix is not None:
        prefix.placeholder().install(network)
    if recipe.scheme.attention is not None or recipe.scheme.kv is not None:
        route_attention(network)
    seconds["plan"] = time.perf_counter() - start

    if training is not None:
        start = time.perf_counter()
        state = None if out is None else Path(out).expanduser().absolute().parent / f".{Path(out).name}.tuning"
        folder = None
        if state is not None and not isinstance(model, nn.Module):  # another run's state is never found
            about = json.dumps(_fingerprint(model, recipe, tokens, dtype), sort_keys=True, default=str)
            folder = state / hashlib.sha256(about.encode()).hexdigest()[:16]
        report = trained(network, plan, training, tokens.batches, folder=folder, progress=progress)
        seconds["train"] = time.perf_counter() - start
        network.calib_rewrites = plan.rewrites  # type: ignore[assignment]
        _check_done(network, plan)
        result = Result(network, tokenizer, recipe, plan, {**report, "notes": plan.notes}, seconds, tokens)
        seconds["total"] = time.perf_counter() - started
        if out is not None:
            result.save(out, format, overwrite=overwrite, verified=verified)
        if state is not None:
            shutil.rmtree(state, ignore_errors=True)
        return result
    blocks = [name for stack in plan.stacks for name in stack.names]
    journal, shards = None, None
    if out is not None and not isinstance(model, nn.Module):
        fingerprint = _fingerprint(model, recipe, tokens, dtype)
        journal = open_journal(out, fingerprint, anew=overwrite)
        shards = Shards(checkpoint.require_transformers(network), blocks)
        plan.notes += [f"resumed: {journal.resumed} of {len(blocks)} blocks were finished"] if journal.resumed else []
    try:
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
        )
        with writing(Path(out)) if out is not None else contextlib.nullcontext():
            outcome = engine.run(tokens.batches)
        if prefix is not None:
            network.calib_prefix = prefix.build()
        network.calib_rewrites = plan.rewrites  # type: ignore[assignment]
        _check_done(network, plan)
        plan.notes += outcome.notes
        seconds |= outcome.seconds
        report = {
            "sites": outcome.sites,
            "block_error": outcome.blocks,
            "prefix": list(prefix_tokens),
            "notes": plan.notes,
        }
        result = Result(network, tokenizer, recipe, plan, report, seconds, tokens)
        seconds["total"] = time.perf_counter() - started
        result.peak_rss_mib = peak_rss_mib()
        if journal is not None and shards is not None and out is not None:
            if ranks.rank() == 0:
                result._publish(journal, shards, store, Path(out), format, overwrite, verified)
            ranks.meet("writing the checkpoint")
            result.out = Path(out)
        elif out is not None:
            result.save(out, format, overwrite=overwrite, verified=verified)
    except (CalibError, KeyboardInterrupt) as error:
        if journal is None:
            raise
        journal.close(remove=False)
        raise _resumable(error, journal, len(blocks)) from error
    return result


def plan(
    model: Model,
    scheme: str | Scheme = "w8a8-static",
    method: str = "os+",
    *,
    tokenizer: Any = None,
    format: Format = "auto",
    progress: bool = True,
    scheme_options: dict[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """What ``quantize`` would do to each Linear, without collecting statistics; needs one forward of a few
    tokens.
    """
    short = {**options, "samples": 2, "seq_len": 32}
    recipe = _recipe(scheme, method, format, torch.float32, scheme_options, short)
    network, tokenizer, store = _load(model, tokenizer, torch.float32, progress, streamed=True)
    return _plan(network, recipe, _data(network, tokenizer, None, recipe), format, store)


def cost(
    model: Model,
    scheme: str | Scheme = "w8a8-static",
    method: str = "os+",
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
    recipe = _recipe(scheme, method, format, dtype, scheme_options, options)
    source: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module):
        source = model
        if Path(model).suffix != ".json":
            from model_zoo import sources

            found = sources.resolve(model, progress=progress)
            source = found.path if found.origin == "hub" else Path(found.path)
    folder = None if out is None else next(p for p in Path(out).expanduser().absolute().parents if p.is_dir())
    return estimate(source, recipe, dtype=dtype, max_memory=max_memory, folder=folder)


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
    stock = format == "compressed-tensors"
    recipe = make_recipe(make_scheme(scheme, **(scheme_options or {})), method, stock, **options)
    resolve(recipe)  # the methods check their values
    low_rank_of(recipe)
    basel_of(recipe)
    if recipe.truncates and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("truncation looks at the whole model in one process", "run without torchrun")
    if format == dense.FORMAT and (reasons := dense.refusals(recipe)):
        raise InputError(f"a dense checkpoint cannot hold this: {'; '.join(reasons)}", "use --format calib, or auto")
    if stock and (reasons := compressed.refusals(recipe, dtype)):
        raise InputError(f"compressed-tensors cannot express this: {'; '.join(reasons)}", "use --format calib, or auto")
    return recipe


def _load(
    model: Model, tokenizer: Any, dtype: torch.dtype, progress: bool, streamed: bool
) -> tuple[nn.Module, Any, Resident]:
    """The model, its tokenizer, and where its weights are: in its files where that can be, if ``streamed``."""
    if isinstance(model, nn.Module):
        if changed_linears(model):
            raise InputError("the model is quantized already", "start from the float model")
        model = model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        _check_finite(model)
        # nn.Module's own cast: transformers refuses it on a model that was dequantized from a GGUF file
        return nn.Module.to(model, dtype), tokenizer, Resident()
    from model_zoo import sources, stream

    source = sources.resolve(model, progress=progress)
    if source.gguf_file is None and (Path(source.path) / "config.json").is_file():  # known before it is loaded
        _check_float(source.name, read_config(Path(source.path)).get("quantization_config"))
    store = Resident()
    try:
        if not streamed:
            raise stream.NotStreamable("the result stays in memory", "give --out")
        network, store, found = stream.open_streamed(source, dtype=dtype, progress=progress)
    except stream.NotStreamable:
        network, found = sources.load_model(source, dtype=dtype, progress=progress)
        _check_finite(network)
    _check_float(source.name, getattr(network.config, "quantization_config", None))
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network, tokenizer if tokenizer is not None else found, store


def _join_ranks(model: Model, out: str | os.PathLike[str] | None) -> None:
    """Take part in the run that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if isinstance(model, nn.Module) or out is None:
        raise InputError("several processes need a model by name and an --out", "give both, or run without torchrun")
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def _resumable(error: CalibError | KeyboardInterrupt, journal: Journal, blocks: int) -> BaseException:
    """The error, saying how to go on where there is something to go on from."""
    if not journal.folder.is_dir():
        return error
    hint = f"{journal.resumed} of {blocks} blocks are finished: run the same command again to go on"
    return type(error)(error.cause, f"{error.fix}; {hint}") if isinstance(error, CalibError) else type(error)(hint)


def _budget(
    network: nn.Module, store: Resident, recipe: Recipe, dtype: torch.dtype, max_memory: int | None
) -> int | None:
    """Bytes of hidden states to keep in memory. Raises InputError where the run cannot stay within ``max_memory``."""
    if max_memory is None:
        return BUDGET if store.streamed else None
    if not store.streamed:
        cause = "--max-memory holds where weights are streamed from their files, and this model was loaded whole"
        raise InputError(cause, "leave it out, or give a model of another architecture")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    estimated = estimate(network.config, recipe, dtype=dtype, max_memory=max_memory, world=world)
    return refuse(estimated, max_memory).in_memory


def _fingerprint(model: Model, recipe: Recipe, tokens: TokenData, dtype: torch.dtype) -> dict[str, Any]:
    """All that decides what a run writes."""
    from model_zoo import sources

    assert not isinstance(model, nn.Module)
    folder = Path(sources.resolve(model, progress=False).path)
    files = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".gguf") or p.name == "config.json")
    return {
        "model": {file.name: sha256(file) for file in files} or str(model),
        "data": tokens.fingerprint,
        "recipe": recipe.model_dump(mode="json"),
        "dtype": str(dtype),
        "versions": checkpoint.versions(),
    }


def _check_float(name: str, config: Any) -> None:
    """Refuse what is quantized already; transformers turns a GGUF file's weights into floats."""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    method = getattr(method, "value", method)
    if config is not None and method != "gguf":
        raise InputError(f"{name} is quantized already ({method})", "start from the float model")


def _data(model: nn.Module, tokenizer: Any, data: Any, recipe: Recipe) -> TokenData:
    """Windows of running text for generative models, padded sentences for encoders."""
    config = getattr(model, "config", None)
    generative = bool(getattr(model, "can_generate", lambda: False)()) and not getattr(
        config, "is_encoder_decoder", False
    )
    limit = sequence_limit(config, tokenizer) if config is not None else None
    asked = "seq_len" in recipe.model_fields_set and generative  # only a length asked for may be too long
    room = len(recipe.prefix) if isinstance(recipe.prefix, tuple) else int(recipe.prefix == "auto" and generative)
    length = recipe.seq_len if asked or limit is None else min(recipe.seq_len, limit - room)
    return calibration_data(
        data,
        tokenizer,
        recipe.samples,
        length,
        recipe.seed,
        pack=generative,
        batch_size=recipe.batch_size,
        limit=limit,
        vocabulary=_vocabulary(model),
    )


def _plan(model: nn.Module, recipe: Recipe, tokens: TokenData, format: Format, store: Resident) -> Plan:
    """The plan, with all that is known before calibration checked against the recipe."""
    plan = make_plan(model, recipe, small_batch(tokens.batches, tokens=PLAN_TOKENS), store)
    if format == "compressed-tensors" and (reasons := compressed.refusals(recipe, torch.float32, plan.rewrites)):
        raise InputError(f"compressed-tensors cannot express this: {'; '.join(reasons)}", "use --format calib, or auto")
    _check_rotation(plan, recipe)
    return plan


def _check_rotation(plan: Plan, recipe: Recipe) -> None:
    """A Hadamard block that was asked for divides the width of every site it would rotate."""
    given = dict(method.partition(":")[::2] for method in recipe.methods)
    if not given.get("hadamard"):
        return
    rotation, planned = Hadamard(given["hadamard"]), set(plan.quantized())
    for name, block in plan.blocks.items():
        for site in filter(takes_rotation, block.sites):
            if planned.issuperset(f"{name}.{path}" for path in site.consumers):
                rotation.block_for(site.features)


def _vocabulary(model: nn.Module) -> int | None:
    """How many token ids the model knows; None where it does not say."""
    with contextlib.suppress(AttributeError, NotImplementedError):
        count = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        return int(count)
    return None


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise NumericsError(f"weight {name} holds NaN or inf", "repair or download the checkpoint again")


def _check_prefix(model: nn.Module, prefix: Sequence[int], data: TokenData, limit: int | None) -> None:
    size = _vocabulary(model)
    longest = max(batch["input_ids"].shape[1] for batch in data)
    if prefix and limit is not None and longest + len(prefix) > limit:
        cause = f"windows of {longest} tokens after {len(prefix)} of a prefix are beyond the model's limit of {limit}"
        raise InputError(cause, f"use --seq-len {limit - len(prefix)}, or --prefix none")
    for token in prefix:
        if token < 0 or (size is not None and token >= size):
            raise InputError(f"prefix token {token} is not in the model's vocabulary of {size}", "choose other tokens")


def _check_apart(out: str | os.PathLike[str], *sources: object) -> None:
    """The output must not take the place of what it is made from."""
    target = Path(out).expanduser().resolve()
    for source in sources:
        if not isinstance(source, (str, os.PathLike)):
            continue
        with contextlib.suppress(OSError, ValueError):  # text, not a path
            path = Path(source).expanduser().resolve()
            if path.exists() and (path == target or target in path.parents):
                raise OutputError(f"output folder {out} holds the input {source}", "choose another --out")


def _stored_bytes(model: nn.Module, plan: Plan) -> int:
    """About what the checkpoint will take on disk."""
    owners = {id(parameter): parameter for parameter in model.parameters()}
    total = sum(parameter.numel() * parameter.element_size() for parameter in owners.values())
    for name in plan.quantized():
        entry, weight = plan.entries[name], model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        total -= int(weight.numel() * (weight.element_size() - entry.bits / 8))
    return total


def _check_done(model: nn.Module, plan: Plan) -> None:
    """Every planned Linear is quantized and no other one is."""
    done = changed_linears(model).keys()
    planned = set(plan.quantized())
    if done != planned:
        odd: Sequence[str] = sorted(done ^ planned)
        raise ModelError(f"{odd[0]} and {len(odd) - 1} more differ from the plan", "report this model as a bug")


__all__ = ["CalibError", "Cost", "Format", "Result", "cost", "plan", "quantize"]
