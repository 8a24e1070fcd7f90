"""ONNX (onnxruntime and others): one graph from token ids to logits, linears as QDQ on u8 inputs and s8 weights.

Inputs are unsigned because x86's integer dot products take u8 x s8. A range of fewer than 8 bits is a Clip before the
quantizer; affines, rotations and side branches are ordinary nodes. Weights without quantized inputs are blocked
DequantizeLinears, int4 where they fit. Decoders come without a key-value cache: for scoring, not for generation.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calib.errors import OutputError
from calib.export.checkpoint import plain_config, require_transformers, write_rest
from calib.export.compressed import FLOAT_ROWS
from calib.export.files import Finish, finished, staged
from calib.export.weight_only import whole_model_reasons
from calib.files import sha256
from calib.nn import QuantLinear, block_hadamard
from calib.quantizers import AnyWeight
from calib.recipe import Recipe

FORMAT = "onnx"
FILE = "model.onnx"
OPSET = 21  # the first with blocked and 4-bit DequantizeLinear
DYNAMIC = "input ranges are dynamic, and QDQ has static ones"
SIGNS = "one-bit inputs are signs, and QDQ rounds"
GROUPS = "weights in groups with quantized inputs, for which onnxruntime has no integer product"
FLOAT_INPUTS = "inputs are float8, which onnxruntime does not multiply on a CPU"
EXPERTS = "experts are picked by indices that depend on the data, which a graph cannot trace"


def refusals(recipe: Recipe, dtype: torch.dtype) -> list[str]:
    """Why a recipe's result will not be `expressible`, as far as it says."""
    scheme = recipe.scheme
    formats = dict.fromkeys([scheme.weights, *(each.weights for each in scheme.overrides)])
    reasons = list(
        dict.fromkeys(reason for weights in formats for reason in _weight_reasons(weights, scheme.inputs is not None))
    )
    reasons += _dtype_reasons(dtype)
    reasons += [DYNAMIC] if scheme.inputs is not None and scheme.inputs.dynamic else []
    reasons += [SIGNS] if scheme.inputs is not None and scheme.inputs.binary else []
    reasons += [FLOAT_INPUTS] if scheme.inputs is not None and not scheme.inputs.integer else []
    reasons += ["attention is quantized"] if scheme.attention is not None or scheme.kv is not None else []
    reasons += ["a prefix stands before every input"] if recipe.prefixes else []
    return reasons + ([FLOAT_ROWS] if recipe.float_rows else [])


def _weight_reasons(weights: AnyWeight, inputs: bool) -> list[str]:
    """inputs: whether they are quantized too."""
    if not weights.integer:
        return [f"weights on a {getattr(weights, 'kind', 'dual-binary')} grid"]
    return [GROUPS] if inputs and weights.granularity == "group" else []


def _dtype_reasons(dtype: torch.dtype) -> list[str]:
    return [] if dtype == torch.float32 else [f"the graph is written in float32, and the model is {dtype}"]


def unsuited(model: nn.Module, rewrites: Sequence[Mapping[str, str]]) -> list[str]:
    """What is known of an architecture before it is quantized."""
    del model
    experts = [rewrite["name"] for rewrite in rewrites if rewrite["kind"] == "parameter"]
    return [f"{EXPERTS} ({name})" for name in experts[:1]]


def expressible(model: nn.Module) -> list[str]:
    """Why an ONNX graph cannot be this model; empty where it can, as far as its modules say."""
    reasons = dict.fromkeys(whole_model_reasons(model), "")
    rewrites: Any = getattr(model, "calib_rewrites", ())
    reasons |= dict.fromkeys(unsuited(model, rewrites), "")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            for reason in _linear_reasons(module):
                reasons.setdefault(reason, name)
    if isinstance(model, PreTrainedModel):
        reasons |= dict.fromkeys(_dtype_reasons(model.dtype), "")
    return [f"{reason} ({name})" if name else reason for reason, name in reasons.items()]


def _linear_reasons(module: QuantLinear) -> list[str]:
    spec = module.input.spec
    reasons = _weight_reasons(module.weight_spec, spec is not None)
    if spec is not None and spec.dynamic:
        reasons.append(DYNAMIC)
    if spec is not None and spec.binary:
        reasons.append(SIGNS)
    if spec is not None and not spec.integer:
        reasons.append(FLOAT_INPUTS)
    return reasons + ([FLOAT_ROWS] if module.input.watches_rows else [])


class QdqLinear(nn.Module):
    """A QuantLinear in the operators of ONNX, for tracing: eager results are not meant."""

    shift: Tensor | None
    rescale: Tensor | None
    rotation: Tensor | None
    bias: Tensor | None
    scale: Tensor
    zero: Tensor
    weight_scale: Tensor

    def __init__(self, module: QuantLinear) -> None:
        super().__init__()
        given, spec = module.input, module.input.spec
        block, self.side = given.hadamard, module.side
        rotation = None if block == 1 else block_hadamard(torch.eye(block), block)
        parts = {"shift": given.shift, "rescale": given.rescale, "rotation": rotation, "bias": module.bias}
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.clip: tuple[float, float] | None = None
        self.static = spec is not None
        if spec is not None:
            assert given.scale is not None and given.zero_point is not None
            scale, zero = float(given.scale), int(given.zero_point)
            if spec.qmax - spec.qmin < 255:
                self.clip = ((spec.qmin - zero) * scale, (spec.qmax - zero) * scale)
            self.register_buffer("scale", torch.tensor(scale))
            self.register_buffer("zero", torch.tensor(zero + 128, dtype=torch.uint8))
        self._set_weight(module)

    def _set_weight(self, module: QuantLinear) -> None:
        codes = module.weight_spec.integers(module.codes()).T.contiguous()
        nibbles = not self.static and int(codes.min()) >= -8 and int(codes.max()) <= 7
        self.stored = "int4" if nibbles else "int8"  # the buffers' names tell _narrow what to make of them
        shape = (1, 1) if module.weight_spec.granularity == "tensor" else (module.out_features, -1)
        scale = module.weight_scale.float().reshape(shape).expand(module.out_features, -1)
        zero = module.weight_zero_point
        groups = scale.shape[1]
        self.axis = {"axis": 1} if groups == 1 else {"axis": 0, "block_size": module.in_features // groups}
        self.register_buffer("weight_scale", (scale.squeeze(1) if groups == 1 else scale.T).contiguous())
        self.register_buffer(f"{self.stored}_codes", codes)
        if zero is not None and bool(zero.any()):  # zeros alike would be merged by the tracer: see _own_zeros
            zero = zero.reshape(shape).expand(module.out_features, -1).to(torch.int8)
            self.register_buffer(f"{self.stored}_zero", (zero.squeeze(1) if groups == 1 else zero.T).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        if self.shift is not None:
            x = x - self.shift
        if self.rescale is not None:
            x = x / self.rescale
        if self.rotation is not None:
            x = (x.unflatten(-1, (-1, len(self.rotation))) @ self.rotation).flatten(-2)
        extra = None if self.side is None else self.side(x)
        if self.static:
            x = x if self.clip is None else x.clamp(*self.clip)
            codes = _symbolic("QuantizeLinear", (x, self.scale, self.zero), torch.uint8, x.shape)
            x = _symbolic("DequantizeLinear", (codes, self.scale, self.zero), x.dtype, x.shape)
        weight, zero = self.get_buffer(f"{self.stored}_codes"), getattr(self, f"{self.stored}_zero", None)
        given = (weight, self.weight_scale) if zero is None else (weight, self.weight_scale, zero)
        weight = _symbolic("DequantizeLinear", given, x.dtype, weight.shape, self.axis)
        y = x @ weight
        y = y if self.bias is None else y + self.bias
        return y if extra is None else y + extra


def _symbolic(
    operator: str,
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
    shape: Any,
    attributes: Mapping[str, int] | None = None,
) -> Tensor:
    return torch.onnx.ops.symbolic(operator, inputs, {**(attributes or {})}, dtype=dtype, shape=shape, version=OPSET)


class _Logits(nn.Module):
    """The model as a function of tensors alone, in a given order."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.cached = {"use_cache": False} if model.can_generate() else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.model(**dict(zip(self.names, inputs, strict=True)), **self.cached)
        answer: Tensor = output.logits if "logits" in output else output.last_hidden_state
        return answer


def input_names(model: PreTrainedModel) -> tuple[str, ...]:
    """What the graph takes, int64 [batch, tokens] each."""
    more = ("decoder_input_ids",) if model.config.is_encoder_decoder else ()
    return ("input_ids", "attention_mask", *more)


def save(
    model: nn.Module,
    tokenizer: Any,
    out: str | Path,
    *,
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    finish: Finish | None = None,
) -> Path:
    """Write ``model.onnx`` with config and tokenizer beside it, as safely as checkpoint.save; for an `expressible`
    model. Raises OutputError where torch cannot trace it.
    """
    stock = require_transformers(model)
    size = sum(t.numel() * t.element_size() for t in stock.state_dict().values())
    with staged(out, overwrite=overwrite, needed_bytes=size) as stage:
        traced(stock).save(stage / FILE)
        hashes = {file.name: sha256(file) for file in sorted(stage.iterdir())}
        write_rest(stage, stock, plain_config(stock), tokenizer, {**manifest, "format": FORMAT}, hashes)
        finished(stage, out, finish)
    return Path(out).expanduser().absolute()


def traced(model: PreTrainedModel) -> Any:
    """The torch.onnx.ONNXProgram of the model; OutputError, one line, where it cannot be traced."""
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(own.get_submodule(parent), leaf, QdqLinear(module))
    names = input_names(model)
    batch, longest = (
        torch.export.Dim("batch", min=1),
        int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20),
    )
    lengths = [torch.export.Dim("tokens", min=2, max=longest)] * 2
    lengths += [torch.export.Dim("decoder_tokens", min=2, max=longest)] * (len(names) - 2)
    # of each its own tensor: one given twice would be traced as one
    inputs = tuple(torch.ones(2, length, dtype=torch.int64) for length in (6, 6, 5)[: len(names)])
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Logits(own, names).eval(),
                inputs,
                input_names=names,
                output_names=["logits"],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                dynamic_shapes=(tuple({0: batch, 1: length} for length in lengths),),
            )
    except Exception as error:  # torch.onnx raises what the failing step raised
        cause = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise OutputError(
            f"torch cannot trace {type(model).__name__}: {cause[:200]}", "use another --format"
        ) from error
    _narrow(program)
    _own_zeros(program)
    _keep_apart(program)
    return program


def _narrow(program: Any) -> None:
    """Store as int4 what QdqLinear says."""
    import ml_dtypes
    import onnx_ir

    for name, value in program.model.graph.initializers.items():
        if "int4_" in name.rpartition(".")[2]:
            values = value.const_value.numpy().astype(ml_dtypes.int4)
            value.const_value = onnx_ir.tensor(values, dtype=onnx_ir.DataType.INT4, name=name)
            value.dtype = onnx_ir.DataType.INT4


def _own_zeros(program: Any) -> None:
    """A zero point for each 8-bit weight that has none, its own. onnxruntime's session.x64quantprecision rewrites
    weights, and where it fuses nothing after a weight it can do neither without a zero point nor with a shared one.
    """
    import numpy as np
    import onnx_ir

    graph = program.model.graph
    for node in list(graph):
        weight = node.inputs[0]
        if node.op_type == "DequantizeLinear" and "int8_codes" in (weight.name or "") and len(node.inputs) == 2:
            name = f"{weight.name}.zero"
            shape = tuple(int(size) for size in node.inputs[1].shape)
            value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(onnx_ir.DataType.INT8))
            value.const_value = onnx_ir.tensor(np.zeros(shape, dtype=np.int8), name=name)
            graph.register_initializer(value)
            node.resize_inputs(3)
            node.replace_input_with(2, value)


def _keep_apart(program: Any) -> None:
    """Residual sums before a norm as Sum, the same values: onnxruntime would fuse Add and norm into one slower kernel,
    a quarter of MiniLM's whole time.
    """
    for node in program.model.graph:
        if node.op_type == "LayerNormalization" and (sum_ := node.inputs[0].producer()) and sum_.op_type == "Add":
            sum_.op_type = "Sum"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx says much that no user can act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
