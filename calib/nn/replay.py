"""A model's forward without the Python between its operators.

For one sentence at a time a small encoder spends more on Python, module by module, than on products. `Replay` notes the
torch calls of a forward, once for each shape of its inputs, and then makes them again in one flat function. The calls
are the model's own, so the answer is, bit for bit; the first repetition is held against the model. A decoder's step is
such a forward too, where its keys and values lie in a cache of fixed length.
"""

from __future__ import annotations

import collections
import copy
import functools
import operator
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from calib.nn.linear import QuantLinear

SHAPES = 64  # programs held; those of the shape longest known go first
OTHERWISE = "repeated, it answers otherwise"
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# What Python may ask of a tensor without looking at its values: as fixed as its shape.
PROPERTIES = "shape dtype device ndim layout requires_grad grad_fn is_leaf is_cpu is_cuda is_meta is_sparse _version"
METHODS = "size dim numel nelement stride is_contiguous __len__ is_inference is_floating_point is_complex"
LAYOUT = {getattr(Tensor, name).__get__ for name in PROPERTIES.split()} | {torch.is_floating_point, torch.is_complex}
LAYOUT |= {getattr(Tensor, name) for name in METHODS.split()}


class _Unfit(Exception):
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


class _Recorder(TorchFunctionMode):
    """Notes the torch calls of this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.first: dict[int, tuple[Tensor, int]] = {}  # tensors and their versions when first seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LAYOUT:
            return func(*args, **kwargs)
        given = _tensors((args, kwargs))
        before = [_version(each) for each in given]
        for each, version in zip(given, before, strict=True):
            self.first.setdefault(id(each), (each, version))
        result = func(*args, **kwargs)
        writes, ids = before != [_version(each) for each in given], {id(each) for each in given}
        made = [each for each in _tensors(result) if id(each) not in ids]
        self.calls.append(_Call(func, args, kwargs, result, ids, made, writes))
        return result

    def made(self) -> set[int]:
        return {id(each) for call in self.calls for each in call.made}


# function, getters of its arguments, names and places of others, place of the result, places that are done with
_Step = tuple[Callable[..., Any], Callable[[list[Any]], Any], tuple[tuple[str, int], ...] | None, int, tuple[int, ...]]


class _Shapes(TorchDispatchMode):
    """Looks for operators of whose result the values, not the shapes, of their inputs decide the shape."""

    found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.dynamic_output_shape in func.tags:
            masks = any(each.dtype in (torch.bool, torch.uint8) for each in _tensors(args[1:]))
            if masks or func is not torch.ops.aten.index.Tensor:
                self.found = str(func)
        return func(*args, **(kwargs or {}))


class _Program:
    """The recorded calls: every argument and result has a place in one list of values.

    trusted: whether it has been seen to answer as the model. inputs: tensors, those of caches, and the caches; state:
    ids of the tensors of caches, the only ones of its inputs that it may write into.
    """

    def __init__(self, recorder: _Recorder, inputs: list[Any], state: set[int], outputs: Any, model: nn.Module) -> None:
        self.trusted = False
        self._local = recorder.made()
        ours = self._local | state
        if any(id(each) not in ours and _version(each) != was for each, was in recorder.first.values()):
            raise _Unfit("it writes into tensors that it did not make")
        leaves, self.structure = pytree.tree_flatten(outputs)
        self._values: list[Any] = [None] * len(inputs)
        self._places = {id(each): place for place, each in enumerate(inputs)}
        self._local |= self._places.keys()
        self._steps: list[tuple[Callable[..., Any], list[int], dict[str, int], int]] = []
        looks: list[tuple[int, int, Any]] = []  # steps done, the place that Python looked at, what it saw
        for call in _needed(_at_roots(recorder), {id(each) for each in _tensors(leaves)}):
            place = self._add(call)
            if _looks(call):
                looks.append((len(self._steps), place, call.result))
        if looks and state:
            raise _Unfit("Python looks at values, after which a cache could not be taken back")
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
                raise _Unfit(f"{func} returns more than tensors")
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
        if type(each) in (tuple, list) and _tensors(each):
            place = self._new(None)
            self._steps.append((_listed if type(each) is list else _tupled, [*map(self._place, each)], {}, place))
            return place
        if all(map(_plain, pytree.tree_leaves(each))):
            return self._new(each)
        raise _Unfit(f"{type(each).__name__} is no tensor and no plain value")

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


class Replay:
    """The model, called as itself, by repeating torch calls recorded for each shape of its inputs.

    ``Replay(model)(**batch)`` returns what ``model(**batch)`` does, for models in eval mode under ``no_grad`` or
    ``inference_mode``, whose inputs are tensors, plain values and transformers' StaticCache, which it fills as the
    model does. Of each shape the first call runs the model, the second records (it runs three more times), the third
    is compared with the model, later ones repeat. Everything else runs the model itself: gradients, autocast, a cache
    that grows, a forward that keeps state, values that steered Python and differ now (padding after none). A weight,
    mode or dtype that changed is noticed and the calls are recorded anew; a hook or a config that changed is not: then
    call ``forget``. Threads may share it; a copy starts without records.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._generating = threading.RLock()
        self.forget()

    def forget(self) -> None:
        # calls so far, the program, or why there is none
        self._known: collections.OrderedDict[Hashable, int | _Program | str] = collections.OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(self.model, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` with a cache of fixed length, its steps repeated where they can be.

        Tokens are those of ``model.generate(..., cache_implementation="static")``. The cache is as long as the longest
        text so far, so that later calls find their shapes recorded: give ``max_new_tokens``. A model whose cache is
        int8 generates as it does. One generation at a time.
        """
        model: Any = self.model
        if getattr(model, "calib_int8_cache", False):
            return model.generate(*args, **kwargs)
        forward, own = model.forward, vars(model).get("forward")

        @functools.wraps(forward)  # transformers asks for its signature
        def repeated(*args: Any, **kwargs: Any) -> Any:
            return self._answer(forward, args, kwargs)

        with self._generating:
            model.forward = repeated
            try:
                return model.generate(*args, **{"cache_implementation": "static", "disable_compile": True, **kwargs})
            finally:
                if own is None:
                    del model.forward
                else:
                    model.forward = own

    def _answer(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """model: what to call for the model's own answer."""
        leaves, form = pytree.tree_flatten((args, kwargs))
        if torch.is_grad_enabled() or self.model.training or _steered() or not all(map(_simple, leaves)):
            return model(*args, **kwargs)
        inputs = _inputs(leaves)
        key = (model is self.model, form, *map(_shape, leaves), *map(_shape, inputs))  # hooks are recorded or are not
        known = self._known
        program = known.get(key, 0)
        if isinstance(program, _Program) and not program.still():
            self.forget()
            program, known = 0, self._known
        if isinstance(program, _Program) and program.trusted:
            found = program.run(*inputs)
            return model(*args, **kwargs) if found is None else pytree.tree_unflatten(found, program.structure)
        keeps = program == 0 or isinstance(program, str)  # else the model is about to fill a cache that is needed
        before = leaves if keeps else [*map(_copy, leaves)]
        result = model(*args, **kwargs)
        if isinstance(program, int):
            known[key] = 1 if program == 0 else self._record(model, before, form)
        elif isinstance(program, _Program):
            twin = _inputs(before)
            found = program.run(*twin)
            if found is not None:
                program.trusted = _alike([*found, *twin], [*pytree.tree_leaves(result), *inputs])
                if not program.trusted:
                    known[key] = OTHERWISE
        while len(known) > SHAPES:
            known.popitem(last=False)
        return result

    def _record(self, model: Callable[..., Any], leaves: list[Any], form: pytree.TreeSpec) -> _Program | str:
        """Outside inference mode, where tensors have versions; on copies, of which no layer has kept anything."""
        with torch.inference_mode(False), torch.no_grad():

            def turned(turn: Callable[[Any], Any]) -> tuple[list[Any], Callable[[], Any]]:
                """What a program is given, and the model's own answer."""
                values = [*map(turn, leaves)]
                args, kwargs = pytree.tree_unflatten(values, form)
                return _inputs(values), lambda: model(*args, **kwargs)

            (_, settle), (inputs, noted), (given, _), (held, other) = map(turned, (_copy, _copy, _rolled, _rolled))
            try:
                with _Recorder() as before:  # settles what layers prepare on their way
                    settle()
                with _Recorder() as recorder, _Shapes() as shapes:
                    outputs = noted()
                if shapes.found:
                    raise _Unfit(f"values decide the shape of what {shapes.found} returns")
                state = {id(each) for cache in inputs if isinstance(cache, StaticCache) for each in _state(cache)}
                lasting = before.first.keys() | before.made() | recorder.made() | {id(each) for each in inputs}
                if recorder.first.keys() - lasting:
                    raise _Unfit("tensors come from what is no torch call")
                program = _Program(recorder, inputs, state, outputs, self.model)
                found, want = program.run(*given), pytree.tree_leaves(other())
            except Exception as why:  # whatever it is, the model has answered and goes on answering
                return f"{type(why).__name__}: {why}"
        return program if found is None or _alike([*found, *given], [*want, *held]) else OTHERWISE

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"])  # type: ignore[misc]


def _looks(call: _Call) -> bool:
    """Whether Python learned values of it."""
    return isinstance(call.result, (bool, int, float, str, list)) and not _tensors(call.result)


def _at_roots(recorder: _Recorder) -> list[_Call]:
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
            raise _Unfit(f"{call.func} turns values into a {type(call.result).__name__}")
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


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(tree) if isinstance(each, Tensor)]


def _simple(each: Any) -> bool:
    """Whether a call with it may be repeated."""
    if isinstance(each, StaticCache):
        layers = each.layers
        return type(each) is StaticCache and all(type(la) is StaticLayer and la.is_initialized for la in layers)
    return isinstance(each, (Tensor, *PLAIN))


def _state(cache: StaticCache) -> list[Tensor]:
    """The tensors that a forward changes."""
    layers: Any = cache.layers
    return [each for layer in layers for each in (layer.keys, layer.values, layer.cumulative_length)]


def _inputs(leaves: list[Any]) -> list[Any]:
    """What a program is given: the tensors, then those of the caches, then the caches."""
    caches = [each for each in leaves if isinstance(each, StaticCache)]
    return [*(each for each in leaves if isinstance(each, Tensor)), *(t for c in caches for t in _state(c)), *caches]


def _version(each: Tensor) -> int:
    return -1 if each.is_inference() else each._version


def _shape(each: Any) -> Hashable:
    if isinstance(each, StaticCache):
        return StaticCache
    return (each.shape, each.stride(), each.dtype, each.device) if isinstance(each, Tensor) else (type(each), each)


def _copy(each: Any) -> Any:
    if isinstance(each, StaticCache):
        twin = copy.copy(each)
        twin.layers = [copy.copy(layer) for layer in each.layers]
        for layer in twin.layers:
            layer.__dict__.update({key: t.clone() for key, t in vars(layer).items() if isinstance(t, Tensor)})
        return twin
    return each.clone() if isinstance(each, Tensor) else each


def _rolled(each: Any) -> Any:
    """Other values, as fit for the model: a mask keeps its length, an id is one of the vocabulary."""
    return each.roll(1, -1) if isinstance(each, Tensor) and each.dim() else _copy(each)


def _alike(found: list[Any], want: list[Any]) -> bool:
    return len(found) == len(want) and all(map(_same, found, want))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, StaticCache) and isinstance(b, StaticCache):
        return True  # their tensors are compared for themselves
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _steered() -> bool:
    """Whether something outside the model changes what torch calls do."""
    return torch.is_autocast_enabled("cpu") or torch._C._len_torch_function_stack() > 0
