"""Scheme (which number formats, which layers) and Recipe (which methods, how): validated data with named presets."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from calib.errors import InputError
from calib.quantizers import AffineSpec, AnyWeight, DualBinarySpec, Float8Spec, InputSpec, LevelSpec, WeightSpec

SiteChoice = Literal["norm", "vo", "updown", "fc", "fused"]
FOLDS: tuple[SiteChoice, ...] = ("norm", "vo", "updown", "fc")
METHODS = ("rtn", "smoothquant", "awq", "os+", "hadamard", "rotate", "gptq", "gptaq", "low_rank", "basel")
EITHER = (("gptq", "gptaq"), ("hadamard", "rotate"))  # of these a recipe has one
VALUED = ("smoothquant", "hadamard", "rotate", "low_rank", "basel")  # methods that take a value, as in smoothquant:0.8


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Override(_Data):
    """Another weight format for the Linears in whose full names the regular expression ``rule`` is found."""

    rule: str
    weights: WeightSpec

    @field_validator("rule")
    @classmethod
    def _compiles(cls, rule: str) -> str:
        _check_rule("override", rule)
        return rule


class Scheme(_Data):
    """Number formats. ``exclude``: regular expressions on full module names of Linears that stay float; ``overrides``:
    of those with another weight format, the first that matches.

    attention: format of q, k, v and the probabilities as they enter the attention matmuls; kv: format of the keys and
    values in the cache. Both dynamic, off by default. rounds: False where weights and inputs stay float, for recipes
    that only truncate.
    """

    name: str
    weights: WeightSpec
    inputs: InputSpec | None = None
    attention: AffineSpec | None = None
    kv: AffineSpec | None = None
    exclude: tuple[str, ...] = ()
    rounds: bool = True
    overrides: tuple[Override, ...] = ()

    @property
    def static(self) -> bool:
        return self.inputs is not None and not self.inputs.dynamic

    def override_of(self, name: str) -> Override | None:
        """The first rule that matches a Linear's full name."""
        return next((each for each in self.overrides if re.search(each.rule, name)), None)

    def weights_of(self, name: str) -> AnyWeight:
        """The weight format of the Linear of that full name."""
        found = self.override_of(name)
        return self.weights if found is None else found.weights


def _check_rule(kind: str, rule: str) -> None:
    try:
        re.compile(rule)
    except re.error as error:
        raise InputError(f"{kind} rule {rule!r} is not a regular expression ({error})", "fix the pattern") from error


def _weights(bits: int) -> AffineSpec:
    return AffineSpec(bits, symmetric=True, granularity="channel", range="minmax" if bits > 4 else "mse")


def _token(bits: int) -> AffineSpec:
    return AffineSpec(bits, symmetric=False, granularity="token", dynamic=True)


def _tensor(bits: int) -> AffineSpec:
    return AffineSpec(bits, symmetric=False, granularity="tensor", range="minmax" if bits == 8 else "mse")


GROUP64 = AffineSpec(4, symmetric=True, granularity="group", group_size=64, range="mse")
LOW_BIT: dict[str, AnyWeight] = {  # the grid with the least error at each size, in groups of 64
    "w1{}": LevelSpec(kind="binary", levels=2, granularity="group", group_size=64),
    "w1.58{}": LevelSpec(kind="seq", levels=3, granularity="group", group_size=64),
    "w2{}": LevelSpec(kind="seq", levels=4, granularity="group", group_size=64),
    "w2{}-fdb": DualBinarySpec(granularity="group", group_size=64),
    "w3{}": LevelSpec(kind="seq", levels=8, granularity="group", group_size=64),
}
SCHEMES: dict[str, Scheme] = {
    "w8a8": Scheme(name="w8a8", weights=_weights(8), inputs=_token(8)),
    "w8a8-static": Scheme(name="w8a8-static", weights=_weights(8), inputs=_tensor(8)),
    "w6a6": Scheme(name="w6a6", weights=_weights(6), inputs=_token(6)),
    "w6a6-static": Scheme(name="w6a6-static", weights=_weights(6), inputs=_tensor(6)),
    "w4a8": Scheme(name="w4a8", weights=_weights(4), inputs=_token(8)),
    "w4a8-static": Scheme(name="w4a8-static", weights=_weights(4), inputs=_tensor(8)),
    "w4a4": Scheme(name="w4a4", weights=_weights(4), inputs=_token(4)),
    "w4a4-static": Scheme(name="w4a4-static", weights=_weights(4), inputs=_tensor(4)),
    "w4a16": Scheme(name="w4a16", weights=GROUP64),
    "fp8": Scheme(name="fp8", weights=Float8Spec(), inputs=Float8Spec(granularity="token", dynamic=True)),
    "fp8-static": Scheme(name="fp8-static", weights=Float8Spec(), inputs=Float8Spec(granularity="tensor")),
    **{
        name.format(acts): Scheme(name=name.format(acts), weights=weights, inputs=inputs)
        for name, weights in LOW_BIT.items()
        for acts, inputs in (("a16", None), ("a8", _token(8)))
    },
    "none": Scheme(name="none", weights=_weights(8), rounds=False),
}


class Recipe(_Data):
    """What is done, in order, and on what data.

    methods: ``name`` or ``name:value`` (SmoothQuant's alpha, Hadamard's block). sites: which site classes may be
    transformed; ``fused`` lets the input quantizer carry what no producer can absorb. shift, scale: OS+'s two halves;
    shift ``auto`` keeps a site's shift only where it lowers the site's loss, True always shifts, as published.
    objective: os+ judges q, k, v by the attention context and gate, up by their product (``context``), or all by the
    plain output of its linears (``output``).
    prefix: ``auto`` looks for massive first-token activations under static grids, ``on`` under any; ``none``; or the
    token ids.
    bias_correction: add what rounding the weights moves the output by to the biases, averaged over sampled tokens,
    massive ones weighing little.
    float_rows: share of rows (the largest) that a static range leaves out and that run in float; 0 is off.
    refine: steps that learn from a block's output error, once it is rounded; 0: off. learn: what of ``rounding``,
    ``clipping`` (scales of the weights), ``inputs`` (static scales), ``scale`` and ``shift`` (behind norms).
    inputs: whether a block is calibrated on what the quantized blocks before it produce, or on float.
    keep: low_rank truncates the planned linears to this share of their parameters; max_size: to what makes the whole
    checkpoint this many bytes. select: which ranks, by gain per parameter over all layers (``global``, where the
    variant can tell), the same share of each (``uniform``), or between the two, where the model's answers move least on
    some of the data (``auto``; where training follows, ``global``). rank, factors: of the term that
    makes up for rounding, where nothing is truncated. steps, lr, new_bases: basel's, half of the steps for importances
    and half for factors.
    """

    scheme: Scheme
    methods: tuple[str, ...] = ("os+",)
    sites: tuple[SiteChoice, ...] = FOLDS
    shift: bool | Literal["auto"] = "auto"
    scale: bool = True
    search: Literal["fast", "exhaustive"] = "fast"
    objective: Literal["context", "output"] = "context"
    prefix: Literal["auto", "on", "none"] | tuple[int, ...] = "auto"
    float_rows: float = Field(0.0, ge=0, lt=1)
    refine: int = Field(0, ge=0)
    learn: tuple[Literal["rounding", "clipping", "inputs", "scale", "shift"], ...] = ("rounding", "clipping")
    inputs: Literal["quantized", "float"] = "quantized"
    bias_correction: bool = False
    samples: int = 128
    seq_len: int = 512
    batch_size: int = 8
    seed: int = Field(0, ge=0, lt=2**32)
    damp: float = Field(0.01, ge=0)
    keep: float | None = Field(None, gt=0, le=1)
    max_size: int | None = Field(None, gt=0)
    select: Literal["auto", "global", "uniform"] = "auto"
    rank: int = Field(16, ge=1)
    factors: Literal["float", "int8"] = "float"
    steps: int = Field(300, ge=2)
    lr: float = Field(1e-4, gt=0)
    new_bases: int = Field(8, ge=0)

    @property
    def truncates(self) -> bool:
        return self.keep is not None or self.max_size is not None

    @property
    def prefixes(self) -> bool:
        """Whether a prefix is asked for, not only allowed where one is needed."""
        return self.prefix not in ("none", "auto")

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for method in methods:
            name, colon, _ = method.partition(":")
            if name not in METHODS:
                raise ValueError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
            if colon and name not in VALUED:
                raise ValueError(f"{name} takes no value, as in {method!r}; only {' and '.join(VALUED)} do")
        if not methods:
            raise ValueError(f"no method given; choose from {', '.join(METHODS)}")
        names = [method.partition(":")[0] for method in methods]
        for alike in (*((name, name) for name in names), *EITHER):
            if len(odd := [name for name in names if name in alike]) > 1:
                raise ValueError(f"{' and '.join(odd)} are given together, and only one of them would run; give one")
        return methods

    @field_validator("samples", "seq_len", "batch_size")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("must be at least 1")
        return value


def scheme(name: str | Scheme, **changes: object) -> Scheme:
    """A preset by name, or the given scheme.

    changes: ``weight_bits``, ``weight_group`` (0: per channel), ``weight_symmetric``, ``weight_range``, ``input_bits``,
    ``input_symmetric``, ``input_granularity`` ('tensor', 'token'), ``input_range``, ``attention_bits``, ``kv_bits``,
    ``exclude``, ``overrides`` (Override, or pairs of a rule and a weight format or the name of the preset whose weight
    format is meant); None leaves the preset's value.
    """
    if isinstance(name, Scheme):
        base = name
    elif name in SCHEMES:
        base = SCHEMES[name]
    else:
        raise InputError(f"unknown scheme {name!r}", f"choose from {', '.join(SCHEMES)}")
    given = {key: value for key, value in changes.items() if value is not None}
    weights, inputs = base.weights, base.inputs
    for key in [k for k in given if k.startswith(("weight_", "input_"))]:
        side, _, field = key.partition("_")
        value = given.pop(key)
        if side == "weight":
            weights = _changed(weights, field, value)
        elif inputs is None:
            raise InputError(
                f"{key} given, but scheme {base.name} leaves activations in float", "choose w8a8 or the like"
            )
        else:
            inputs = _changed(inputs, field, value)
    if "input_range" in changes and changes["input_range"] is not None and inputs is not None and inputs.dynamic:
        raise InputError(
            f"a range rule is given and {base.name}'s activations are dynamic", "choose w8a8-static or the like"
        )
    update: dict[str, object] = {"weights": weights, "inputs": inputs}
    for key, target in (("attention_bits", "attention"), ("kv_bits", "kv")):
        if bits := given.pop(key, None):
            assert isinstance(bits, int)
            update[target] = AffineSpec(bits, symmetric=False, granularity="token", dynamic=True)
    if "exclude" in given:
        update["exclude"] = tuple(given.pop("exclude"))  # type: ignore[arg-type]
    if "overrides" in given:
        update["overrides"] = tuple(_override(each) for each in given.pop("overrides"))  # type: ignore[attr-defined]
    if given:
        raise InputError(f"unknown scheme options {sorted(given)}", "see calib.recipe.scheme")
    result = base.model_copy(update=update)
    for rule in result.exclude:
        _check_rule("exclude", rule)
    return result


def _override(given: Override | tuple[str, AnyWeight | str]) -> Override:
    if isinstance(given, Override):
        return given
    rule, weights = given
    return Override(rule=rule, weights=scheme(weights).weights if isinstance(weights, str) else weights)


CHOICES = {"granularity": ("tensor", "channel", "token"), "range": ("minmax", "mse", "percentile")}


def _changed(spec: Any, field: str, value: object) -> Any:
    if not isinstance(spec, AffineSpec) and field not in ("group", "range"):
        raise InputError(f"the {spec.kind} grid has no {field} to change", "choose an affine scheme, e.g. w4a16")
    if field == "range" and not isinstance(spec, AffineSpec):
        value = {"minmax": "published"}.get(str(value), value)
    elif field in CHOICES and value not in CHOICES[field]:
        raise InputError(f"unknown {field} {value!r}", f"use {', '.join(CHOICES[field])}")
    if field == "group":
        if not value:
            return spec.with_(granularity="channel", group_size=None)
        return spec.with_(granularity="group", group_size=value)
    if field == "granularity":
        return spec.with_(granularity=value, dynamic=value != "tensor")
    return spec.with_(**{field: value})


def recipe(scheme: Scheme, method: str, stock: bool = False, **options: object) -> Recipe:
    """A Recipe from ``"os+,gptq"`` and options, with one-line errors; options that are None keep their defaults.

    stock: the result must load without calib, so nothing may be fused into input quantizers and no prefix is taken.
    Otherwise static schemes, whose quantizers are calib's own anyway, fuse what no neighbour can absorb.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if scheme.static and not stock:
        given.setdefault("sites", (*FOLDS, "fused"))
    methods = tuple(part.strip() for part in method.split(",") if part.strip())
    _check_low_rank(scheme, {name.partition(":")[0] for name in methods}, given, stock)
    if stock and ("fused" in tuple(given.get("sites", ())) or given.get("prefix", "none") not in ("none", "auto")):  # type: ignore[arg-type]
        raise InputError("a stock format holds neither fused transforms nor a prefix", "use --format calib")
    if stock or {"keep", "max_size"} & given.keys():  # ranks are chosen before a prefix would have keys and values
        if given.get("prefix", "none") not in ("none", "auto"):
            raise InputError("weights are truncated without a prefix", "use --prefix none")
        given["prefix"] = "none"
    formats = [scheme.weights, *(each.weights for each in scheme.overrides)]
    if given.get("refine") and not (scheme.rounds and all(_refines(spec) for spec in formats)):
        what = "has another" if scheme.rounds else "has none"
        raise InputError(f"refine learns affine integers, and {scheme.name} {what}", "choose e.g. w4a16, or no refine")
    learn = given.get("learn", ())
    if learn and not given.get("refine"):
        raise InputError("learn says what refine learns, and refine is 0", "add refine, say 40 steps")
    if {"inputs", "shift"} & set(learn) and not scheme.static:  # type: ignore[call-overload]
        raise InputError(f"{scheme.name} has no static inputs to learn", "learn rounding, clipping, scale")
    if given.get("float_rows") and not scheme.static:
        raise InputError(
            "rows beyond the static range run in float, and this scheme has no static range",
            "choose w8a8-static or the like",
        )
    try:
        return Recipe(scheme=scheme, methods=methods, **given)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"option {where}: {first['msg'].removeprefix('Value error, ')}", "see calib quantize --help"
        ) from error


def _refines(spec: AnyWeight) -> bool:
    return isinstance(spec, AffineSpec) and spec.integer


def _check_low_rank(scheme: Scheme, methods: set[str], given: dict[str, object], stock: bool) -> None:
    truncates = {"keep", "max_size"} & given.keys()
    owners = {"low_rank": {"select", "rank", "factors"}, "basel": {"steps", "lr", "new_bases"}}
    for owner, options in owners.items():
        if owner not in methods and (odd := options & given.keys()):
            raise InputError(f"option {min(odd)} is of {owner}, which is not among the methods", f"add {owner}")
    if truncates and not methods & owners.keys():
        raise InputError(f"option {min(truncates)} is of low_rank and basel, and neither is a method", "add low_rank")
    if "basel" in methods and (scheme.rounds or methods != {"basel"} or not truncates):
        raise InputError("basel trains a float model down to a size", "use it alone, with scheme none and keep")
    if truncates == {"keep", "max_size"}:
        raise InputError("keep and max_size both say how much is kept", "give one")
    if truncates and {"rank", "factors"} & given.keys():
        raise InputError("weights are truncated, and rank or factors say how to compensate rounding", "give one")
    if not scheme.rounds and (not truncates or methods not in ({"low_rank"}, {"basel"})):
        raise InputError(
            "scheme none rounds nothing, so it can only truncate", "use low_rank or basel with keep, alone"
        )
    if stock and methods & owners.keys():
        raise InputError("the format holds no low-rank factors", "use --format calib, float, or auto")
