"""The one call: model and data in, a verified low-bit checkpoint out. Read it from top to bottom."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from calib.data import TokenData, calibration_data, sequence_limit
from calib.engine import Engine, PrefixBuilder, choose_prefix
from calib.errors import CalibError, InputError, ModelError
from calib.evaluate import peak_rss_mib
from calib.export import checkpoint, compressed
from calib.export.files import check_out
from calib.export.verify import answer, reference_batch, verify
from calib.model import Plan, check_runs, make_plan, small_batch
from calib.nn import QuantLinear, route_attention
from calib.recipe import Recipe, Scheme
from calib.recipe import recipe as make_recipe
from calib.recipe import scheme as make_scheme

Format = Literal["auto", "calib", "compressed-tensors"]
Model = str | os.PathLike[str] | nn.Module
PLAN_TOKENS = 64


@dataclass
class Result:
    """A quantized model, still in memory. ``model`` computes in floats what the packed checkpoint computes in integers."""

    model: nn.Module
    tokenizer: Any
    recipe: Recipe
    plan: Plan
    report: dict[str, Any]
    seconds: dict[str, float]
    data: TokenData
    out: Path | None = None
    peak_rss_mib: float | None = field(default=None)

    def save(
        self, out: str | os.PathLike[str], format: Format = "auto", *, overwrite: bool = False, verified: bool = True
    ) -> Path:
        """Write the checkpoint; ``auto`` takes compressed-tensors where it can express the model, else calib's own format.

        Ends with a reload in a fresh process whose logits must match (``verified``). Raises OutputError, VerifyError.
        """
        start = time.perf_counter()
        reasons = compressed.expressible(self.model)
        chosen = format if format != "auto" else ("calib" if reasons else "compressed-tensors")
        if format == "auto" and reasons:
            self.report["format"] = f"calib: compressed-tensors cannot express {'; '.join(reasons)}"
        else:
            self.report["format"] = chosen
        writer = compressed if chosen == "compressed-tensors" else checkpoint
        manifest = {
            "recipe": self.recipe.model_dump(mode="json"),
            "plan": self.plan.summary(),
            "report": self.report,
            "data": {"source": self.data.source, "fingerprint": self.data.fingerprint, "tokens": self.data.tokens},
        }
        inputs = reference_batch(self.data[0])
        reference = answer(self.model, inputs)
        self.out = writer.save(self.model, self.tokenizer, Path(out), manifest=manifest, overwrite=overwrite)
        self.seconds["save"] = time.perf_counter() - start
        if verified:
            start = time.perf_counter()
            self.report["verify"] = verify(self.out, reference, inputs).as_dict()
            self.seconds["verify"] = time.perf_counter() - start
        return self.out


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
    scheme_options: dict[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Quantize ``model`` (a name in the zoo, a folder, a hub id, or an nn.Module, which is changed in place).

    scheme: a preset name or Scheme; scheme_options change a preset (calib.recipe.scheme). method: ``"os+"``,
    ``"os+,gptq"``, ``"hadamard,os+"``, ``"smoothquant:0.8"``, ``"rtn"``. data: file, folder, hub id, strings or token
    dicts; None uses text that needs no network. options: fields of calib.recipe.Recipe (samples, seq_len, seed, sites,
    prefix, search, shift, scale, inputs, float_rows, batch_size, damp).

    Raises InputError, DataError, ModelError, NumericsError, OutputError, VerifyError: one line each, cause and fix.
    """
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    stock = format == "compressed-tensors"
    recipe = make_recipe(make_scheme(scheme, **(scheme_options or {})), method, stock, **options)
    if out is not None:
        check_out(out, overwrite=overwrite)
    network, tokenizer = _load(model, tokenizer, dtype, progress)
    seconds["load"] = time.perf_counter() - started

    start = time.perf_counter()
    tokens = _data(network, tokenizer, data, recipe)
    seconds["data"] = time.perf_counter() - start

    start = time.perf_counter()
    plan = _plan(network, recipe, tokens)
    batch = small_batch(tokens.batches, rows=2, tokens=256)
    prefix_tokens, why = choose_prefix(network, plan, recipe, batch, tokenizer)
    plan.notes += [why] if why else []
    prefix = PrefixBuilder(network, prefix_tokens) if prefix_tokens else None
    if prefix is not None:
        prefix.placeholder().install(network)
    if recipe.scheme.attention is not None or recipe.scheme.kv is not None:
        route_attention(network)
    seconds["plan"] = time.perf_counter() - start

    engine = Engine(network, plan, recipe, prefix, progress)
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
    if out is not None:
        result.save(out, format, overwrite=overwrite, verified=verified)
    seconds["total"] = time.perf_counter() - started
    result.peak_rss_mib = peak_rss_mib()
    return result


def plan(
    model: Model,
    scheme: str | Scheme = "w8a8-static",
    method: str = "os+",
    *,
    tokenizer: Any = None,
    progress: bool = True,
    scheme_options: dict[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """What ``quantize`` would do to each Linear, without collecting statistics; needs one forward of a few tokens."""
    short = {**options, "samples": 2, "seq_len": 32}
    recipe = make_recipe(make_scheme(scheme, **(scheme_options or {})), method, **short)
    network, tokenizer = _load(model, tokenizer, torch.float32, progress)
    return _plan(network, recipe, _data(network, tokenizer, None, recipe))


def _load(model: Model, tokenizer: Any, dtype: torch.dtype, progress: bool) -> tuple[nn.Module, Any]:
    if isinstance(model, nn.Module):
        if any(isinstance(m, QuantLinear) for m in model.modules()):
            raise InputError("the model is quantized already", "start from the float model")
        model = model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        # nn.Module's own cast: transformers refuses it on a model that was dequantized from a GGUF file
        return nn.Module.to(model, dtype), tokenizer
    from model_zoo.sources import load_model

    network, found = load_model(model, dtype=dtype, progress=progress)
    if getattr(network.config, "quantization_config", None) is not None and not hasattr(network, "hf_quantizer_gguf"):
        method = _quant_method(network.config.quantization_config)
        if method != "gguf":
            raise InputError(f"{model} is quantized already ({method})", "start from the float model")
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network, tokenizer if tokenizer is not None else found


def _quant_method(config: Any) -> str:
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method))


def _data(model: nn.Module, tokenizer: Any, data: Any, recipe: Recipe) -> TokenData:
    """Windows of running text for generative models, padded sentences for encoders."""
    config = getattr(model, "config", None)
    generative = bool(getattr(model, "can_generate", lambda: False)()) and not getattr(config, "is_encoder_decoder", False)
    limit = sequence_limit(config, tokenizer) if config is not None else None
    asked = "seq_len" in recipe.model_fields_set and generative  # only a length asked for may be too long
    length = recipe.seq_len if asked or limit is None else min(recipe.seq_len, limit)
    return calibration_data(
        data, tokenizer, recipe.samples, length, recipe.seed, pack=generative, batch_size=recipe.batch_size, limit=limit
    )


def _plan(model: nn.Module, recipe: Recipe, tokens: TokenData) -> Plan:
    batch = small_batch(tokens.batches, tokens=PLAN_TOKENS)
    check_runs(model, batch)
    return make_plan(model, recipe, batch)


def _check_done(model: nn.Module, plan: Plan) -> None:
    """Every planned Linear is quantized and no other one is."""
    done = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    planned = set(plan.quantized())
    if done != planned:
        odd: Sequence[str] = sorted(done ^ planned)
        raise ModelError(f"{odd[0]} and {len(odd) - 1} more differ from the plan", "report this model as a bug")


__all__ = ["CalibError", "Format", "Result", "plan", "quantize"]
