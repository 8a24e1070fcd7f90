"""Quantization-aware training: a stand-in for every QuantLinear that computes on its grid and can learn.

What a forward pass sees is, to the bit, what the packed codes and scales will decode to; gradients are those of
calib/quantizers/straight.py. ``settle`` writes the codes and scales back and leaves nothing else behind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.errors import InputError
from calib.nn import CalledAsWeight, LowRankLinear, QuantLinear
from calib.quantizers import DualBinarySpec, straight
from calib.quantizers.dual_binary import split
from calib.quantizers.levels import STATISTIC
from calib.solvers import rounded
from calib.tuning.recipe import Trainable

SCALE_RATE = 10.0  # factors of scales lie near 1: they then move as scales of 0.1 would by themselves
LEAST_FACTOR = 0.01  # of a scale: it keeps its sign


class TunedLinear(CalledAsWeight, nn.Module):
    """Stands in for a QuantLinear.

    Learns, as chosen: ``factor`` (shaped like the scale, which it multiplies) and ``input_factor`` [1] of a static
    input scale that no row may leave (elastic activations; dynamic inputs pass every gradient); ``latent`` [out, in],
    the weight behind the codes, which without it are held; ``bias`` [out]; ``down`` [r, in] and ``up`` [r, out] of a
    float side branch. Zero points are held. Ternary grids whose scale is a statistic take it anew from the latent
    weight, where they did from the float weight.
    """

    def __init__(self, module: QuantLinear, trainable: Collection[Trainable], weight: Tensor | None = None) -> None:
        """weight [out, in]: the float weight (of transformed input), for latent weights. Default: what the codes say.
        It starts where its codes are: an element that rounds to another code begins at the value of its own."""
        super().__init__()
        everything = "all" in trainable
        self.module, self.spec = module, module.weight_spec
        self.start = module.weight_scale.float()
        zero = module.weight_zero_point
        self.zero = self.start.new_zeros((), dtype=torch.int32) if zero is None else zero
        self.statistic = everything and weight is not None and self._is_statistic(weight)
        scales = everything or "scales" in trainable
        self.factor = _parameter(torch.ones_like(self.start), scales and not self.statistic)
        self.latent = _parameter(self._aligned(weight), everything)
        self.bias = _parameter(module.bias, everything)
        quantizer, side = module.input, module.side
        self.input_start = quantizer.scale
        ranged = quantizer.scale is not None and not quantizer.watches_rows  # else all rows would learn to leave it
        self.input_factor = _parameter(torch.ones_like(quantizer.scale) if ranged else None, scales)  # type: ignore[arg-type]
        train_side = side is not None and side.bits is None and (everything or "factors" in trainable)
        self.down = _parameter(None if side is None else side.down, train_side)
        self.up = _parameter(None if side is None else side.up, train_side)

    def _is_statistic(self, weight: Tensor) -> bool:
        """Whether the grid's scale is a statistic, and these its codes: not what a solver moved."""
        if getattr(self.spec, "kind", "") not in STATISTIC:
            return False
        return torch.equal(rounded(weight.detach().float(), self.spec)[0], self.module.codes())

    def _aligned(self, weight: Tensor | None) -> Tensor:
        values = self.module.dequantize().float()
        if weight is None:
            return values
        weight = weight.detach().float()
        if self.statistic:
            return weight
        same = self.spec.encode(weight, self.module.weight_scale, self.zero) == self.module.codes()
        return torch.where(same, weight, values)

    def _scale(self) -> Tensor:
        return self.start if self.factor is None else self.start * self.factor

    def weight(self) -> Tensor:
        """The weight [out, in] on its grid."""
        if self.latent is None:
            stored = straight.standing(self._scale(), self._scale().detach().to(self.spec.scale_dtype).float())
            return self.spec.decode(self.module.codes(), stored, self.zero)
        if not self.statistic:
            return straight.on_grid(self.latent, self._scale(), self.zero, self.spec)
        with torch.no_grad():
            codes, scale, zero = rounded(self.latent, self.spec)
            values = self.spec.decode(codes, scale, zero)
        return straight.standing(self.latent, values)

    def _input(self, moved: Tensor) -> Tensor:
        """The transformed input on its grid."""
        quantizer = self.module.input
        if quantizer.spec is None:
            return moved
        if quantizer.scale is None:
            with torch.no_grad():
                got = quantizer.on_grid(moved)
            return straight.standing(moved, got)
        assert self.input_start is not None and quantizer.zero_point is not None
        scale = self.input_start if self.input_factor is None else self.input_start * self.input_factor
        quantizer.scale = scale.detach()
        with torch.no_grad():
            got = quantizer.on_grid(moved)
        surrogate = straight.affine(moved, scale, quantizer.zero_point, quantizer.spec)
        if quantizer.watches_rows:
            surrogate = torch.where(quantizer.outside(moved).unsqueeze(-1), moved, surrogate)
        return straight.standing(surrogate, got)

    def forward(self, x: Tensor) -> Tensor:
        module = self.module
        moved = module.input.transformed(x)
        bias = module.bias if self.bias is None else self.bias
        bias = None if bias is None else bias.to(x.dtype)
        y = F.linear(self._input(moved).to(x.dtype), self.weight().to(x.dtype), bias)
        if module.side is None:
            return y
        moved = moved.to(x.dtype)
        if self.down is None or self.up is None:
            return y + module.side(moved)
        return y + (moved @ self.down.to(x.dtype).T) @ self.up.to(x.dtype)

    @torch.no_grad()
    def project(self) -> None:
        """Back to what is a grid: scales of one sign, of two planes in order (a2 < 0 < a1 + a2, or mirrored)."""
        if self.input_factor is not None:
            self.input_factor.clamp_(min=LEAST_FACTOR)
        if self.factor is None:
            return
        self.factor.clamp_(min=LEAST_FACTOR)
        if isinstance(self.spec, DualBinarySpec):
            a1, a2 = (part.abs() for part in split(self._scale()))  # their signs differ, and stay
            kept = torch.maximum(a1, a2 * 1.01) / split(self.start)[0].abs()
            self.factor[..., :1] = torch.where(a1 > 0, kept, self.factor[..., :1])

    @torch.no_grad()
    def settle(self) -> QuantLinear:
        """The module, with what was learned in its own buffers."""
        module = self.module
        if self.statistic:
            assert self.latent is not None
            module.set_codes(*rounded(self.latent, self.spec))
        elif self.factor is not None or self.latent is not None:
            scale = self._scale().to(self.spec.scale_dtype)
            codes = module.codes() if self.latent is None else self.spec.encode(self.latent, scale, self.zero)
            module.set_codes(codes, scale, self.zero)
        if self.bias is not None and module.bias is not None:
            module.bias = self.bias.detach().to(module.bias.dtype)
        if module.side is not None and self.down is not None and self.up is not None:
            module.side.down = self.down.detach().to(module.side.down.dtype)
            module.side.up = self.up.detach().to(module.side.up.dtype)
        if self.input_factor is not None and self.input_start is not None:
            module.input.scale = self.input_start * self.input_factor.detach()
        return module.set_mode("fake")


class Training:
    """A quantized model made to learn in place, until ``settle``.

    floats: by name, the float weights of QuantLinears that have one. Raises InputError where nothing of what was chosen
    is in the model.
    """

    def __init__(self, model: nn.Module, trainable: Collection[Trainable], floats: Mapping[str, Tensor]) -> None:
        self.model = model
        found = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
        others = _float_parameters(model, trainable)
        self.linears = {name: TunedLinear(m, trainable, floats.get(name)) for name, m in found.items()}
        factors, values = dict[str, nn.Parameter](), dict(others)
        for name, linear in self.linears.items():
            for key, parameter in linear.named_parameters(recurse=False):
                (factors if key in ("factor", "input_factor") else values)[f"{name}.{key}"] = parameter
        if not factors and not values:
            raise InputError(
                f"the model has no {' or '.join(trainable)} to train", "choose other trainables, e.g. scales"
            )
        self.groups = [(group, rate) for group, rate in ((factors, SCALE_RATE), (values, 1.0)) if group]
        for name, linear in self.linears.items():
            model.set_submodule(name, linear)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for group, _ in self.groups for p in group.values())

    def project(self) -> None:
        for linear in self.linears.values():
            linear.project()

    def settle(self) -> None:
        """Put the QuantLinears back, with what was learned."""
        for name, linear in self.linears.items():
            self.model.set_submodule(name, linear.settle())


def _parameter(tensor: Tensor | None, learned: bool) -> nn.Parameter | None:
    return nn.Parameter(tensor.detach().clone()) if learned and tensor is not None else None


def _float_parameters(model: nn.Module, trainable: Collection[Trainable]) -> dict[str, nn.Parameter]:
    """The parameters that are chosen, of what is not quantized."""
    if "all" in trainable:
        return {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    chosen = []
    for name, module in model.named_modules():
        if "norms" in trainable and "norm" in type(module).__name__.lower():
            chosen.append((name, module))
        elif "factors" in trainable and isinstance(module, LowRankLinear):
            parts = {"down": module.down, "up": module.up}
            chosen += [(f"{name}.{key}", part) for key, part in parts.items() if isinstance(part, nn.Linear)]
    return {f"{name}.{key}": p for name, m in chosen for key, p in m.named_parameters(recurse=False)}
