"""QuantLinear: packed codes and scales, run as fake-quant floats or integer kernels from the same buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.errors import InputError
from calib.nn import kernels
from calib.nn.activation import ActivationQuantizer, apply_keeping_dtypes
from calib.nn.side_branch import SideBranch
from calib.quantizers import AnyWeight
from calib.solvers import rounded

Mode = Literal["packed", "fake", "float"]


class CalledAsWeight:
    """F.linear(x, module) calls the module: for experts kept as parameters, see model/linears."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return NotImplemented
        given = dict(zip(("input", "weight", "bias"), args, strict=False), **(kwargs or {}))
        if not isinstance(given["weight"], cls):
            return NotImplemented
        y = given["weight"](given["input"])  # type: ignore[operator]
        return y if given.get("bias") is None else y + given["bias"]


class QuantLinear(CalledAsWeight, nn.Module):
    """y = Q_a(x) Q_w(W)^T + b.

    Buffers are the checkpoint: ``weight`` int8 [out, in] at 8 bits, else ``weight_packed`` int32 [out,
    words]; ``weight_scale`` (fp32; of groups bf16, of low-bit grids fp16) and ``weight_zero_point`` int8 (asymmetric
    only) of shape [1], [out, 1] or [out, in/g, 1], with two planes [..., 2]; ``bias`` fp32 or model dtype [out];
    ``input.*`` of ActivationQuantizer; ``side.*`` of a SideBranch, which takes the transformed input in floats and
    adds to the result in every mode. ``mode`` 'packed' runs the fastest kernel this machine has for the
    format, 'fake' the arithmetic that defines the same result
    (see kernels.py), 'float' F.linear on decoded values: rounded otherwise in the last bit, as other programs
    simulate it, and the only one that records gradients ('fake' turns to it for an input that needs one). What
    a mode prepares is dropped whenever the buffers are loaded, moved, copied or set.
    """

    weight: Tensor | None
    weight_packed: Tensor | None
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_spec: AnyWeight,
        input_quantizer: ActivationQuantizer,
        bias: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        group = weight_spec.group_size
        if group is not None and in_features % group:
            raise InputError(
                f"group size {group} does not divide {in_features} input channels",
                "choose a divisor, or exclude the layer",
            )
        self.in_features, self.out_features = in_features, out_features
        self.weight_spec, self.dtype = weight_spec, dtype
        self.input = input_quantizer
        eight = weight_spec.bits == 8
        words = 0 if eight else weight_spec.words(in_features)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8) if eight else None)
        self.register_buffer("weight_packed", None if eight else torch.zeros(out_features, words, dtype=torch.int32))
        shape = weight_spec.scale_shape(out_features, in_features)
        self.register_buffer("weight_scale", torch.ones(shape, dtype=weight_spec.scale_dtype))
        zero_point = None if weight_spec.symmetric else torch.zeros(shape, dtype=torch.int8)
        self.register_buffer("weight_zero_point", zero_point)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)
        self.side: SideBranch | None = None
        self.mode: Mode = "fake"
        self._kernel: kernels.Kernel | None = None

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        weight_spec: AnyWeight,
        input_quantizer: ActivationQuantizer,
        *,
        codes: Tensor | None = None,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> QuantLinear:
        """Quantize weight [out, in] (of transformed input) to nearest, or take a solver's codes and scale."""
        out_features, in_features = weight.shape
        module = cls(in_features, out_features, weight_spec, input_quantizer, bias is not None, weight.dtype)
        if codes is None:
            codes, scale, zero_point = rounded(weight, weight_spec, importance)
        assert scale is not None and zero_point is not None
        module.set_codes(codes, scale, zero_point)
        if bias is not None:
            module.bias = bias.detach().clone()
        return module

    def set_codes(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Take int8 codes [out, in], scale and zero point (shaped as ``weight_params`` gives them)."""
        shape = self.weight_spec.scale_shape(self.out_features, self.in_features)
        self.weight_scale = scale.to(self.weight_spec.scale_dtype).reshape(shape)
        if not self.weight_spec.symmetric:
            self.weight_zero_point = zero_point.to(torch.int8).reshape(shape)
        if self.weight_spec.bits == 8:
            self.weight = codes.contiguous()
        else:
            self.weight_packed = self.weight_spec.pack(codes)
        self._forget()

    def codes(self, rows: slice | None = None) -> Tensor:
        """int8 codes [out, in], or those of some rows."""
        if self.weight is not None:
            return self.weight if rows is None else self.weight[rows]
        assert self.weight_packed is not None
        words = self.weight_packed if rows is None else self.weight_packed[rows]
        return self.weight_spec.unpack(words, self.in_features)

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        """The weight (of transformed input) the codes stand for, or some of its rows; module's dtype."""
        codes = self.codes(rows)
        one = self.weight_spec.granularity == "tensor"
        scale = self.weight_scale if one else self.weight_scale[rows]
        zero = self.weight_zero_point
        zero = scale.new_zeros((), dtype=torch.int8) if zero is None else zero if one else zero[rows]
        return self.weight_spec.decode(codes, scale, zero).to(self.dtype)

    def set_mode(self, mode: Mode) -> QuantLinear:
        self.mode = mode
        self._forget()
        return self

    @property
    def kernel(self) -> kernels.Kernel:
        """What runs in this mode (``.kernel_name`` names it), chosen at first use."""
        kernel = self._kernel
        if kernel is None:
            kernel = self._kernel = kernels.select(self, exact=self.mode == "fake")
        return kernel

    def forward(self, x: Tensor) -> Tensor:
        wants_gradient = self.mode == "fake" and x.requires_grad and torch.is_grad_enabled()
        if self.mode == "float" or wants_gradient:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            y = F.linear(self.input(x), self.dequantize().to(x.dtype), bias)
        else:
            y = self.kernel(x)
        return y if self.side is None else y + self.side(self.input.transform(x))

    def _forget(self) -> None:
        self._kernel = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        apply_keeping_dtypes(self, fn, recurse, ("weight_scale",))
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weight_scale.device))
        if probe.is_floating_point():
            self.dtype = probe.dtype
        self._forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel": None}  # a copy must not run on the original's buffers

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, weight={self.weight_spec}, mode={self.mode}"
