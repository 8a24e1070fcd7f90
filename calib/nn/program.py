"""Torch calls of a forward, recorded as one flat program that makes them again."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from calib.nn.linear import QuantLinear

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# What Python may ask of a tensor without looking at its values: as fixed as its shape.
PROPERTIES = "shape dtype device ndim layout requires_grad grad_fn is_leaf is_cpu is_cuda is_meta is_sparse _version"
METHODS = "size dim numel nelement stride is_contiguous __len__ is_inference is_floating_point is_complex"
LAYOUT = {getattr(Tensor, name).__get__ for name in PROPERTIES.split()} | {torch.is_floating_point, torch.is_complex}
LAYOUT |= {getattr(Tensor, name) for name in METHODS.split()}


class Unfit(Exception):
    """The forward cannot be repeated from its torch calls."""


@dataclass
class _Call:
    """given: ids of its tensors; made: tensors that it did not just hand on; writes: whether it changed a given one."""

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    result: Any
    given: set[int]
    made: list[Tensor]
    writes: bool


class Recorder(TorchFunctionMode):
    """Notes the torch calls of this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.first: dict[int, tuple[Tensor, int]] = {}  # tensors and their versions when first seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LAYOUT:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        before = [_version(each) for each in given]
        for each, version in zip(given, before, strict=True):
            self.first.setdefault(id(each), (each, version))
        result = func(*args, **kwargs)
        writes, ids = before != [_version(each) for each in given], {id(each) for each in given}
        made = [each for each in tensors_in(result) if id(each) not in ids]
        self.calls.append(_Call(func, args, kwargs, result, ids, made, writes))
        return result

    def made(self) -> set[int]:
        return {id(each) for call in self.calls for each in call.made}


# function, getters of its arguments, names and places of others, place of the result, places that are done with
_Step = tuple[Callable[..., Any], Callable[[list[Any]], Any], tuple[tuple[str, int], ...] | None, int, tuple[int, ...]]


class Shapes(TorchDispatchMode):
    """Looks for operators of whose result the values, not the shapes, of their inputs decide the shape."""

    found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.dynamic_output_shape in func.tags:
            masks = any(each.dtype in (torch.bool, torch.uint8) for each in tensors_in(args[1:]))
            if masks or func is not torch.ops.aten.index.Tensor:
                self.found = str(func)
        return func(*args, **(kwargs or {}))


class Program:
    """The recorded calls: every argument and result has a place in one list of values.

    trusted: whether it has been seen to answer as the model. inputs: tensors, those of caches, and the caches; state:
    ids of the tensors of caches, the only ones of its inputs that it may write into.
    """

    def __init__(self, recorder: Recorder, inputs: list[Any], state: set[int], outputs: Any, model: nn.Module) -> None:
        self.trusted = False
        self._local = recorder.made()
        ours = self._local | state
        if any(id(each) not in ours and _version(each) != was for each, was in recorder.first.values()):
            raise Unfit("it writes into tensors that it did not make")
        leaves, self.structure = pytree.tree_flatten(outputs)
        self._values: list[Any] = [None] * len(inputs)
        self._places = {id(each): place for place, each in enumerate(inputs)}
        self._local |= self._places.keys()
        self._steps: list[tuple[Callable[..., Any], list[int], dict[str, int], int]] = []
        looks: list[tuple[int, int, Any]] = []  # steps done, the place that Python looked at, what it saw
        for call in _needed(_at_roots(recorder), {id(each) for each in tensors_in(leaves)}):
            place = self._add(call)
            if _looks(call):
                looks.append((len(self._steps), place, call.result))
        if looks and state:
            raise Unfit("Python looks at values, after which a cache could not be taken back")
        self._leaves = [self._place(each) for each in leaves]
        self._parts = self._joined([*looks, (len(self._steps), self._new(None), None)])
        self.still = self._watch(model)
        del self._places, self._local, self._steps

    def run(self, *inputs: Any) -> list[Any] | None:
        """The leaves of the output; None where a value that steered Python differs from the recorded one."""
        values = self._values.copy()
        values[: len(inputs)] = inputs
        for steps, seen, expected in self._parts:
            for func, arguments, named, place, dead in steps:
                if named is None:
                    values[place] = func(*arguments(values))
                else:
                    values[place] = func(*arguments(values), **{key: values[at] for key, at in named})
                for at in dead:
                    values[at] = None
            if values[seen] != expected:
                return None
        return [values[at] for at in self._leaves]

    def _add(self, call: _Call) -> int:
        func = torch.layer_norm if call.func is F.layer_norm else call.func  # without a Python function around it
        args, kwargs = [*map(self._place, call.args)], {key: self._place(each) for key, each in call.kwargs.items()}
        place = self._place(call.result) if isinstance(call.result, Tensor) else self._new(None)
        self._steps.append((getattr(func, "_op", func), args, kwargs, place))
        if isinstance(call.result, (tuple, list)) and not _looks(call):
            if not all(isinstance(each, Tensor) for each in call.result):
                raise Unfit(f"{func} returns more than tensors")
            for number, each in enumerate(call.result):
                self._steps.append((operator.getitem, [place, self._new(number)], {}, self._place(each)))
        return place

    def _place(self, each: Any) -> int:
        """Where the value is when a step asks for it."""
        if isinstance(each, StaticCache) and id(each) in self._places:  # on its way from the inputs to the outputs
            return self._places[id(each)]
        if isinstance(each, Tensor):
            if id(each) not in self._places:
                self._places[id(each)] = self._new(None if id(each) in self._local else each)
            return self._places[id(each)]
        if type(each) in (tuple, list) and tensors_in(each):
            place = self._new(None)
            self._steps.append((_listed if type(each) is list else _tupled, [*map(self._place, each)], {}, place))
            return place
        if all(map(_plain, pytree.tree_leaves(each))):
            return self._new(each)
        raise Unfit(f"{type(each).__name__} is no tensor and no plain value")

    def _new(self, value: Any) -> int:
        self._values.append(value)
        return len(self._values) - 1

    def _joined(self, looks: list[tuple[int, int, Any]]) -> list[tuple[list[_Step], int, Any]]:
        """The steps up to each look, with the places that nobody asks for after them."""
        busy, steps = {*self._leaves, *(place for _, place, _ in looks)}, []
        for func, args, kwargs, place in reversed(self._steps):
            used = {*args, *kwargs.values(), place}
            dead = tuple(at for at in used - busy if self._values[at] is None)
            busy |= used
            steps.append((func, _getter(args), tuple(kwargs.items()) or None, place, dead))
        steps.reverse()
        starts = [0, *(end for end, _, _ in looks)]
        return [(steps[start:end], at, seen) for start, (end, at, seen) in zip(starts, looks, strict=False)]

    def _watch(self, model: nn.Module) -> Callable[[], bool]:
        """Whether the model still holds what was recorded: its tensors, their dtypes, and its kernels."""
        used = {id(each) for each in self._values if isinstance(each, Tensor)}
        tensors, kernels = [], []
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                tensors += [(table, k, t, t.dtype) for k, t in table.items() if t is not None and id(t) in used]
            if isinstance(module, QuantLinear):
                kernels.append((module, module._kernel))

        def still() -> bool:
            return all(module._kernel is kernel for module, kernel in kernels) and all(
                table.get(key) is tensor and tensor.dtype is dtype for table, key, tensor, dtype in tensors
            )

        return still


def _looks(call: _Call) -> bool:
    """Whether Python learned values of it."""
    return isinstance(call.result, (bool, int, float, str, list)) and not tensors_in(call.result)


def _at_roots(recorder: Recorder) -> list[_Call]:
    """The calls, with views of views taken from the tensor at their root: one step where the model takes several."""
    made = recorder.made()
    roots: dict[int, Tensor | None] = {_memory(each): None for i, (each, _) in recorder.first.items() if i not in made}
    found = []
    for call in recorder.calls:
        for result in call.made:
            root = roots.setdefault(_memory(result), None if result.storage_offset() else result)
            if root is None or root is result or id(root) in call.given or result is not call.result or call.writes:
                continue
            if root.dtype == result.dtype:
                args = (root, tuple(result.shape), result.stride(), result.storage_offset())
                call = _Call(torch.as_strided, args, {}, result, {id(root)}, [result], writes=False)
        found.append(call)
    return found


def _memory(each: Tensor) -> int:
    """Equal of tensors that share it; all of them are alive."""
    return (each.untyped_storage().data_ptr() if each.layout == torch.strided else 0) or id(each)


def _needed(calls: list[_Call], needed: set[int]) -> list[_Call]:
    """Those that write, that Python looked at, or whose tensors (first ``needed``, by id) are used later."""
    found = []
    for call in reversed(calls):
        plain = isinstance(call.result, (Tensor, *PLAIN, tuple, list))
        if not plain:
            raise Unfit(f"{call.func} turns values into a {type(call.result).__name__}")
        if call.writes or _looks(call) or any(id(each) in needed for each in call.made):
            needed |= call.given
            found.append(call)
    return found[::-1]


def _plain(each: Any) -> bool:
    if isinstance(each, slice):
        return _plain(each.start) and _plain(each.stop) and _plain(each.step)
    return isinstance(each, PLAIN) or each is ...


def _getter(places: list[int]) -> Callable[[list[Any]], Any]:
    """The values at the places, in a tuple or list."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return operator.itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def _listed(*values: Any) -> list[Any]:
    return list(values)


def _tupled(*values: Any) -> tuple[Any, ...]:
    return values


def tensors_in(tree: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(tree) if isinstance(each, Tensor)]


def _version(each: Tensor) -> int:
    return -1 if each.is_inference() else each._version
