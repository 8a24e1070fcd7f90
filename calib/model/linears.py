"""Bring every matrix product of a model into nn.Linear form, exactly.

GPT-2's Conv1D holds its weight transposed; mixtures keep expert weights as one 3-D parameter and routers as a bare
matrix, both handed to F.linear. Each becomes a Linear at the same place. The list of rewrites is saved with a
checkpoint so that loading repeats them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from calib.nn import CalledAsWeight


class ParameterLinear(CalledAsWeight, nn.Linear):
    """A Linear that stands where a bare weight stood: F.linear(x, module) runs module(x)."""


class _WeightUse(TorchFunctionMode):
    """Records which of the bare parameters, or slices of them, F.linear takes as weight."""

    def __init__(self, bare: Sequence[tuple[str, nn.Module, str]]) -> None:
        super().__init__()
        self.bare, self.used = bare, dict[str, None]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            if isinstance(weight, Tensor):
                whole = weight if weight._base is None else weight._base
                for name, module, attribute in self.bare:
                    if getattr(module, attribute) is whole:  # by identity: meta tensors have no address
                        self.used[name] = None
        return func(*args, **(kwargs or {}))


def find_rewrites(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """Every Conv1D, and every bare parameter that one forward on ``inputs`` hands to F.linear; on meta tensors too."""
    rewrites = [{"name": name, "kind": "conv1d"} for name, m in model.named_modules() if isinstance(m, Conv1D)]
    bare = [
        (f"{path}.{name}".lstrip("."), module, name)
        for path, module in model.named_modules()
        if not isinstance(module, (nn.Linear, nn.Embedding, Conv1D))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3)
    ]
    if bare:
        with loop_over_experts(model), _WeightUse(bare) as use, torch.no_grad():
            model(**inputs)
        rewrites += [{"name": name, "kind": "parameter"} for name in use.used]
    return rewrites


@contextlib.contextmanager
def loop_over_experts(model: nn.Module) -> Iterator[None]:
    """Have mixtures run expert by expert (transformers' eager form) inside the context."""
    config = getattr(model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    if config is not None and hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = before


def apply_rewrites(model: nn.Module, rewrites: Sequence[Mapping[str, str]]) -> None:
    """Replace the named modules and parameters by Linears with the same values; works on the meta device too."""
    for rewrite in rewrites:
        parent_name, _, leaf = rewrite["name"].rpartition(".")
        parent = model.get_submodule(parent_name)
        old = getattr(parent, leaf)
        if rewrite["kind"] == "conv1d":
            new: nn.Module = _linear(nn.Linear, old.weight.T, old.bias)
        else:
            delattr(parent, leaf)
            if old.dim() == 3:
                new = nn.ModuleList(_linear(ParameterLinear, w, None) for w in old.unbind(0))
                config: Any = getattr(model, "config", None)
                if config is not None:
                    config._experts_implementation = "eager"
            else:
                new = _linear(ParameterLinear, old, None)
        parent._is_hf_initialized = True  # type: ignore[assignment]  # transformers must not initialise an owner whose parameter has moved
        setattr(parent, leaf, new)


def _linear(kind: type[nn.Linear], weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    with torch.device("meta"):
        linear = kind(in_features, out_features, bias=bias is not None, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear.eval()


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear below a module, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
