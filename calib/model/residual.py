"""The residual stream of a model, found in one recorded forward: what writes it, which norms and Linears read it.

A proposal, as sites are: whoever changes a model by it proves afterwards that the model answers as before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from calib.errors import ModelError
from calib.model.blocks import Batch, call_model
from calib.model.linears import loop_over_experts
from calib.model.sites import Gain, affine_gain
from calib.model.trace import MOVES, MULTIPLY, Op, Trace, record, tensors_in

ADD = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
SUMS = ADD | {"index_add", "index_add_"}  # the second kind: experts, each with its tokens
SCALES = MULTIPLY | {"mul_", "__imul__", "div", "__truediv__", "true_divide"}
EMPTY = frozenset({"zeros_like", "new_zeros", "empty_like"})  # take shapes, not values


@dataclass(eq=False)
class Norm:
    """A norm that reads the stream. gain: how its weight acts; readers: the Linears behind it."""

    path: str
    module: nn.Module
    gain: Gain
    centers: bool  # subtracts the mean over channels
    readers: list[nn.Linear] = field(default_factory=list)


@dataclass(eq=False)
class Residual:
    """width: channels. writers: embeddings and Linears whose outputs it sums; readers: Linears that take it bare."""

    width: int
    writers: list[nn.Module] = field(default_factory=list)
    readers: list[nn.Linear] = field(default_factory=list)
    norms: dict[str, Norm] = field(default_factory=dict)


def find_residual(model: nn.Module, batch: Batch) -> Residual:
    """Follow the token embeddings through one forward. The model's products must be Linears (``apply_rewrites``).

    Raises ModelError, by name, where something reads the stream for which a change of basis has no answer.
    """
    with torch.no_grad(), loop_over_experts(model), record(model) as trace:
        call_model(model, batch)
    found = _Walk(trace).residual
    readers = [*found.readers, *(reader for norm in found.norms.values() for reader in norm.readers)]
    if len({id(reader) for reader in readers}) < len(readers):
        raise ModelError("a linear reads the residual stream in two ways", _FIX)
    return found


class _Walk:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.makers: dict[int, list[Op]] = {}  # all of them: a tensor that is added to in place has many
        for op in trace.ops:
            for tensor in op.outputs:
                self.makers.setdefault(id(tensor), []).append(op)
        embeddings = [op for op in trace.ops if isinstance(op.module, nn.Embedding)]
        if not embeddings:
            raise ModelError("no embedding begins a residual stream", "give a language model")
        self.residual = Residual(embeddings[0].outputs[0].shape[-1])
        self.stream: set[int] = set()
        self.normed: dict[int, Norm] = {}
        for op in trace.ops:
            self._follow(op)

    def _follow(self, op: Op) -> None:
        width = self.residual.width
        if isinstance(op.module, nn.Embedding) and op.outputs[0].shape[-1] == width:
            self._writes(op.module)
            self.stream.add(id(op.outputs[0]))
            return
        inputs = tensors_in((op.args, op.kwargs))
        norms = [self.normed[id(t)] for t in inputs if id(t) in self.normed]
        streams = [t for t in inputs if id(t) in self.stream]
        if not (norms or streams) or op.name in EMPTY:
            return
        if isinstance(op.module, nn.Linear):
            readers = norms[0].readers if norms else self.residual.readers
            if op.module not in readers:
                readers.append(op.module)
        elif op.module is not None:
            if norms:
                raise _odd(op, norms)
            for tensor in op.outputs:
                self.normed[id(tensor)] = self._norm(op, streams[0])
        elif (op.name in MOVES or self._is_factor(op, streams)) and op.outputs[0].shape[-1] == width:
            for tensor in op.outputs:
                if norms:
                    self.normed[id(tensor)] = norms[0]
                else:
                    self.stream.add(id(tensor))
        elif op.name in ADD and not norms:
            for tensor in inputs:
                if id(tensor) not in self.stream:
                    self._find_writers(op, tensor)
            self.stream.update(id(tensor) for tensor in op.outputs)
        else:
            raise _odd(op, norms)

    def _is_factor(self, op: Op, streams: list[Tensor]) -> bool:
        """One factor for all channels."""
        others = [t for t in tensors_in((op.args, op.kwargs)) if t.dim() and t.shape[-1] > 1]
        return op.name in SCALES and len(streams) <= 1 and len(others) <= 1

    def _norm(self, op: Op, x: Tensor) -> Norm:
        assert op.module is not None
        gain = affine_gain(op.module, x)
        if gain is None:
            raise _odd(op, [])
        found = self.residual.norms.get(op.path)
        if found is None:
            found = self.residual.norms[op.path] = Norm(op.path, op.module, gain, _centers(op.module, gain, x))
        return found

    def _find_writers(self, reader: Op, tensor: Tensor) -> None:
        """The Linears whose outputs, moved, scaled by rows and summed, make up the tensor."""
        width, waiting, seen, found = self.residual.width, [tensor], {id(tensor)}, False
        while waiting:
            for op in self.makers.get(id(waiting.pop()), []):
                if isinstance(op.module, nn.Linear):
                    self._writes(op.module)
                    found = True
                elif op.module is not None or op.name not in MOVES | SCALES | SUMS | EMPTY:
                    where = op.path or op.name
                    raise ModelError(f"{where} stands before an addition to the residual stream", _FIX)
                elif op.name not in EMPTY:
                    inputs = [t for t in tensors_in((op.args, op.kwargs)) if t.dim() and t.shape[-1] == width]
                    waiting += [t for t in inputs if id(t) not in seen]
                    seen.update(id(t) for t in inputs)
        if not found:
            raise ModelError(f"{reader.name} adds something to the residual stream that no linear made", _FIX)

    def _writes(self, module: nn.Module) -> None:
        if module not in self.residual.writers:
            self.residual.writers.append(module)


_FIX = "use --method rotate, which turns each input by itself"


def _odd(op: Op, norms: list[Norm]) -> ModelError:
    where = norms[0].path if norms else "the residual stream"
    return ModelError(f"{op.path or op.name} reads {where}, and it is no linear", _FIX)


def _centers(norm: nn.Module, gain: Gain, x: Tensor) -> bool:
    """Whether a constant added to every channel changes nothing."""
    unit = {gain.weight: torch.full_like(getattr(norm, gain.weight), 1.0 - gain.offset)}
    rows = x.float().reshape(-1, x.shape[-1])[:8]
    with torch.no_grad():
        plain, moved = (functional_call(norm, unit, (r.to(x.dtype),)) for r in (rows, rows + rows.abs().mean()))
    return bool((plain - moved).abs().amax() <= 1e-2 * plain.abs().amax())
