"""The options that `calib quantize` and `calib plan` share: what they say of a scheme and a recipe."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import ValidationError

from calib.errors import InputError
from calib.export.load import load_tokenizer
from calib.export.targets import Format
from calib.files import is_special
from calib.model.cost import parse_size
from calib.recipe import FOLDS, METHODS, SCHEMES, Scheme

RANGES = ("minmax", "mse", "percentile")
FORMATS = typing.get_args(Format)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Option = typer.Option


def dtype_named(name: str) -> torch.dtype:
    return DTYPES[one_of("dtype", name, list(DTYPES))]


def one_of(option: str, value: str, known: Sequence[str]) -> str:
    """value, or an InputError that lists what the option takes."""
    if value not in known:
        raise InputError(f"unknown {option} {value!r}", f"use {', '.join(known)}")
    return value


def set_up(threads: int | None, quiet: bool = False) -> None:
    """What every command does first."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if quiet:
        warnings.simplefilter("ignore")
    if threads is not None:
        torch.set_num_threads(threads)


LEARNED = ("rounding", "clipping", "inputs", "scale", "shift")
RANKS = ("auto", "global", "uniform")


@dataclass(frozen=True)
class RecipeOptions:
    """As typed. None: what the scheme's preset, or method auto, says."""

    scheme: Annotated[
        str, Option(help=f"Number formats: {', '.join(SCHEMES)}, or a .json that calib inspect --scheme-out wrote.")
    ] = "w8a8-static"
    method: Annotated[
        str, Option(help=f"auto (tries the best known), or, comma separated, in order: {', '.join(METHODS)}.")
    ] = "auto"
    format: Annotated[str, Option(help=f"Of the checkpoint: {', '.join(FORMATS)}.")] = "auto"
    prefix: Annotated[
        str, Option(help="Tokens kept before every input in float: auto (under static grids), on, none, ids, or text.")
    ] = "auto"
    sites: Annotated[
        str, Option(help="What may be transformed: auto, exact, all, or some of norm,vo,updown,fc,fused.")
    ] = "auto"
    exclude: Annotated[
        list[str] | None, Option(help="Regular expression on module names left in float; repeatable.")
    ] = None
    override: Annotated[
        list[str] | None,
        Option(help="REGEX=SCHEME: matching linears take that scheme's weight format, the first rule; repeatable."),
    ] = None
    weights_group: Annotated[
        int | None, Option(min=0, help="Weights that share a scale; 0: all of an output channel.")
    ] = None
    weights_symmetric: Annotated[
        bool | None,
        Option("--weights-symmetric/--weights-asymmetric", help="Weight grids without or with zero points."),
    ] = None
    weights_range: Annotated[str | None, Option(help=f"Weight ranges: {', '.join(RANGES)}.")] = None
    acts_granularity: Annotated[str | None, Option(help="Activation ranges: tensor (static) or token (dynamic).")] = (
        None
    )
    acts_symmetric: Annotated[
        bool | None,
        Option("--acts-symmetric/--acts-asymmetric", help="Activation grids without or with zero points."),
    ] = None
    acts_range: Annotated[str | None, Option(help=f"Static activation ranges: {', '.join(RANGES)}.")] = None
    kv_bits: Annotated[int | None, Option(help="Quantize the key-value cache: 2 to 8 bits.")] = None
    attention_bits: Annotated[
        int | None, Option(help="Quantize q, k, v and probabilities in attention: 2 to 8 bits.")
    ] = None
    shift: Annotated[str, Option(help="Shift of os+: on, off, or auto, where it lowers a site's loss.")] = "auto"
    scale: Annotated[str, Option(help="Scale of os+: on or off.")] = "on"
    search: Annotated[str, Option(help="Threshold search of os+: fast or exhaustive.")] = "fast"
    objective: Annotated[str, Option(help="What os+ minimises: context (attention, gating) or output (linears).")] = (
        "context"
    )
    damp: Annotated[float, Option(min=0.0, help="Damping of gptq, of the mean of its diagonal.")] = 0.01
    refine: Annotated[
        int | None,
        Option(min=0, help="Steps of learning from each block's output. Default: 0, or what auto's recipe says."),
    ] = None
    learn: Annotated[
        str | None,
        Option(
            help="What --refine learns of rounding,clipping,inputs,scale,shift (inputs: static scales); the first two."
        ),
    ] = None
    inputs: Annotated[str, Option(help="Calibrate a block on quantized or float outputs of those before it.")] = (
        "quantized"
    )
    bias_correction: Annotated[
        bool, Option("--bias-correction", help="Make good in the biases what rounding moves the outputs by on average.")
    ] = False
    float_rows: Annotated[
        float, Option(min=0.0, max=1.0, help="Share of rows left out of static ranges and run in float.")
    ] = 0.0

    keep: Annotated[
        float | None, Option(min=0.0, max=1.0, help="Share of the weights' parameters that low_rank keeps.")
    ] = None
    max_size: Annotated[str | None, Option(help="Size of the checkpoint that low_rank truncates to, like 80MiB.")] = (
        None
    )
    select: Annotated[
        str,
        Option(help="Ranks of low_rank: global (over all layers), uniform; auto tries both and between."),
    ] = "auto"
    rank: Annotated[
        int | None, Option(min=1, help="Of what low_rank adds for rounding errors, where nothing is truncated; 16.")
    ] = None
    factors: Annotated[str | None, Option(help="What it is stored in: float or int8.")] = None
    steps: Annotated[int | None, Option(min=2, help="Training steps of basel, of one batch each; 300.")] = None
    lr: Annotated[float | None, Option(min=0.0, help="Learning rate of basel; 1e-4.")] = None
    new_bases: Annotated[int | None, Option(min=0, help="Bases that basel adds to each weight, at most; 8.")] = None

    def arguments(self, model: str) -> dict[str, Any]:
        """Keyword arguments of calib.quantize and calib.plan; InputError where a word is unknown."""
        switch: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
        return {
            "scheme": _scheme(self.scheme),
            "method": self.method,
            "format": one_of("format", self.format, FORMATS),
            "scheme_options": self._scheme_options(),
            "sites": _sites(self.sites),
            "shift": switch[one_of("shift", self.shift, ("auto", "on", "off"))],
            "scale": switch[one_of("scale", self.scale, ("on", "off"))],
            "search": one_of("search", self.search, ("fast", "exhaustive")),
            "objective": one_of("objective", self.objective, ("context", "output")),
            "inputs": one_of("inputs", self.inputs, ("quantized", "float")),
            "damp": self.damp,
            "refine": self.refine,
            "learn": None if self.learn is None else tuple(one_of("learn", p, LEARNED) for p in self.learn.split(",")),
            "bias_correction": self.bias_correction,
            "float_rows": self.float_rows,
            "prefix": _prefix(self.prefix, model),
            "keep": self.keep,
            "max_size": None if self.max_size is None else parse_size(self.max_size, "--max-size"),
            "select": None if self.select == "auto" else one_of("select", self.select, RANKS),
            "rank": self.rank,
            "steps": self.steps,
            "lr": self.lr,
            "new_bases": self.new_bases,
            "factors": None if self.factors is None else one_of("factors", self.factors, ("float", "int8")),
        }

    def _scheme_options(self) -> dict[str, Any]:
        for name, rule in (("weights-range", self.weights_range), ("acts-range", self.acts_range)):
            one_of(name, rule or "minmax", RANGES)
        one_of("acts-granularity", self.acts_granularity or "token", ("tensor", "token"))
        return {
            "exclude": tuple(self.exclude or ()) or None,
            "overrides": tuple(map(_rule_and_scheme, self.override or ())) or None,
            "weight_group": self.weights_group,
            "weight_symmetric": self.weights_symmetric,
            "weight_range": self.weights_range,
            "input_granularity": self.acts_granularity,
            "input_symmetric": self.acts_symmetric,
            "input_range": self.acts_range,
            "kv_bits": self.kv_bits,
            "attention_bits": self.attention_bits,
        }


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Spread RecipeOptions over the command's own options, in the place of its parameter ``recipe``."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    hints = typing.get_type_hints(RecipeOptions, include_extras=True)
    names = [field.name for field in dataclasses.fields(RecipeOptions)]
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(RecipeOptions)
    ]
    parameters = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for p in own
        for each in (shared if p.name == "recipe" else [p])
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(recipe=RecipeOptions(**{name: given.pop(name) for name in names}), **given)

    del run.__wrapped__  # typer would read its signature instead
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _rule_and_scheme(text: str) -> tuple[str, str]:
    """REGEX and SCHEME of REGEX=SCHEME; the expression may hold signs of equality."""
    rule, sign, name = text.rpartition("=")
    if not sign:
        raise InputError(f"override {text!r} names no scheme", "write REGEX=SCHEME, e.g. layers.0.=w8a8")
    one_of("scheme in an override", name, tuple(SCHEMES))
    return rule, name


def _scheme(text: str) -> str | Scheme:
    """A preset's name as it is; a .json file as the Scheme that it holds."""
    if not text.endswith(".json"):
        return text
    if is_special(Path(text).expanduser()):
        raise InputError(f"scheme file {text} is a pipe or a device, not a file", "check --scheme")
    try:
        return Scheme.model_validate_json(Path(text).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"scheme file {text} cannot be read ({error.strerror})", "check --scheme") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{text} is no scheme: it is not UTF-8", "use what calib inspect wrote") from error
    except InputError as error:  # of a format in it
        raise InputError(f"{text} is no scheme: {error.cause}", error.fix) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(f"{text} is no scheme: {where}: {first['msg']}", "use what calib inspect wrote") from error


def _sites(text: str) -> tuple[str, ...] | None:
    """None where the recipe decides: what folds exactly, and under static schemes the fused rest."""
    named = {"auto": None, "exact": FOLDS, "all": (*FOLDS, "fused")}
    if text in named:
        return named[text]
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    for part in parts or (text,):
        one_of("sites", part, (*FOLDS, "fused", *named))
        if part in named:
            raise InputError(f"sites {text!r} mixes {part} with others", f"use {part} alone")
    return parts


def _prefix(text: str, model: str) -> str | tuple[int, ...]:
    """auto, on, none, token ids, or text, which the model's tokenizer turns into ids."""
    if text in ("auto", "on", "none"):
        return text
    parts = text.split(",")
    if all(part.strip().isdecimal() for part in parts):
        return tuple(int(part) for part in parts)
    tokenizer = load_tokenizer(model) if text else None
    ids = () if tokenizer is None else tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if text and tokenizer is None:
        raise InputError(f"prefix {text!r} is text and {model} has no tokenizer", "give ids: --prefix 1")
    if not ids:
        raise InputError(f"prefix {text!r} has no tokens", "use auto, on, none, ids (--prefix 1,2) or text")
    return ids
