"""Record one forward of a block: which tensor came out of which module or op, and where it went.

Function-level recording (TorchFunctionMode) keeps the ops as the model wrote them: ``scaled_dot_product_attention``
stays one op, a Linear or a norm stays one module. A recorded path can be replayed with other values on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Ops that move values without changing them; the tensor moved is the first argument.
MOVES = frozenset(
    [
        "view",
        "reshape",
        "transpose",
        "permute",
        "contiguous",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "repeat",
        "repeat_interleave",
        "chunk",
        "split",
        "split_with_sizes",
        "tensor_split",
        "unbind",
        "narrow",
        "select",
        "__getitem__",
        "index_select",
        "movedim",
        "swapaxes",
        "clone",
        "detach",
        "to",
        "float",
        "half",
        "bfloat16",
        "type",
        "type_as",
        "view_as",
        "reshape_as",
        "dropout",
        "Tensor.T.__get__",
        "Tensor.mT.__get__",
    ]
)
MULTIPLY = frozenset({"mul", "__mul__", "__rmul__", "multiply"})
MATMUL = frozenset({"matmul", "bmm", "__matmul__"})
RELU = frozenset({"relu", "relu_"})


@dataclass(eq=False)
class Op:
    """One recorded call: an op (``module`` None) or an atomic module (Linear, norm)."""

    name: str
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    module: nn.Module | None = None
    path: str = ""


@dataclass(eq=False)
class Scope:
    """One call of a composite module: its name in the block and the tensors it was given."""

    path: str
    inputs: tuple[Tensor, ...]


@dataclass(eq=False)
class Trace:
    """``made[id(t)]``: the op that made tensor t and which of its outputs t is; ``uses``: the ops that take it."""

    ops: list[Op] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    made: dict[int, tuple[Op, int]] = field(default_factory=dict)
    uses: dict[int, list[Op]] = field(default_factory=dict)

    def add(self, op: Op) -> None:
        self.ops.append(op)
        for tensor in tensors_in((op.args, op.kwargs)):
            self.uses.setdefault(id(tensor), []).append(op)
        for i, tensor in enumerate(op.outputs):
            self.made[id(tensor)] = (op, i)

    def module_ops(self, kind: type[nn.Module]) -> list[Op]:
        return [op for op in self.ops if isinstance(op.module, kind)]


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [t for item in tree for t in tensors_in(item)]
    if isinstance(tree, dict):
        return [t for item in tree.values() for t in tensors_in(item)]
    return []


def is_atomic(module: nn.Module) -> bool:
    """A Linear, or a leaf with parameters of its own (norms, embeddings): recorded as one op."""
    if isinstance(module, nn.Linear):
        return True
    own = any(True for _ in module.parameters(recurse=False))
    return own and next(module.children(), None) is None


class _Recorder(TorchFunctionMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace, self.depth = trace, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            owner = getattr(func, "__self__", None)
            name = f"Tensor.{getattr(owner, '__name__', '?')}.{name}"
        stands_in = func is F.linear and isinstance(args[1], nn.Module)  # the module itself is recorded
        if self.depth == 0 and not stands_in:
            inputs = {id(t) for t in tensors_in((args, kwargs))}
            outputs = tuple(tensors_in(result))
            in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
            if outputs and (in_place or not all(id(t) in inputs for t in outputs)):
                self.trace.add(Op(name, func, args, kwargs, outputs))
        return result


@contextlib.contextmanager
def record(block: nn.Module) -> Iterator[Trace]:
    """Record every call inside ``block`` while the context is open; tensors stay alive as long as the trace does."""
    trace = Trace()
    recorder = _Recorder(trace)
    handles = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.depth += 1

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            recorder.depth -= 1
            if recorder.depth == 0:
                trace.add(Op("module", module, args, kwargs, tuple(tensors_in(output)), module, path))

        return hook

    def scope(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            trace.scopes.append(Scope(path, tuple(tensors_in((args, kwargs)))))

        return hook

    for path, module in block.named_modules():
        if is_atomic(module):
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave(path), with_kwargs=True))
        else:
            handles.append(module.register_forward_pre_hook(scope(path), with_kwargs=True))
    try:
        with recorder:
            yield trace
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class Step:
    """One op on a path: the value comes in at ``carrier`` (argument index or keyword), leaves as output ``output``."""

    op: Op
    carrier: int | str
    output: int


def carriers(op: Op) -> list[int | str]:
    """The arguments whose channels pass through an op to its output, changed at most by a positive factor a row."""
    if op.module is not None:
        return []
    if op.name in MOVES or op.name in RELU:
        return [0]
    if op.name in MULTIPLY:
        return [i for i in (0, 1) if isinstance(op.args[i], Tensor)]
    if op.call is F.scaled_dot_product_attention:
        return [2] if len(op.args) > 2 else ["value"]
    if op.name in MATMUL and len(op.args) == 2:
        rows = op.args[0].sum(-1, dtype=torch.float32)
        return [1] if bool(((rows - 1).abs() < 1e-3).all()) else []  # attention probabilities: rows sum to one
    return []


def paths_to(trace: Trace, tensor: Tensor, depth: int = 40) -> list[tuple[Op, int, list[Step]]]:
    """All (producer module op, its output index, steps from there to ``tensor``)."""
    made = trace.made.get(id(tensor))
    if made is None or depth == 0:
        return []
    op, output = made
    if op.module is not None:
        return [(op, output, [])]
    found = []
    for carrier in carriers(op):
        source = op.kwargs[carrier] if isinstance(carrier, str) else op.args[carrier]
        for producer, index, steps in paths_to(trace, source, depth - 1):
            found.append((producer, index, [*steps, Step(op, carrier, output)]))
    return found


def replay_channels(shape: torch.Size, device: torch.device, steps: list[Step]) -> Tensor | None:
    """Where each producer channel arrives: index [n] of the producer channel in each channel of the path's end.

    Runs the recorded ops on a tensor of channel numbers. None where a channel is not the same for all rows.
    """
    value = torch.arange(1, shape[-1] + 1, dtype=torch.float32, device=device).expand(shape)
    for step in steps:
        op = step.op
        if op.name in RELU:
            continue
        if op.name in MULTIPLY:
            other = op.args[1 - int(step.carrier)]
            if isinstance(other, Tensor):
                value = value * torch.ones_like(other, dtype=torch.float32)
            continue
        if op.name in MATMUL:
            value = torch.matmul(op.args[0].float(), value)
            continue
        if op.call is F.scaled_dot_product_attention:
            value = _attend(op, step.carrier, value)
            continue
        if op.name in ("to", "float", "half", "bfloat16", "type", "type_as", "dropout"):
            continue
        result = op.call(value, *op.args[1:], **op.kwargs)
        value = tensors_in(result)[step.output]
    rows = value.reshape(-1, value.shape[-1])
    index = rows[0].round()
    if rows.numel() == 0 or not bool(((rows - index).abs() < 0.3).all()):
        return None
    return index.long() - 1


def _attend(op: Op, carrier: int | str, value: Tensor) -> Tensor:
    def cast(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    args, kwargs = [cast(a) for a in op.args], {k: cast(v) for k, v in op.kwargs.items()}
    if isinstance(carrier, str):
        kwargs[carrier] = value
    else:
        args[carrier] = value
    result = op.call(*args, **kwargs)
    assert isinstance(result, Tensor)
    return result
