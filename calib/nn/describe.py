"""The format of a linear that calib made, as JSON values, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from calib.errors import InputError, ModelError
from calib.nn.activation import ActivationQuantizer
from calib.nn.linear import QuantLinear
from calib.nn.low_rank import LowRankLinear
from calib.nn.side_branch import SideBranch
from calib.quantizers import AffineSpec, AnyWeight, describe_weight, input_spec, weight_spec


def describe_linear(module: QuantLinear | LowRankLinear) -> dict[str, Any]:
    """One group entry, without its targets."""
    if isinstance(module, LowRankLinear):
        parts = {"down": module.down, "up": module.up}
        forms = {name: describe_linear(m) if isinstance(m, QuantLinear) else None for name, m in parts.items()}
        return {"rank": module.rank, **forms, "bias": module.bias is not None}
    quantizer, side = module.input, module.side
    group = linear_group(
        module.weight_spec,
        quantizer.spec,
        bias=module.bias is not None,
        shift=quantizer.shift is not None,
        rescale=quantizer.rescale is not None,
        hadamard=quantizer.hadamard,
        float_rows=quantizer.float_rows,
    )
    return group if side is None else {**group, "side": {"rank": side.rank, "bits": side.bits}}


def linear_group(
    weights: AnyWeight,
    inputs: AffineSpec | None,
    *,
    bias: bool,
    shift: bool = False,
    rescale: bool = False,
    hadamard: int = 1,
    float_rows: bool = False,
) -> dict[str, Any]:
    """What linears of one kind have in common, as JSON values."""
    return {
        "weights": describe_weight(weights),
        "input": None if inputs is None else dataclasses.asdict(inputs),
        "shift": shift,
        "rescale": rescale,
        "hadamard": hadamard,
        "float_rows": float_rows,
        "bias": bias,
    }


def quant_linear(
    stock: nn.Module, group: Mapping[str, Any], name: str, dtype: torch.dtype
) -> QuantLinear | LowRankLinear:
    """An empty linear of the described format, shaped like a Linear. Raises ModelError where it does not fit."""
    try:
        n_in, n_out = int(stock.in_features), int(stock.out_features)  # type: ignore[arg-type]
        if "rank" not in group:
            return _quantized(n_in, n_out, group, dtype)
        rank = int(group["rank"])
        return LowRankLinear(
            _part(n_in, rank, group["down"], False, dtype), _part(rank, n_out, group["up"], group["bias"], dtype)
        )
    except (KeyError, TypeError, AttributeError, ValueError, InputError) as error:
        raise ModelError(
            f"quantization_config does not fit {name}: {error}", "install the calib that wrote it"
        ) from error


def _part(n_in: int, n_out: int, group: Mapping[str, Any] | None, bias: bool, dtype: torch.dtype) -> nn.Module:
    """One factor: float without a group."""
    return nn.Linear(n_in, n_out, bias=bias, dtype=dtype) if group is None else _quantized(n_in, n_out, group, dtype)


def _quantized(n_in: int, n_out: int, group: Mapping[str, Any], dtype: torch.dtype) -> QuantLinear:
    spec = None if group["input"] is None else input_spec(group["input"])
    quantizer = ActivationQuantizer(
        spec,
        n_in,
        shift=group["shift"],
        rescale=group["rescale"],
        hadamard=group["hadamard"],
        float_rows=group["float_rows"],
    )
    module = QuantLinear(n_in, n_out, weight_spec(group["weights"]), quantizer, group["bias"], dtype)
    if (side := group.get("side")) is not None:
        module.side = SideBranch(n_in, n_out, side["rank"], side["bits"], dtype)
    return module
