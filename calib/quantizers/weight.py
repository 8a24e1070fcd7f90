"""The weight formats: affine integers, levels, two binary planes; as JSON values and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, Discriminator, Tag

from calib.quantizers.affine import AffineSpec
from calib.quantizers.dual_binary import DualBinarySpec
from calib.quantizers.levels import LevelSpec


def _format(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return "affine" if kind is None else "dual-binary" if kind == "dual-binary" else "levels"


def _packs(spec: AffineSpec) -> AffineSpec:
    if spec.bits == 1:
        raise ValueError("an affine grid of one bit is for inputs; weights of one bit have the binary grid")
    return spec


AnyWeight: TypeAlias = AffineSpec | LevelSpec | DualBinarySpec
WeightSpec: TypeAlias = Annotated[
    Annotated[AffineSpec, AfterValidator(_packs), Tag("affine")]
    | Annotated[LevelSpec, Tag("levels")]
    | Annotated[DualBinarySpec, Tag("dual-binary")],
    Discriminator(_format),
]
FORMATS: dict[str, type[AnyWeight]] = {"affine": AffineSpec, "levels": LevelSpec, "dual-binary": DualBinarySpec}


def weight_spec(described: Mapping[str, Any]) -> AnyWeight:
    """The format that ``dataclasses.asdict`` described. Raises TypeError for unknown fields."""
    return FORMATS[_format(described)](**described)


def describe_weight(spec: AnyWeight) -> dict[str, Any]:
    """A format as JSON values."""
    return dataclasses.asdict(spec)
