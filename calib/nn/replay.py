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
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from calib.nn.program import PLAIN, Program, Recorder, Shapes, Unfit

SHAPES = 64  # programs held; those of the shape longest known go first
OTHERWISE = "repeated, it answers otherwise"


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
        self._known: collections.OrderedDict[Hashable, int | Program | str] = collections.OrderedDict()

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
        if isinstance(program, Program) and not program.still():
            self.forget()
            program, known = 0, self._known
        if isinstance(program, Program) and program.trusted:
            found = program.run(*inputs)
            return model(*args, **kwargs) if found is None else pytree.tree_unflatten(found, program.structure)
        keeps = program == 0 or isinstance(program, str)  # else the model is about to fill a cache that is needed
        before = leaves if keeps else [*map(_copy, leaves)]
        result = model(*args, **kwargs)
        if isinstance(program, int):
            known[key] = 1 if program == 0 else self._record(model, before, form)
        elif isinstance(program, Program):
            twin = _inputs(before)
            found = program.run(*twin)
            if found is not None:
                program.trusted = _alike([*found, *twin], [*pytree.tree_leaves(result), *inputs])
                if not program.trusted:
                    known[key] = OTHERWISE
        while len(known) > SHAPES:
            known.popitem(last=False)
        return result

    def _record(self, model: Callable[..., Any], leaves: list[Any], form: pytree.TreeSpec) -> Program | str:
        """Outside inference mode, where tensors have versions; on copies, of which no layer has kept anything."""
        with torch.inference_mode(False), torch.no_grad():

            def turned(turn: Callable[[Any], Any]) -> tuple[list[Any], Callable[[], Any]]:
                """What a program is given, and the model's own answer."""
                values = [*map(turn, leaves)]
                args, kwargs = pytree.tree_unflatten(values, form)
                return _inputs(values), lambda: model(*args, **kwargs)

            (_, settle), (inputs, noted), (given, _), (held, other) = map(turned, (_copy, _copy, _rolled, _rolled))
            try:
                with Recorder() as before:  # settles what layers prepare on their way
                    settle()
                with Recorder() as recorder, Shapes() as shapes:
                    outputs = noted()
                if shapes.found:
                    raise Unfit(f"values decide the shape of what {shapes.found} returns")
                state = {id(each) for cache in inputs if isinstance(cache, StaticCache) for each in _state(cache)}
                lasting = before.first.keys() | before.made() | recorder.made() | {id(each) for each in inputs}
                if recorder.first.keys() - lasting:
                    raise Unfit("tensors come from what is no torch call")
                program = Program(recorder, inputs, state, outputs, self.model)
                found, want = program.run(*given), pytree.tree_leaves(other())
            except Exception as why:  # whatever it is, the model has answered and goes on answering
                return f"{type(why).__name__}: {why}"
        return program if found is None or _alike([*found, *given], [*want, *held]) else OTHERWISE

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"])  # type: ignore[misc]


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
