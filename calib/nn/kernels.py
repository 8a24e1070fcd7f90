"""What runs: the one place that chooses a kernel for a QuantLinear on this machine.

Where every product is one of integers, the layer is *defined* on them: the codes' products are summed exactly,
then rounded in fp32 in one order, y = ((sum of (code - zero_point) w) x_scale) w_scale + bias. Mode 'fake'
computes that in float GEMMs that cannot round ('exact'), mode 'packed' in int8 operators; both give the same
bits, so a low-bit network, which amplifies the last bit into other codes, answers the same in both.
Operators have private names in torch and not every machine runs them right (without VNNI int8 products
saturate): each is probed once, with the extremes of its codes, against exact integers. Kernels record no
gradients.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from calib.nn.codes import Codes, codes_of, fingerprint, quantize_for
from calib.quantizers import AffineSpec, LevelSpec
from calib.quantizers.product import LONGEST, PROBES, inexact, int_mm, int_mm_refusal

if TYPE_CHECKING:
    from calib.nn.linear import QuantLinear

Operator = Literal["qlinear", "int_mm", "int4"]
# codes [M, in], bias -> fp32 [M, out], see above
Product = Callable[[Codes, "Tensor | None"], Tensor]

TILE = 1 << 20  # weights decoded to float at a time: the tile stays in cache
INT4_GROUPS = (32, 64, 128, 256)  # what torch's int4 kernel takes, with outputs in multiples of 16
INT4_ROWS = 64  # beyond, decoding the weight once costs less than decoding it for every row


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
    if not exact and _fits_int4(module):
        return _int4(module, reason)
    return _dequantize(module, reason)


def describe() -> dict[str, str]:
    """Format -> the kernel that serves it on this machine's CPU, and why."""
    many = {bits: _refused("qlinear", limit) for bits, limit in ((8, 127), (7, 63))}
    one = _refused("int_mm", 127)
    single = "" if one else "; single rows: torch._int_mm"
    fallback = "dequantize: float weight by tiles, then float GEMM"

    def integer(bits: int, note: str) -> str:
        return f"exact: integers in float GEMM ({many[bits]})" if many[bits] else f"int8: onednn qlinear, {note}"

    four = _refused("int4", 7)
    int4 = fallback if four else f"bf16, up to {INT4_ROWS} rows: int4pack of ATen; otherwise {fallback}"
    return {
        "w8a8-static": integer(8, f"u8 activations, scales and bias fused{single}"),
        "w8a8": integer(8, f"u8 activations, scale per row afterwards{single}"),
        "w1..w7, integer activations": integer(7, "weights held as int8 (scales per channel or tensor)"),
        "weights asymmetric, in groups or of two planes": f"{fallback} (the scale changes inside a sum)",
        "w1..w4 with float activations in groups of one scale, bf16 model": int4 + (f" ({four})" if four else ""),
        "float activations otherwise": f"{fallback} (torch's int4 and int8 kernels round to bf16)",
    }


def _format_refusal(module: QuantLinear) -> str:
    """Why the module's products are not sums of integers; empty where they are."""
    weight, inputs = module.weight_spec, module.input.spec
    if inputs is None:
        return "activations are float"
    if not weight.integer:
        return "two scales meet inside a sum"
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
    quantizer, spec, columns = module.input, module.input.spec, module.in_features
    assert spec is not None
    scale = module.weight_scale.reshape(-1).float().expand(module.out_features).contiguous()
    bias = None if module.bias is None else module.bias.float()
    static = quantizer.scale is not None
    step, zero = _scalars(quantizer.scale, quantizer.zero_point)
    sums = None if static or spec.symmetric else _integers(module).sum(dim=1, dtype=torch.int32) * scale
    float_rows = _tiled(module) if quantizer.watches_rows else None
    product, name = (_exact(module, scale, step, zero), "exact") if exact else _operator(module, scale, step, zero)
    key, quantize, out = fingerprint(quantizer), quantize_for(quantizer), module.out_features

    def run(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # entered by hand: the decorator costs a tenth of a small layer
            with torch.no_grad():
                return run(x)
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], out)
        codes = codes_of(quantize, key, x)
        if static:
            y = product(codes, bias)
        else:
            y = product(codes, None)
            if sums is not None:
                y.addr_(codes.zero_point.float().reshape(-1).expand(len(y)), sums, alpha=-1)
            x_scale = codes.scale
            y = y.mul_(x_scale) if bias is None else torch.addcmul(bias, y, x_scale.expand(len(y), 1), out=y)
        if x.dtype != torch.float32:
            y = y.to(x.dtype)
        if float_rows is not None and codes.outside is not None:
            y[codes.outside] = float_rows(quantizer.transform(x.reshape(-1, columns)[codes.outside]))
        return y if x.dim() == 2 else y.view(*x.shape[:-1], out)

    return _named(run, name, reason)


def _operator(module: QuantLinear, scale: Tensor, x_scale: float, zero_point: int) -> tuple[Product, str]:
    """torch's int8 operators: int_mm on CUDA and for single rows, else oneDNN's qlinear, and their name."""
    weight = _integers(module).contiguous()
    cpu = weight.device.type == "cpu"
    # A single row is memory-bound and wants plain codes: at 8 bits the checkpoint has them for nothing.
    single = module.weight is weight and module.in_features > 1 and not _refused("int_mm", 127)
    plain = weight if single or not cpu else None
    moved = None if plain is None or not zero_point else plain.sum(dim=1, dtype=torch.int32) * zero_point
    step = torch.full((1,), x_scale, device=weight.device)  # a number would be wrapped anew for every call
    no_zero = torch.zeros_like(scale, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(weight, None) if plain is None else None

    def product(codes: Codes, bias: Tensor | None) -> Tensor:
        nonlocal packed
        if plain is not None and (not cpu or codes.rows == 1):
            total = int_mm(codes.signed, plain)
            y = torch.mul(total if moved is None else total.sub_(moved), step).mul_(scale)
            return y if bias is None else y.add_(bias)
        if packed is None:
            packed = torch.ops.onednn.qlinear_prepack(plain, None)
        return _qlinear(codes.unsigned, x_scale, zero_point, packed, scale, no_zero, bias)

    return product, "int8 qlinear" if cpu else "int8 int_mm"


def _exact(module: QuantLinear, scale: Tensor, x_scale: float, zero_point: int) -> Product:
    """The same integers in float GEMMs wide enough for every partial sum; the module must outlive it."""
    owner, spec = weakref.ref(module), module.input.spec
    assert spec is not None
    largest = int(_integers(module).abs().sum(dim=1, dtype=torch.int64).amax())  # of |sum| a unit of activation
    reach = max(spec.qmax - zero_point, zero_point - spec.qmin)

    def product(given: Codes, bias: Tensor | None) -> Tensor:
        module, codes = owner(), given.signed
        assert module is not None
        dtype = torch.float32 if largest * reach < 1 << 24 else torch.float64
        x = codes.to(dtype).sub_(zero_point)
        y = torch.empty(len(codes), len(scale), device=codes.device)
        for rows in _tiles(module):
            y[:, rows] = (x @ _integers(module, rows).to(dtype).t()).float()
        y = y.mul_(x_scale).mul_(scale)
        return y if bias is None else y.add_(bias)

    return product


def _integers(module: QuantLinear, rows: slice | None = None) -> Tensor:
    """What the weight's scale multiplies, int8 [out, in]."""
    return module.weight_spec.integers(module.codes(rows))


def _fits_int4(module: QuantLinear) -> bool:
    spec = module.weight_spec
    if isinstance(spec, AffineSpec):
        holds = spec.bits == 4 and spec.symmetric
    else:  # integers in -8..7
        holds = isinstance(spec, LevelSpec) and (spec.levels <= 8 or not spec.odd)
    return (
        holds
        and module.dtype == torch.bfloat16
        and spec.group_size in INT4_GROUPS
        and module.out_features % 16 == 0
        and module.weight_scale.device.type == "cpu"
        and not _refused("int4", 7)
    )


def _int4(module: QuantLinear, reason: str) -> Kernel:
    """Few bf16 rows on ATen's int4 kernel (it rounds scales where 'fake' rounds weights), the rest tiled."""
    quantizer, out, columns, matmul = module.input, module.out_features, module.in_features, _tiled(module)
    codes, scale, group = _integers(module), module.weight_scale.float(), module.weight_spec.group_size
    bias = None if module.bias is None else module.bias.to(torch.bfloat16)
    assert group is not None
    multiply = _int4_product(codes, scale.view(out, -1), group)

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        rows = quantizer(x).reshape(-1, columns)
        if x.dtype != torch.bfloat16 or not 0 < len(rows) <= INT4_ROWS:
            return matmul(rows).view(*x.shape[:-1], out)
        y = multiply(rows)
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], out)

    return _named(run, "int4pack", reason)


def _int4_product(codes: Tensor, scale: Tensor, group: int) -> Callable[[Tensor], Tensor]:
    """bf16 x [M, in] -> x W^T, W of 4-bit codes [out, in] and scales [out, in/group]."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
    pairs = torch.stack([scale.t(), torch.zeros_like(scale.t())], dim=-1).to(torch.bfloat16).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group, pairs)


def _scalars(scale: Tensor | None, zero_point: Tensor | None) -> tuple[float, int]:
    return (1.0, 0) if scale is None or zero_point is None else (float(scale), int(zero_point))


def _dequantize(module: QuantLinear, reason: str) -> Kernel:
    """A float GEMM on fake-quantized input; no float copy of the weight outlives a tile."""
    quantizer, out, columns, matmul = module.input, module.out_features, module.in_features, _tiled(module)

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        return matmul(quantizer(x).reshape(-1, columns)).view(*x.shape[:-1], out)

    return _named(run, "dequantize", reason)


def _tiled(module: QuantLinear) -> Callable[[Tensor], Tensor]:
    """x [M, in] -> x W^T + b in x's dtype, W decoded a tile of rows at a time; the module must outlive it."""
    owner = weakref.ref(module)  # a cycle would keep dead models in memory

    def matmul(x: Tensor) -> Tensor:
        module = owner()
        assert module is not None
        y = x.new_empty(len(x), module.out_features)
        for rows in _tiles(module):
            y[:, rows] = x @ module.dequantize(rows).to(x.dtype).t()
        return y if module.bias is None else y.add_(module.bias.to(x.dtype))

    return matmul


def _tiles(module: QuantLinear) -> Iterator[slice]:
    """Rows of the weight to decode at a time: what stays in cache; on other devices all of them."""
    out = module.out_features
    step = out if module.weight_scale.device.type != "cpu" else max(16, TILE // max(module.in_features, 1))
    for start in range(0, out, step):
        yield slice(start, min(start + step, out))


def _named(run: Callable[[Tensor], Tensor], name: str, reason: str = "") -> Kernel:
    run.kernel_name, run.reason = name, reason  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def _qlinear(
    octets: Tensor,
    x_scale: float,
    zero_point: int,
    packed: Tensor,
    scale: Tensor,
    no_zero: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """(codes - zero_point) x_scale times the prepacked weight, + bias, in fp32; octets: uint8, code + 128, for oneDNN
    is fast on unsigned activations only.
    """
    return torch.ops.onednn.qlinear_pointwise.default(
        octets,
        x_scale,
        zero_point + 128,
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
def _refused(operator: Operator, limit: int, device: str = "cpu") -> str:
    """Why the operator cannot be trusted here with weights in [-limit, limit]; empty where it is exact."""
    if operator == "int4":
        return _int4_refusal()
    found = int_mm_refusal(limit, device) if operator == "int_mm" else inexact(_prepacked, limit, device, PROBES)
    return found and f"{operator} {found}"


def _prepacked(codes: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's sums of int8 codes [m, k] and weight [n, k], in fp32."""
    packed, n = torch.ops.onednn.qlinear_prepack(weight, None), len(weight)
    return _qlinear(
        codes.view(torch.uint8).bitwise_xor(128), 1.0, 0, packed, torch.ones(n), torch.zeros(n, dtype=torch.int32), None
    )


def _int4_refusal() -> str:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (48, 128), dtype=torch.int8, generator=generator)
    # Powers of two as scales and small integers as inputs: exact in bf16 up to the rounding of the result.
    scale = 2.0 ** torch.randint(-3, 3, (48, 4), generator=generator)
    x = torch.randint(-3, 4, (3, 128), generator=generator)
    weight = (codes.unflatten(1, (4, 32)) * scale.unsqueeze(-1)).flatten(1)
    try:
        got, exact = _int4_product(codes, scale, 32)(x.to(torch.bfloat16)).float(), x.float() @ weight.t()
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"int4 does not run here: {' '.join(str(error).split())[:80]}"
    return "" if torch.allclose(got, exact, rtol=1e-2) else "int4 is wrong on this cpu"
