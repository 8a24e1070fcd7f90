"""Formats of weights (affine integers, float8, levels, two binary planes) and of inputs; as JSON values and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, Discriminator, Tag

from calib.quantizers.affine import AffineSpec
from calib.quantizers.dual_binary import DualBinarySpec
from calib.quantizers.float8 import Float8Spec
from calib.quantizers.levels import LevelSpec


def _format(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return "affine" if kind is None else kind if kind in FORMATS else "levels"


def _packs(spec: AffineSpec) -> AffineSpec:
    if spec.bits == 1:
        raise ValueError("an affine grid of one bit is for inputs; weights of one bit have the binary grid")
    return spec


AnyWeight: TypeAlias = AffineSpec | LevelSpec | DualBinarySpec  # a Float8Spec is an AffineSpec
WeightSpec: TypeAlias = Annotated[
    Annotated[AffineSpec, AfterValidator(_packs), Tag("affine")]
    | Annotated[Float8Spec, Tag("float8")]
    | Annotated[LevelSpec, Tag("levels")]
    | Annotated[DualBinarySpec, Tag("dual-binary")],
    Discriminator(_format),
]
InputSpec: TypeAlias = Annotated[
    Annotated[AffineSpec, Tag("affine")] | Annotated[Float8Spec, Tag("float8")], Discriminator(_format)
]
FORMATS: dict[str, type[AnyWeight]] = {
    "affine": AffineSpec,
    "float8": Float8Spec,
    "levels": LevelSpec,
    "dual-binary": DualBinarySpec,
}


def weight_spec(described: Mapping[str, Any]) -> AnyWeight:
    """The format that ``dataclasses.asdict`` described. Raises TypeError for unknown fields."""
    return FORMATS[_format(described)](**described)


def input_spec(described: Mapping[str, Any]) -> AffineSpec:
    """The same of inputs."""
    found = weight_spec(described)
    if not isinstance(found, AffineSpec):
        raise TypeError(f"inputs on a {found.kind} grid")
    return found


def describe_weight(spec: AnyWeight) -> dict[str, Any]:
    """A format as JSON values."""
    return dataclasses.asdict(spec)
