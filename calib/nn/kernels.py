"""What runs: the one place that chooses a kernel for a QuantLinear on this machine.

Where every product is one of integers, the layer is *defined* on them: the codes' products are summed exactly,
then rescaled by one fp32 factor an output, y = (sum of (code - zero_point) w) (x_scale w_scale) + bias. Mode 'fake'
computes that in float GEMMs that cannot round ('exact'), mode 'packed' in int8 operators; both give the same
bits, so a low-bit network, which amplifies the last bit into other codes, answers the same in both. (One factor, for
of two oneDNN's kernels multiply either first: those for AMX the scales, the others the sum.)
Operators have private names in torch and not every machine runs them right (without VNNI int8 products
saturate): each is probed once, with the extremes of its codes, against exact integers, and for that order. Kernels
record no gradients.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from calib.memory import page_out
from calib.nn import float8, int4
from calib.nn.codes import Codes, fingerprint, quantize_for
from calib.nn.tiles import tiled, tiles
from calib.nn.together import FEW, Finish, Product, Reader, read
from calib.quantizers import AffineSpec
from calib.quantizers.product import LONGEST, PROBES, capable, inexact, int_mm, int_mm_refusal

if TYPE_CHECKING:
    from calib.nn.linear import QuantLinear

Operator = Literal["qlinear", "int_mm"]


class Kernel(Protocol):
    """x [..., in] -> y [..., out], dtype of x."""

    kernel_name: str
    reason: str  # why nothing faster serves the format; empty for the integer kernels

    def __call__(self, x: Tensor, /) -> Tensor: ...


def select(module: QuantLinear, exact: bool = False) -> Kernel:
    """The fastest kernel for the module's format here, or with ``exact`` the one that defines its result."""
    reason = _format_refusal(module)
    if not reason:
        machine = "" if exact else _machine_refusal(module)
        return _integer(module, exact or bool(machine), machine)
    if not exact and int4.fits(module):
        return _named(int4.linear(module), "int4pack", reason)
    if not exact and float8.fits(module):
        return _named(float8.linear(module), "float8 scaled_mm")
    return _dequantize(module, reason)


def describe() -> dict[str, str]:
    """Format -> the kernel that serves it on this machine's CPU, and why."""
    many = {bits: _refused("qlinear", limit) for bits, limit in ((8, 127), (7, 63))}
    single = "; single rows: torch._int_mm" if _plain_rows() else ""
    joint = "" if many[8] else f"; up to {FEW} rows of small layers of one input run as one"
    fused, sign = "fused" if not many[8] and _fuses() else "afterwards", "s" if _takes_signed() else "u"
    fallback = "dequantize: float weight by tiles, then float GEMM"

    def integer(bits: int, note: str) -> str:
        return f"exact: integers in float GEMM ({many[bits]})" if many[bits] else f"int8: onednn qlinear, {note}"

    four = int4.refusal()
    few = fallback if four else f"bf16, up to {int4.ROWS} rows: int4pack of ATen; otherwise {fallback}"
    return {
        "w8a8-static": integer(8, f"{sign}8 activations, scales and bias {fused}{single}{joint}"),
        "w8a8": integer(8, f"{sign}8 activations, scale per row afterwards{single}{joint}"),
        "w1..w7, integer activations": integer(7, "weights held as int8 (scales per channel or tensor)"),
        "fp8, fp8-static": f"{fallback} (on CUDA torch._scaled_mm)",
        "weights asymmetric, in groups or of two planes": f"{fallback} (the scale changes inside a sum)",
        "w1..w4, float activations, symmetric groups or two planes, bf16 model": few + (f" ({four})" if four else ""),
        "float activations otherwise": f"{fallback} (torch's int4 and int8 kernels round to bf16)",
    }


def _format_refusal(module: QuantLinear) -> str:
    """Why the module's products are not sums of integers; empty where they are."""
    weight, inputs = module.weight_spec, module.input.spec
    if inputs is None:
        return "activations are float"
    if not (weight.integer and inputs.integer):
        return "numbers are float8" if isinstance(weight, AffineSpec) else "two scales meet inside a sum"
    if not weight.symmetric or "group" in (weight.granularity, inputs.granularity):
        return "a scale or zero point changes inside a sum"
    if not 0 < module.in_features <= LONGEST or not module.out_features:
        return f"{module.in_features} inputs, {module.out_features} outputs"
    return ""


def _machine_refusal(module: QuantLinear) -> str:
    """Why no int8 operator of this machine serves the module; empty where one does."""
    device = module.weight_scale.device
    if device.type == "cpu":
        return _refused("qlinear", 127 if module.weight_spec.bits == 8 else 63)
    if device.type == "cuda":
        odd = module.in_features % 8 or module.out_features % 8
        return "torch._int_mm wants multiples of 8" if odd else _refused("int_mm", 127, "cuda")
    return f"no integer GEMM known on {device.type}"


def _integer(module: QuantLinear, exact: bool, reason: str) -> Kernel:
    """Codes of x, exact sums of products, fp32 rescale; rows that leave a static range in float if asked."""
    quantizer, columns, out = module.input, module.in_features, module.out_features
    float_rows = tiled(module) if quantizer.watches_rows else None
    reader = _Exact(module) if exact else _Integer(module)

    def multiply(x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], out)
        codes, y = read(reader, x)
        if x.dtype != torch.float32:
            y = y.to(x.dtype)
        if float_rows is not None and codes.outside is not None:
            y[codes.outside] = float_rows(quantizer.transform(x.reshape(-1, columns)[codes.outside]))
        return y if x.dim() == 2 else y.view(*x.shape[:-1], out)

    def run(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # entered by hand: the decorator costs a tenth of a small layer
            with torch.no_grad():
                return multiply(x)
        return multiply(x)

    cpu = module.weight_scale.device.type == "cpu"
    return _named(run, "exact" if exact else "int8 qlinear" if cpu else "int8 int_mm", reason)


class _Exact(Reader):
    """The integers in float GEMMs wide enough for every partial sum; the module must outlive it."""

    def __init__(self, module: QuantLinear) -> None:
        super().__init__()
        self.key, self.quantize = fingerprint(module.input), quantize_for(module.input)
        self.shape, owner, spec = (module.out_features, module.in_features), weakref.ref(module), module.input.spec
        assert spec is not None
        largest = int(_integers(module).abs().sum(dim=1, dtype=torch.int64).amax())  # of |sum| a unit of activation
        zero_point, scale, bias = _zero_point(module), _scales([module]), _static_bias([module])
        reach = max(spec.qmax - zero_point, zero_point - spec.qmin)

        def multiply(given: Codes) -> Tensor:
            module, codes = owner(), given.signed
            assert module is not None
            dtype = torch.float32 if largest * reach < 1 << 24 else torch.float64
            x = codes.to(dtype).sub_(zero_point)
            y = torch.empty(len(codes), len(scale), device=codes.device)
            for rows in tiles(module):
                y[:, rows] = (x @ _integers(module, rows).to(dtype).t()).float()
            y.mul_(scale)
            return y if bias is None else y.add_(bias)

        self.product, self.finish = multiply, _finish(module)


class _Integer(Reader):
    """torch's int8 operators; layers of one input run as one where ``together`` finds that it pays."""

    def __init__(self, module: QuantLinear) -> None:
        super().__init__()
        self.key, self.quantize = fingerprint(module.input), quantize_for(module.input)
        self.shape, self.owner = (module.out_features, module.in_features), weakref.ref(module)
        weight = _integers(module).contiguous()
        self.cpu = weight.device.type == "cpu"
        # at 8 bits the checkpoint has plain codes for nothing
        self.single = self.cpu and module.weight is weight and module.in_features > 1 and _plain_rows()
        self.kind = (self.cpu, self.single, module.bias is None)
        self.product, self.finish = _Operator([module], weight, keep=self.single or not self.cpu), _finish(module)
        stored = module.weight if module.weight_packed is None else module.weight_packed
        if self.cpu and not self.single and stored is not None:
            page_out(stored)  # what the checkpoint holds is not needed beside what is packed

    def joined(self, others: Sequence[_Integer]) -> Product:
        """All outputs side by side."""
        modules = [module for each in [self, *others] if (module := each.owner()) is not None]
        with torch.inference_mode(False), torch.no_grad():  # what is kept outlives the mode of this call
            return _Operator(modules, torch.cat([_integers(module) for module in modules]), keep=not self.cpu)


class _Operator:
    """Codes -> fp32 [M, out] of one layer or several, by int_mm on CUDA and for single rows, else oneDNN's qlinear."""

    def __init__(self, modules: Sequence[QuantLinear], weight: Tensor, keep: bool) -> None:
        """keep: the weight int8 [out, in] as it is, for int_mm; packed for qlinear when rows first ask for it."""
        self.across, self.cpu = weight.t() if keep else None, weight.device.type == "cpu"
        self.zero_point, self.scale, self.bias = _zero_point(modules[0]), _scales(modules), _static_bias(modules)
        self.moved = weight.sum(dim=1, dtype=torch.int32) * self.zero_point if keep and self.zero_point else None
        self.ones = None if not self.cpu or _fuses() else torch.ones_like(self.scale)
        self.no_zero = torch.zeros_like(self.scale, dtype=torch.int32)
        self.packed = None if keep else torch.ops.onednn.qlinear_prepack(weight, None)

    def __call__(self, codes: Codes) -> Tensor:
        across, bias = self.across, self.bias
        if across is not None and (not self.cpu or codes.rows == 1):
            total = torch._int_mm(codes.signed, across) if self.cpu else int_mm(codes.signed, across.t())
            y = torch.mul(total if self.moved is None else total.sub_(self.moved), self.scale)
            return y if bias is None else y.add_(bias)
        packed = self.packed
        if packed is None:
            assert across is not None
            packed = self.packed = torch.ops.onednn.qlinear_prepack(across.t(), None)
        if self.ones is None:
            return _qlinear(codes, self.zero_point, packed, self.scale, self.no_zero, bias)
        y = _qlinear(codes, self.zero_point, packed, self.ones, self.no_zero, None).mul_(self.scale)
        return y if bias is None else y.add_(bias)


def _static_bias(modules: Sequence[QuantLinear]) -> Tensor | None:
    """What the operator adds: of all outputs, or nothing, where a dynamic grid's scale comes first."""
    if modules[0].bias is None or modules[0].input.scale is None:
        return None
    return torch.cat([module.bias.float() for module in modules if module.bias is not None])


def _finish(module: QuantLinear) -> Finish | None:
    """What a dynamic grid leaves to do with the operator's fp32 [M, out], in place.

    Of each layer alone, joined or not: torch rounds a fused multiply-add otherwise at the end of a row.
    """
    spec = module.input.spec
    if module.input.scale is not None or spec is None:
        return None
    bias, sums = None if module.bias is None else module.bias.float(), None
    if not spec.symmetric:
        sums = _integers(module).sum(dim=1, dtype=torch.int32) * _scales([module])

    def finish(codes: Codes, y: Tensor) -> Tensor:
        if sums is not None:
            y.addr_(codes.zero_point.float().reshape(-1).expand(len(y)), sums, alpha=-1)
        x_scale = codes.scale
        return y.mul_(x_scale) if bias is None else torch.addcmul(bias, y, x_scale.expand(len(y), 1), out=y)

    return finish


def _scales(modules: Sequence[QuantLinear]) -> Tensor:
    """Of all outputs, fp32: the weight's, times a static input's; a dynamic one's come with the codes."""
    scales = [module.weight_scale.reshape(-1).float().expand(module.out_features) for module in modules]
    x_scale = modules[0].input.scale
    return torch.cat(scales) if x_scale is None else torch.cat(scales).mul_(x_scale)


def _zero_point(module: QuantLinear) -> int:
    """Of a static grid; those of a dynamic one come with the codes."""
    return 0 if module.input.zero_point is None else int(module.input.zero_point)


def _integers(module: QuantLinear, rows: slice | None = None) -> Tensor:
    """What the weight's scale multiplies, int8 [out, in]."""
    return module.weight_spec.integers(module.codes(rows))


def _dequantize(module: QuantLinear, reason: str) -> Kernel:
    """A float GEMM on fake-quantized input; no float copy of the weight outlives a tile."""
    quantizer, out, columns, matmul = module.input, module.out_features, module.in_features, tiled(module)

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        return matmul(quantizer(x).reshape(-1, columns)).view(*x.shape[:-1], out)

    return _named(run, "dequantize", reason)


def _named(run: Callable[[Tensor], Tensor], name: str, reason: str = "") -> Kernel:
    run.kernel_name, run.reason = name, reason  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def _qlinear(
    codes: Codes,
    zero_point: int,
    packed: Tensor,
    scale: Tensor,
    no_zero: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """(codes - zero_point) times the prepacked weight, rescaled, + bias, in fp32."""
    signed = _takes_signed()
    return torch.ops.onednn.qlinear_pointwise.default(
        codes.signed if signed else codes.unsigned,
        1.0,
        zero_point if signed else zero_point + 128,
        packed,
        scale,
        no_zero,
        bias,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )


@functools.cache
def _takes_signed() -> bool:
    """Whether oneDNN is as fast on int8 activations as on uint8 ones, which cost a pass over the codes: AMX is."""
    return capable("amx_int8", unknown=False)


@functools.cache
def _refused(operator: Operator, limit: int, device: str = "cpu") -> str:
    """Why the operator cannot be trusted here with weights in [-limit, limit]; empty where it is exact."""
    found = int_mm_refusal(limit, device) if operator == "int_mm" else inexact(_prepacked, limit, device, PROBES)
    return found and f"{operator} {found}"


def _plain_rows() -> bool:
    """Whether a single row, which is memory-bound, runs best by int_mm on plain codes; with AMX qlinear is
    faster on packed ones.
    """
    return not _refused("int_mm", 127) and not capable("amx_int8", unknown=False)


@functools.cache
def _fuses() -> bool:
    """Whether oneDNN rescales and adds the bias as the result is defined, each rounded, in all kernels it has."""
    generator = torch.Generator().manual_seed(0)
    for m, k, n in [(32, 4, 30), *PROBES]:
        codes = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
        weight = torch.randint(-60, 61, (n, k), dtype=torch.int8, generator=generator)
        scale, bias = torch.linspace(0.0004, 0.0026, n), torch.linspace(-3, 3, n)
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        given = _qlinear(
            Codes(codes.clone(), scale, scale, None), 17, packed, scale, torch.zeros(n, dtype=torch.int32), bias
        )
        if not torch.equal(given, ((codes.float() - 17) @ weight.float().t()).mul_(scale).add_(bias)):
            return False
    return True


def _prepacked(codes: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's sums of int8 codes [m, k] and weight [n, k], in fp32."""
    packed, one = torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(len(weight))
    return _qlinear(
        Codes(codes.clone(), one, one, None), 0, packed, one, torch.zeros_like(one, dtype=torch.int32), None
    )
