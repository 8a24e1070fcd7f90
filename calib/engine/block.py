"""One block: observe -> solve -> fold -> quantize -> run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.engine.context import ContextObjective
from calib.engine.state import SiteState
from calib.errors import NumericsError
from calib.methods import ShiftScale, SiteMethod, WeightMethod
from calib.model import Call, HiddenList, Plan, is_finite, observing
from calib.nn import AttentionFormat, QuantLinear, attention_modules
from calib.quantizers import AnyWeight
from calib.recipe import Recipe
from calib.solvers import bias_correction
from calib.transforms import relative_error, tolerance_for, undone_on_failure


@dataclass(eq=False)
class BlockInput:
    """What a block runs on: a hidden state, its other arguments and its token mask, for each batch."""

    hidden: HiddenList
    calls: list[Call]
    masks: list[Tensor | None]
    refresh: Callable[[], None]  # writes the layer's prefix keys and values anew, after each fold
    first: list[int]  # [batch]: the number of its first token in the whole data
    probes: int  # how many of the batches a search scores its short list on

    def run(self, block: nn.Module, i: int) -> Tensor:
        """The block's hidden output of batch i."""
        return self.calls[i].run(block, self.hidden[i])


class BlockCalibration:
    """Calibrates one block in place; ``record`` and ``notes`` tell what happened to its sites."""

    def __init__(
        self, name: str, block: nn.Module, plan: Plan, recipe: Recipe, rounding: WeightMethod | None, given: BlockInput
    ) -> None:
        self.name, self.block, self.plan, self.recipe, self.given = name, block, plan, recipe, given
        self.rounding = rounding
        self.runs = [functools.partial(given.run, block, i) for i in range(len(given.calls))]
        for parameter, value in block.named_parameters():
            if not is_finite(value):
                raise NumericsError(f"weight {name}.{parameter} holds NaN or inf", "repair the checkpoint")
        self.wanted = {path for path in plan.quantized() if path.startswith(name + ".")}
        self.states = [
            SiteState(
                block,
                site,
                recipe,
                [recipe.scheme.weights_of(f"{name}.{path}") for path in site.consumers],
                whole=all(map(self._planned, site.consumers)),
                gram=rounding is not None,
            )
            for site in plan.blocks[name].sites
            if any(map(self._planned, site.consumers))
        ]
        given.refresh()
        self.before = self.runs[0]()
        self.tolerance = tolerance_for(functools.partial(given.calls[0].run, block), given.hidden[0], self.before)
        self.record: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []

    def _planned(self, path: str) -> bool:
        return f"{self.name}.{path}" in self.wanted

    def observe(self, outputs: HiddenList | None) -> None:
        """One pass over all batches; the float outputs go into ``outputs``, where the recipe hands floats on."""
        taps = {group[0]: (state, g) for state in self.states for g, group in enumerate(state.site.groups)}
        mask: list[Tensor | None] = [None]
        first = [0]

        def take(path: str, x: Tensor) -> None:
            state, group = taps[path]
            state.observe(group, x, mask[0], first[0])

        with observing({path: self.block.get_submodule(path) for path in taps}, take):
            for run, mask[0], first[0] in zip(self.runs, self.given.masks, self.given.first, strict=True):
                out = run()
                if outputs is not None:
                    outputs.append(out)
        for state in self.states:
            state.finish(f"{self.name}.{state.target.name}")

    def leave(self) -> None:
        """Take what observing hung on the block off it again."""
        for state in self.states:
            state.transform.remove_hooks()

    def solve(self, state: SiteState, method: SiteMethod) -> ShiftScale:
        """The method's (z, s) and rotation of one site."""
        probes = []
        joint = state.site.context is not None and self.recipe.objective == "context"
        if joint and method.name == "os+" and self.recipe.scheme.inputs is not None:
            for count in (1, self.given.probes):
                probes.append(ContextObjective(self.block, state.site, self.runs[:count], self.given.masks[:count]))
        found = method.solve(state.view(probes), self.recipe)
        state.detail.update(method=method.name, **found.detail)
        return found

    def apply(self, state: SiteState, found: ShiftScale) -> None:
        """Fold what the producer takes, fuse the rest; a change that fails its proof is undone and named."""
        if found.shift is None and found.scale is None and found.hadamard == 1:
            return
        with undone_on_failure(state.transform, self.runs[0], self.tolerance, self.before) as error:
            if state.foldable:
                state.transform.fold(found.shift if state.takes_shift else None, found.scale)
                if found.shift is not None and not state.takes_shift:
                    state.transform.fuse(found.shift if found.scale is None else found.shift / found.scale, None)
            else:
                state.transform.fuse(found.shift, found.scale)
            if found.hadamard > 1:
                state.transform.rotate(found.hadamard)
            self.given.refresh()
        state.detail["proof"] = error[0]
        if error[0] <= self.tolerance:
            state.moved(found)
            return
        self.given.refresh()
        self.notes.append(
            f"{self.name}.{state.target.name}: transform undone, it changed the block's output by {error[0]:.1e}"
        )

    def prove(self) -> None:
        """All folds together leave the block's float output as it was."""
        drift = relative_error(self.runs[0](), self.before)
        if drift > 10 * self.tolerance:
            raise NumericsError(f"the folds of {self.name} changed its output by {drift:.1e}", "report this model")

    def quantize(self) -> None:
        """Replace every planned Linear by a QuantLinear and set the attention's formats."""
        for state in self.states:
            self._settle(state)
            self._quantize_site(state)
        scheme = self.recipe.scheme
        if scheme.attention is not None or scheme.kv is not None:
            prefix = 0 if self.plan.prefix is None else len(self.plan.prefix)
            for module in attention_modules(self.block):
                module.calib_attention = AttentionFormat(scheme.attention, scheme.kv, prefix)  # type: ignore[assignment]

    def _settle(self, state: SiteState) -> None:
        """The plan says what was done, where that is less than was planned."""
        if state.transformed:
            return
        why = "the transform failed its proof" if "proof" in state.detail else "its loss is lowest untransformed"
        for path in state.site.consumers:
            entry = self.plan.entries[f"{self.name}.{path}"]
            if entry.status == "transformed":
                entry.status, entry.reason, entry.fold = "quantized", why, ""

    def _quantize_site(self, state: SiteState) -> None:
        quantizer = state.quantizer(self.recipe.scheme.inputs)
        state.transform.remove_hooks()
        for group, moments in zip(state.site.groups, state.moments, strict=True):
            inside = {
                p: m for p in group if self._planned(p) and isinstance(m := self.block.get_submodule(p), nn.Linear)
            }
            spec_of = {path: self.recipe.scheme.weights_of(f"{self.name}.{path}") for path in inside}
            rounded: dict[str, dict[str, Tensor]] = {}
            for spec in dict.fromkeys(spec_of.values()):
                same = {path: linear for path, linear in inside.items() if spec_of[path] == spec}
                rounded |= self._round(same, moments.gram, spec)
            importance = moments.second_moment.float() if moments.count else None
            for path, linear in inside.items():
                module = QuantLinear.from_float(
                    linear.weight.detach(),
                    None if linear.bias is None else linear.bias.detach(),
                    spec_of[path],
                    copy.deepcopy(quantizer),
                    importance=importance,
                    **rounded.get(path, {}),
                )
                if self.recipe.bias_correction:
                    added = bias_correction(linear.weight, module.dequantize(), moments.mean).to(module.dtype)
                    module.bias = added if module.bias is None else module.bias + added
                self.block.set_submodule(path, module)
        self.record[f"{self.name}.{state.target.name}"] = {
            "site": state.site.kind,
            "consumers": state.site.consumers,
            "absmax": float(state.range.absmax.amax()),
            "p99": state.quantile.quantile(0.99),
            **({} if quantizer.scale is None else {"input_scale": float(quantizer.scale)}),
            **state.detail,
        }

    def _round(
        self, linears: Mapping[str, nn.Linear], gram: Tensor | None, spec: AnyWeight
    ) -> dict[str, dict[str, Tensor]]:
        """The rounding method's codes for Linears of one input and format, together where no range spans them."""
        if self.rounding is None or gram is None or not linears:
            return {}
        method = self.rounding
        weights = [linear.weight.detach() for linear in linears.values()]
        if spec.granularity == "tensor":
            solved = [method.quantize(w, gram, spec, self.recipe) for w in weights]
        else:
            sizes = [len(w) for w in weights]
            together = method.quantize(torch.cat(weights), gram, spec, self.recipe)
            solved = list(zip(*(part.split(sizes) for part in together), strict=True))
        return {
            path: {"codes": codes.contiguous(), "scale": scale, "zero_point": zero}
            for path, (codes, scale, zero) in zip(linears, solved, strict=True)
        }


@contextmanager
def packed(block: nn.Module) -> Iterator[None]:
    """Run the block's QuantLinears on integer kernels inside: several times faster than their float simulation."""
    modules = [module for module in block.modules() if isinstance(module, QuantLinear)]
    for module in modules:
        module.set_mode("packed")
    try:
        yield
    finally:
        for module in modules:
            module.set_mode("fake")
