"""A QuantLinear's format as JSON values, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from calib.errors import ModelError
from calib.nn.activation import ActivationQuantizer
from calib.nn.linear import QuantLinear
from calib.quantizers import AffineSpec, AnyWeight, describe_weight, weight_spec


def describe_linear(module: QuantLinear) -> dict[str, Any]:
    """One group entry, without its targets."""
    quantizer = module.input
    return linear_group(
        module.weight_spec,
        quantizer.spec,
        bias=module.bias is not None,
        shift=quantizer.shift is not None,
        rescale=quantizer.rescale is not None,
        hadamard=quantizer.hadamard,
        float_rows=quantizer.float_rows,
    )


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


def quant_linear(stock: nn.Module, group: Mapping[str, Any], name: str, dtype: torch.dtype) -> QuantLinear:
    """An empty QuantLinear of the described format, shaped like a Linear. Raises ModelError where it does not fit."""
    try:
        weights = weight_spec(group["weights"])
        spec = None if group["input"] is None else AffineSpec(**group["input"])
        n_in, n_out = int(stock.in_features), int(stock.out_features)  # type: ignore[arg-type]
        quantizer = ActivationQuantizer(
            spec,
            n_in,
            shift=group["shift"],
            rescale=group["rescale"],
            hadamard=group["hadamard"],
            float_rows=group["float_rows"],
        )
        return QuantLinear(n_in, n_out, weights, quantizer, group["bias"], dtype)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"quantization_config does not fit {name}: {error}", "install the calib that wrote it"
        ) from error
