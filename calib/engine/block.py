"""One block: observe -> solve -> fold -> quantize -> run."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.engine.context import ContextObjective
from calib.engine.error import sqnr
from calib.engine.factors import STAYS_DENSE, LowRankWork
from calib.engine.state import SiteState
from calib.errors import NumericsError
from calib.methods import ShiftScale, SiteMethod, WeightMethod
from calib.model import Call, HiddenList, Plan, Site, is_finite, observing
from calib.nn import ActivationQuantizer, AttentionFormat, QuantLinear, attention_modules
from calib.observers import Moments
from calib.quantizers import AnyWeight
from calib.recipe import Recipe
from calib.solvers import Pairs, bias_correction
from calib.transforms import relative_error, tolerance_for, undone_on_failure


class Reached(Exception):
    """Ends a run at the module it was run for."""


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
        self,
        name: str,
        block: nn.Module,
        plan: Plan,
        recipe: Recipe,
        rounding: WeightMethod | None,
        given: BlockInput,
        low_rank: LowRankWork | None = None,
    ) -> None:
        self.name, self.block, self.plan, self.recipe, self.given = name, block, plan, recipe, given
        self.rounding, self.low_rank = rounding, low_rank
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
                gram=low_rank is not None or (rounding is not None and not self._pairs(site)),
            )
            for site in plan.blocks[name].sites
            if any(map(self._planned, site.consumers))
        ]
        given.refresh()
        self.before = self.runs[0]()
        start = time.perf_counter()  # the weights are in the caches' reach now
        self.runs[0]()
        self.seconds = time.perf_counter() - start  # of the float block, on the first batch
        self.tolerance = tolerance_for(functools.partial(given.calls[0].run, block), given.hidden[0], self.before)
        self.record: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self.sqnr: dict[str, float] = {}  # of each linear's output, dB
        self.pictures: dict[str, dict[str, Any]] = {}
        self.floats: dict[str, Tensor] = {}  # transformed weights, kept where they are learned from

    def _planned(self, path: str) -> bool:
        return f"{self.name}.{path}" in self.wanted

    def observe(self, outputs: HiddenList | None) -> None:
        """One pass over all batches; the float outputs go into ``outputs``, where the recipe hands floats on."""
        taps = {group[0]: (state, g) for state in self.states for g, group in enumerate(state.site.groups)}
        mask: list[Tensor | None] = [None]
        first = [0]

        def take(path: str, x: Tensor) -> None:
            state, group = taps[path]
            state.observe(group, x, None if mask[0] is None else mask[0].to(x.device), first[0])

        with observing({path: self.block.get_submodule(path) for path in taps}, take):
            for run, mask[0], first[0] in zip(self.runs, self.given.masks, self.given.first, strict=True):
                out = run()
                if outputs is not None:
                    outputs.append(out.to(self.given.hidden[0]))
        for state in self.states:
            state.finish(f"{self.name}.{state.target.name}")
            if unseen := state.detail.get("unseen"):
                self.notes.append(
                    f"{self.name}: {len(unseen)} of {len(state.site.consumers)} linears at {state.target.name} saw no "
                    f"calibration token ({', '.join(unseen)}): they took the statistics of the others; give more data"
                )

    def leave(self) -> None:
        """Take what observing hung on the block off it again."""
        for state in self.states:
            state.transform.remove_hooks()

    def solve(self, state: SiteState, method: SiteMethod) -> ShiftScale:
        """The method's (z, s) and rotation of one site."""
        context = None
        joint = state.site.context is not None and self.recipe.objective == "context"
        if joint and method.name in ("os+", "awq") and self.recipe.scheme.inputs is not None:
            count = self.given.probes
            context = ContextObjective(
                self.block, state.site, self.runs[:count], self.given.masks[:count], few=2 if count > 2 else 1
            )
        found = method.solve(state.view(context), self.recipe)
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
                state.transform.rotate(found.hadamard, foldable=state.folds_rotation)
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

    def _pairs(self, site: Site) -> bool:
        """True where rounding compares the site's float and quantized inputs; experts get other rows in each."""
        return self.rounding is not None and self.rounding.paired and len(site.groups) == 1

    def quantize(self, floats: HiddenList | None = None) -> None:
        """Replace every planned Linear by a QuantLinear and set the attention's formats.

        floats: the block's inputs in the float model, for a rounding method that is paired.
        """
        self.linears: dict[str, nn.Linear] = {}
        for state in self.states:
            self._settle(state)
            self._quantize_site(state, floats)
        for state in self.states:
            state.transform.remove_hooks()
        scheme = self.recipe.scheme
        if scheme.attention is not None or scheme.kv is not None:
            prefix = 0 if self.plan.prefix is None else len(self.plan.prefix)
            turned = scheme.kv is not None and scheme.kv.bits < 8  # at 8 bits it changes nothing
            for module in attention_modules(self.block):
                module.calib_attention = AttentionFormat(scheme.attention, scheme.kv, prefix, turned)  # type: ignore[assignment]

    def _settle(self, state: SiteState) -> None:
        """The plan says what was done, where that is less than was planned."""
        if state.transformed:
            return
        why = "the transform failed its proof" if "proof" in state.detail else "its loss is lowest untransformed"
        for path in state.site.consumers:
            entry = self.plan.entries[f"{self.name}.{path}"]
            if entry.status == "transformed":
                entry.status, entry.reason, entry.fold = "quantized", why, ""

    def _quantize_site(self, state: SiteState, floats: HiddenList | None) -> None:
        quantizer = state.quantizer(self.recipe.scheme.inputs)
        gram, pairs = self._observe_pairs(state, quantizer, floats) if self._pairs(state.site) else (None, None)
        for group, moments in zip(state.site.groups, state.moments, strict=True):
            inside = {
                p: m for p in group if self._planned(p) and isinstance(m := self.block.get_submodule(p), nn.Linear)
            }
            dense = (
                inside if self.low_rank is None else self._truncate(inside, state, moments, quantizer, self.low_rank)
            )
            spec_of = {path: self.recipe.scheme.weights_of(f"{self.name}.{path}") for path in dense}
            rounded: dict[str, dict[str, Tensor]] = {}
            for spec in dict.fromkeys(spec_of.values()):
                same = {path: linear for path, linear in dense.items() if spec_of[path] == spec}
                rounded |= self._round(same, moments.gram if gram is None else gram, spec, pairs)
            importance = moments.second_moment.float() if moments.count else None
            for path, linear in dense.items():
                weight = linear.weight.detach()
                module = QuantLinear.from_float(
                    weight,
                    None if linear.bias is None else linear.bias.detach(),
                    spec_of[path],
                    copy.deepcopy(quantizer),
                    importance=importance,
                    **rounded.get(path, {}),
                )
                if self.recipe.bias_correction:
                    added = bias_correction(weight, module.dequantize(), state.sample.rows).to(module.dtype)
                    module.bias = added if module.bias is None else module.bias + added
                if self.low_rank is not None and not self.low_rank.method.truncates:
                    module = self.low_rank.compensated(module, weight, state, moments)
                    entry = self.plan.entries[f"{self.name}.{path}"]
                    entry.bits += self.low_rank.method.stored_bits(entry.shape, weight.dtype)
                self.block.set_submodule(path, module)
                self.linears[path] = linear
                if self.recipe.refine:
                    self.floats[path] = linear.weight.detach()
        self.pictures[f"{self.name}.{state.target.name}"] = state.picture()
        self.record[f"{self.name}.{state.target.name}"] = {
            "site": state.site.kind,
            "consumers": state.site.consumers,
            "outliers": state.outliers(),
            "absmax_before": float(torch.maximum(-state.before[1], state.before[2]).amax()),
            "absmax": float(state.range.absmax.amax()),
            "p99": state.quantile.quantile(0.99),
            **({} if quantizer.scale is None else {"input_scale": float(quantizer.scale)}),
            **state.detail,
        }

    def measure(self) -> None:
        """Each finished linear's output error, in ``sqnr``; the last that is asked of the float weights."""
        for state in self.states:
            for path in state.site.consumers:
                if path in self.linears:
                    module: Any = self.block.get_submodule(path)
                    self.sqnr[path] = sqnr(module, self.linears[path], state.sample.rows)
        self.linears.clear()
        self.floats.clear()

    def runs_of(self, i: int) -> Tensor:
        """The block's output on batch i."""
        return self.runs[i]()

    def _observe_pairs(
        self, state: SiteState, quantizer: ActivationQuantizer, floats: HiddenList | None
    ) -> tuple[Tensor, Pairs] | tuple[None, None]:
        """X'^T X' [n, n] fp32 and the pairs: X the transformed rows that the float model feeds the site, X' those that
        the quantized blocks and sites before it do, on the site's own grid. Where a router chooses the rows, X is X';
        nothing where it sends none.
        """
        assert floats is not None
        path, n = state.site.groups[0][0], state.site.features
        gram, cross = torch.zeros(n, n), torch.zeros(n, n)
        count, drift = 0, 0.0
        with packed(self.block):
            for j, (call, mask) in enumerate(zip(self.given.calls, self.given.masks, strict=True)):
                with self._unquantized():
                    x = self._input_of(path, n, functools.partial(call.run, self.block, floats[j]))
                got = quantizer.on_grid(self._input_of(path, n, self.runs[j]).float())
                tokens = self.given.hidden[j].shape[:2].numel()
                x, got = x.float().flatten(0, -2), got.flatten(0, -2)
                if len(x) != tokens or len(got) != tokens:  # rows routed to an expert: others in each network
                    x = got
                elif mask is not None:
                    x, got = x[mask.flatten()], got[mask.flatten()]
                gram.addmm_(got.T, got)
                cross.addmm_(x.T, got)
                count, drift = count + len(got), drift + float((x - got).square().sum(dtype=torch.float64))
        return (gram, Pairs(cross, count, drift)) if count else (None, None)

    def _input_of(self, path: str, features: int, run: Callable[[], Tensor]) -> Tensor:
        """What a Linear takes, behind its transforms, in a run that ends there; no rows where it is not called."""
        taken: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            taken.append(args[0])
            raise Reached

        handle = self.block.get_submodule(path).register_forward_pre_hook(stop)
        try:
            run()
        except Reached:
            pass
        finally:
            handle.remove()
        return taken[0] if taken else torch.zeros(0, features)

    @contextmanager
    def _unquantized(self) -> Iterator[None]:
        """The block with its float Linears, transformed, in their places inside."""
        modules = {path: self.block.get_submodule(path) for path in self.linears}
        for path, linear in self.linears.items():
            self.block.set_submodule(path, linear)
        try:
            yield
        finally:
            for path, module in modules.items():
                self.block.set_submodule(path, module)

    def _truncate(
        self,
        linears: Mapping[str, nn.Linear],
        state: SiteState,
        moments: Moments,
        quantizer: ActivationQuantizer,
        low_rank: LowRankWork,
    ) -> dict[str, nn.Linear]:
        """Put factors in the place of those that get a rank; what is left to be rounded whole."""
        dense = {}
        for path, linear in linears.items():
            name, entry = f"{self.name}.{path}", self.plan.entries[f"{self.name}.{path}"]
            entry.rank = low_rank.rank(name)
            if entry.rank is not None:
                module, floats = low_rank.factored(name, linear, state, moments, quantizer, self.rounding)
                if self.recipe.refine:
                    self.floats |= {f"{path}.{part}": weight for part, weight in floats.items()}
                entry.bits = low_rank.stored_bits(entry.shape, entry.rank, linear.weight.dtype)
                self.block.set_submodule(path, module)
                self.linears[path] = linear
            elif self.recipe.scheme.rounds:
                dense[path] = linear
            else:
                entry.status, entry.reason = "excluded", STAYS_DENSE
        return dense

    def _round(
        self, linears: Mapping[str, nn.Linear], gram: Tensor | None, spec: AnyWeight, pairs: Pairs | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """The rounding method's codes for Linears of one input and format, together where no range spans them."""
        if self.rounding is None or gram is None or not linears:
            return {}
        method = self.rounding
        weights = [linear.weight.detach() for linear in linears.values()]
        if spec.granularity == "tensor":
            solved = [method.quantize(w, gram, spec, self.recipe, pairs) for w in weights]
        else:
            sizes = [len(w) for w in weights]
            together = method.quantize(torch.cat(weights), gram, spec, self.recipe, pairs)
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
