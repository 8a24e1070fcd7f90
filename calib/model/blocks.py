"""Blocks: the repeated layers of a model, run one at a time on captured inputs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from calib.errors import ModelError

Batch = Mapping[str, Tensor]
HALF = (torch.bfloat16, torch.float16)


class HiddenList(Protocol):
    """What holds one hidden state a batch: a list, or one that lies partly on disk."""

    def append(self, tensor: Tensor, /) -> None: ...
    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Tensor: ...
    def __setitem__(self, i: int, tensor: Tensor, /) -> None: ...


def positions(batch: Batch) -> int:
    """Rows times the longest sequence of a batch's tensors [B, T, ...] (of features [B, mel, T]): at least as many as
    any stack of the model sees tokens."""
    longest = max(t.shape[-1 if name == "input_features" else 1] for name, t in batch.items())
    return len(next(iter(batch.values()))) * longest


def call_model(model: nn.Module, batch: Batch, **extra: Any) -> Any:
    """One forward without a key-value cache of the model's own making."""
    if hasattr(getattr(model, "config", None), "use_cache") and "past_key_values" not in extra:
        extra["use_cache"] = False
    return model(**batch, **extra)


class _Stop(Exception):
    """Raised to end a forward once all it was run for has been seen."""


@dataclass(eq=False)
class Stack:
    """Blocks that hand one hidden state on, each to the next."""

    names: list[str]
    tuple_length: int  # 0: a block returns the hidden state itself; n: a tuple of n with the hidden state first


@dataclass(eq=False)
class Call:
    """What a block got beside the hidden state in one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's hidden output, [batch, tokens, width], where the block is; all in fp32 where a half-precision
        block was made so."""
        hidden, args, kwargs = _like(block, (hidden, self.args, self.kwargs))
        out = block(hidden, *args[1:], **kwargs) if args else block(**{**kwargs, "hidden_states": hidden})
        result = out if isinstance(out, Tensor) else out[0]
        assert isinstance(result, Tensor)
        return result

    def giving(self, name: str, value: Any, order: Sequence[str]) -> Call:
        """The same call with another value for an argument; order: names of the block's arguments."""
        at = order.index(name) if name in order else len(self.args)
        if at < len(self.args):  # GPT-2 hands it on by place
            return Call((*self.args[:at], value, *self.args[at + 1 :]), self.kwargs)
        return Call(self.args, {**self.kwargs, name: value})


@dataclass(eq=False)
class BlockInputs:
    """Inputs of one stack for every batch: hidden states now, and each block's other arguments."""

    hidden: HiddenList
    calls: list[list[Call]] = field(default_factory=list)  # [batch][block]
    masks: list[Tensor | None] = field(default_factory=list)  # [batch]: [B, T] bool, True: a real token


@contextlib.contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """A half-precision block in fp32 inside, where folds are proven and weights solved; rounded once, at the end."""
    dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)
    if dtype not in HALF:
        yield
        return
    to_dtype(block, torch.float32)
    try:
        yield
    finally:
        to_dtype(block, dtype)


def to_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters and saved buffers in another dtype. Buffers that no checkpoint holds (rotary frequencies) stay as
    they are, as in a model that is loaded in that dtype."""
    kept = [(m, n, m._buffers[n]) for m in module.modules() for n in m._non_persistent_buffers_set]
    nn.Module.to(module, dtype)  # transformers refuses its own on a model that was dequantized from a GGUF file
    for owner, name, buffer in kept:
        owner._buffers[name] = buffer
    return module


@contextlib.contextmanager
def on_device(block: nn.Module, device: torch.device) -> Iterator[None]:
    """A block that lives on the CPU, on a device inside."""
    if device.type == "cpu":
        yield
        return
    nn.Module.to(block, device)
    try:
        yield
    finally:
        nn.Module.to(block, "cpu")


def device_of(block: nn.Module) -> torch.device:
    """Where the block's parameters, or else its buffers, are."""
    tensors = itertools.chain(block.parameters(), block.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _like(block: nn.Module, given: Any) -> Any:
    """Tensors in tuples and dicts of a call where the block is; half ones in fp32 if all of its parameters are."""
    device, wide = device_of(block), {p.dtype for p in block.parameters()} == {torch.float32}

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, torch.float32 if wide and value.dtype in HALF else value.dtype)
        if type(value) in (tuple, list):
            return type(value)(map(moved, value))
        return {key: moved(item) for key, item in value.items()} if type(value) is dict else value

    return moved(given)


def block_candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The members of the outermost lists of like modules that hold Linears (or GPT-2's Conv1D): blocks, if called."""
    names = {
        f"{list_name}.{i}".lstrip("."): block
        for list_name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList) and len({type(m) for m in modules}) == 1
        for i, block in enumerate(modules)
        if any(isinstance(m, (nn.Linear, Conv1D)) for m in block.modules())
    }
    return {n: m for n, m in names.items() if not any(n.startswith(other + ".") for other in names if other != n)}


def find_stacks(model: nn.Module, batch: Batch) -> list[Stack]:
    """The chains of repeated blocks, in call order; the whole model as one block where there is no such chain."""
    names = block_candidates(model)
    seen: list[tuple[str, Tensor, Any]] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.append((name, _hidden_in(args, kwargs), output))

        return hook

    handles = [block.register_forward_hook(watch(n), with_kwargs=True) for n, block in names.items()]
    try:
        with torch.no_grad():
            call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    stacks: list[Stack] = []
    last: Tensor | None = None
    for name, hidden, output in seen:
        out = output if isinstance(output, Tensor) else output[0]
        length = 0 if isinstance(output, Tensor) else len(output)
        chained = last is not None and hidden is last
        if chained and stacks[-1].tuple_length == length:
            stacks[-1].names.append(name)
        else:
            stacks.append(Stack([name], length))
        last = out
    called = [n for stack in stacks for n in stack.names]
    if not called or len(set(called)) != len(called):
        raise ModelError(
            f"{type(model).__name__} has no chain of repeated layers that each run once",
            "calib needs layers in an nn.ModuleList that pass one hidden state on",
        )
    return stacks


def _hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    assert isinstance(hidden, Tensor)
    return hidden


def capture(
    model: nn.Module,
    stack: Stack,
    batches: Sequence[Batch],
    extra: Mapping[str, Any] | None = None,
    hidden: HiddenList | None = None,
) -> BlockInputs:
    """Run each batch with the stack's blocks passed through, keeping what they were given.

    Stacks before this one run for real, so an encoder must be finished (quantized) before its decoder is captured.
    extra: further keyword arguments of the model call. hidden: what to collect the hidden states in.
    """
    inputs = BlockInputs(hidden=[] if hidden is None else hidden)
    blocks = [model.get_submodule(name) for name in stack.names]
    with contextlib.ExitStack() as undo, torch.no_grad():
        calls: list[Call] = []
        first: list[Tensor] = []

        def passing(block: nn.Module, last: bool) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = _hidden_in(args, kwargs)
                if not calls:
                    first.append(hidden)
                rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                calls.append(Call(("hidden", *args[1:]) if args else (), rest))
                if last:
                    raise _Stop
                return (hidden, *[None] * (stack.tuple_length - 1)) if stack.tuple_length else hidden

            return forward

        for i, block in enumerate(blocks):
            undo.callback(_put_forward, block, block.__dict__.get("forward"))
            block.forward = passing(block, i == len(blocks) - 1)
        share = _Sharing()
        for batch in batches:
            with contextlib.suppress(_Stop):
                call_model(model, batch, **(extra or {}))
            inputs.hidden.append(first.pop())
            inputs.calls.append(share.calls(calls))
            mask = batch.get("attention_mask")
            inputs.masks.append(None if mask is None or bool(mask.bool().all()) else mask.bool())
            calls.clear()
    return inputs


def run_after(model: nn.Module, stack: Stack, batch: Batch, hidden: Tensor) -> Any:
    """The model's output where the stack's last block gives ``hidden``; nothing of the stack is run."""
    blocks = [model.get_submodule(name) for name in stack.names]
    answer = (hidden, *[None] * (stack.tuple_length - 1)) if stack.tuple_length else hidden
    with contextlib.ExitStack() as undo:
        for block in blocks:
            undo.callback(_put_forward, block, block.__dict__.get("forward"))
            block.forward = lambda *args, **kwargs: answer
        return call_model(model, batch)


class _Sharing:
    """Replaces tensors by equal ones of earlier batches: masks and position embeddings are mostly the same."""

    REMEMBERED = 4  # of each shape: masks of padded batches are all different

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], list[Tensor]] = {}
        self.batch: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (it, what stands for it); keeps ids valid

    def calls(self, calls: Sequence[Call]) -> list[Call]:
        self.batch.clear()
        return [Call(self._tree(call.args), self._tree(call.kwargs)) for call in calls]

    def _tree(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._tensor(tree)
        if type(tree) in (tuple, list):
            return type(tree)(self._tree(item) for item in tree)
        return {key: self._tree(value) for key, value in tree.items()} if type(tree) is dict else tree

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.batch:
            alike = self.known.setdefault((tensor.shape, tensor.dtype, tensor.device, tensor.stride()), [])
            kept = next((other for other in alike if torch.equal(other, tensor)), tensor)
            if kept is tensor:
                alike.insert(0, tensor)
                del alike[self.REMEMBERED :]
            self.batch[id(tensor)] = (tensor, kept)
        return self.batch[id(tensor)][1]


def _put_forward(block: nn.Module, forward: Any) -> None:
    """Give a block its own forward back: the class's, or one that streams its weights."""
    if forward is None:
        del block.forward
    else:
        block.forward = forward


@contextlib.contextmanager
def observing(modules: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``take(name, input)`` each time one of the modules runs."""

    def hook(name: str) -> Callable[..., None]:
        def pre(module: nn.Module, args: tuple[Any, ...]) -> None:
            take(name, args[0])

        return pre

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
