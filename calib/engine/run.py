"""The block loop: observe -> solve -> fold -> quantize -> hand on."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from calib.engine.context import ContextObjective
from calib.engine.memory import reuse_pages
from calib.engine.prefix import PrefixBuilder
from calib.engine.state import SiteState
from calib.errors import NumericsError
from calib.methods import GPTQ, Hadamard, ShiftScale, SiteMethod, resolve
from calib.model import Batch, BlockInputs, Plan, Site, Stack, capture, observing, takes_rotation
from calib.nn import ActivationQuantizer, AttentionFormat, QuantLinear, attention_modules
from calib.recipe import Recipe
from calib.transforms import relative_error, undone_on_failure

PROBE_TOKENS, PROBES = 512, 3
TOLERANCE = 1e-5


@dataclass
class Outcome:
    """What a run leaves beside the changed model. sites: one record each, for the report."""

    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)  # output error of each quantized block, relative
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def split_probes(batches: Sequence[Batch]) -> list[Batch]:
    """The same rows, with the first ones in three small batches: a search ranks on the first, scores on all three."""
    rows, first = [], dict(batches[0])
    length = next(iter(first.values())).shape[-1]
    size = next(iter(first.values())).shape[0]
    take = max(1, -(-PROBE_TOKENS // max(length, 1)))
    cuts = [0, take, 2 * take, min(4 * take, size), size]
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        if start < min(end, size):
            rows.append({k: v[start:end] for k, v in first.items()})
    return [*rows, *batches[1:]]


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


class Engine:
    """Quantizes a model's blocks in place, in order, each from the outputs of those before it."""

    def __init__(
        self, model: nn.Module, plan: Plan, recipe: Recipe, prefix: PrefixBuilder | None = None, progress: bool = True
    ) -> None:
        self.model, self.plan, self.recipe, self.prefix, self.progress = model, plan, recipe, prefix, progress
        self.site_methods, self.weights, self.rotation = resolve(recipe)
        self.outcome = Outcome()
        self.wanted = set(plan.quantized())

    def run(self, batches: Sequence[Batch]) -> Outcome:
        """Process every stack. The model's planned Linears are QuantLinears afterwards."""
        reuse_pages()
        batches = split_probes(batches)
        total = sum(len(stack.names) for stack in self.plan.stacks)
        with torch.no_grad(), tqdm(total=total, unit="block", disable=not self.progress, desc="calibrating") as bar:
            for stack in self.plan.stacks:
                extra = {"past_key_values": self.prefix.cache} if self.prefix else None
                with self.timed("capture"):
                    inputs = capture(self.model, stack, batches, extra)
                    prefix = self._prefix_inputs(stack)
                for i, name in enumerate(stack.names):
                    self._block(name, i, inputs, prefix)
                    bar.update()
                    bar.set_postfix_str(self._worst())
        return self.outcome

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.outcome.seconds[stage] = self.outcome.seconds.get(stage, 0.0) + time.perf_counter() - start

    def _worst(self) -> str:
        name, error = max(self.outcome.blocks.items(), key=lambda item: item[1], default=("", 0.0))
        return f"worst {name} {error:.1%}" if name else ""

    def _prefix_inputs(self, stack: Stack) -> BlockInputs | None:
        """Capture the blocks' inputs for the prefix tokens themselves, at position 0, without a cache."""
        if self.prefix is None:
            return None
        hooks = self.model._forward_pre_hooks.copy()
        self.model._forward_pre_hooks.clear()  # the prefix does not come after itself
        try:
            return capture(self.model, stack, [{"input_ids": self.prefix.ids}])
        finally:
            self.model._forward_pre_hooks.update(hooks)

    def _block(self, name: str, i: int, inputs: BlockInputs, prefix: BlockInputs | None) -> None:
        block = self.model.get_submodule(name)
        runs = [functools.partial(inputs.calls[b][i].run, block, h) for b, h in enumerate(inputs.hidden)]
        for parameter, value in block.named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise NumericsError(f"weight {name}.{parameter} holds NaN or inf", "repair the checkpoint")
        states = [
            SiteState(block, site, self.recipe, self._whole(name, site), gram=self.weights is not None)
            for site in self.plan.blocks[name].sites
            if any(f"{name}.{path}" in self.wanted for path in site.consumers)
        ]
        refresh = self._refresher(i, block, prefix)
        refresh()
        with self.timed("probe"):
            before = runs[0]()
        self._rotate(states)
        float_outputs = self._observe(name, block, states, runs, inputs.masks)
        for state in states:
            for method in self.site_methods:
                self._solve(name, block, state, method, runs, inputs.masks, before, refresh)
        with self.timed("proof"):
            drift = relative_error(runs[0](), before)
            if drift > 10 * TOLERANCE:
                raise NumericsError(f"the folds of {name} changed its float output by {drift:.1e}", "report this model")
        after_prefix = refresh()
        with self.timed("weights"):
            for state in states:
                self._quantize_site(name, block, state)
            self._quantize_attention(block)
        with self.timed("propagate"), packed(block):
            quantized = [run() for run in runs] if self.recipe.inputs == "quantized" else [runs[0]()]
        error = float((quantized[0] - before).norm() / before.norm().clamp(min=1e-30))
        self.outcome.blocks[name] = error
        if prefix is not None and after_prefix is not None:
            prefix.hidden[0] = after_prefix
        inputs.hidden[:] = quantized if self.recipe.inputs == "quantized" else float_outputs

    def _refresher(self, i: int, block: nn.Module, prefix: BlockInputs | None) -> Callable[[], Tensor | None]:
        """Writes this layer's prefix keys and values anew (after each fold); returns the block's output for the prefix."""

        def refresh() -> Tensor | None:
            if self.prefix is None or prefix is None:
                return None
            return self.prefix.take(i, block, prefix.calls[0][i], prefix.hidden[0])

        return refresh

    def _whole(self, name: str, site: Site) -> bool:
        """True where every consumer is quantized: only then may their input carry a transform of its own."""
        return all(f"{name}.{path}" in self.wanted for path in site.consumers)

    def _rotate(self, states: Sequence[SiteState]) -> None:
        if self.rotation is None:
            return
        for state in states:
            if not takes_rotation(state.site) or not state.whole:
                continue
            size = self.rotation.block_for(state.site.features)
            if size > 1:
                state.transform.rotate(size)
                state.detail["hadamard"] = size

    def _observe(
        self,
        name: str,
        block: nn.Module,
        states: Sequence[SiteState],
        runs: Sequence[Callable[[], Tensor]],
        masks: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """One pass over all batches; the float outputs, kept only where the recipe hands floats on."""
        taps = {group[0]: (state, g) for state in states for g, group in enumerate(state.site.groups)}
        mask: list[Tensor | None] = [None]

        def take(path: str, x: Tensor) -> None:
            state, group = taps[path]
            state.observe(group, x, mask[0])

        outputs = []
        with self.timed("observe"), observing({path: block.get_submodule(path) for path in taps}, take):
            for run, mask[0] in zip(runs, masks, strict=True):
                out = run()
                if self.recipe.inputs == "float":
                    outputs.append(out)
        for state in states:
            state.finish(f"{name}.{state.target.name}")
        return outputs

    def _solve(
        self,
        name: str,
        block: nn.Module,
        state: SiteState,
        method: SiteMethod,
        runs: Sequence[Callable[[], Tensor]],
        masks: Sequence[Tensor | None],
        before: Tensor,
        refresh: Callable[[], Tensor | None],
    ) -> None:
        if state.transform.input.hadamard > 1:
            return
        with self.timed("solve"):
            probes = []
            if state.site.context is not None and method.name == "os+" and self.recipe.scheme.inputs is not None:
                many = ContextObjective(block, state.site, runs[:PROBES], masks[:PROBES])
                few = ContextObjective(block, state.site, runs[:1], masks[:1])
                probes = [few, many]
            found = method.solve(state.view(probes), self.recipe)
        state.detail.update(method=method.name, **found.detail)
        self._apply(name, state, found, runs[0], before, refresh)

    def _apply(
        self,
        name: str,
        state: SiteState,
        found: ShiftScale,
        run: Callable[[], Tensor],
        before: Tensor,
        refresh: Callable[[], Tensor | None],
    ) -> None:
        """Fold what the producer takes, fuse the rest; a change that fails its proof is undone and named."""
        if found.shift is None and found.scale is None:
            return
        producer, site = state.target.producer, state.site
        foldable = producer is not None and site.kind in self.recipe.sites
        shift_folds = foldable and state._shiftable()
        with self.timed("proof"), undone_on_failure(state.transform, run, TOLERANCE, before) as error:
            if foldable:
                state.transform.fold(found.shift if shift_folds else None, found.scale)
                if found.shift is not None and not shift_folds and state.whole:
                    left = found.shift if found.scale is None else found.shift / found.scale
                    state.transform.fuse(left, None)
            else:
                state.transform.fuse(found.shift, found.scale)
            refresh()
        state.detail["proof"] = error[0]
        if error[0] <= TOLERANCE:
            state.moved(found.shift, found.scale)
            return
        refresh()
        self.outcome.notes.append(
            f"{name}.{state.target.name}: transform undone, it changed the block's output by {error[0]:.1e}"
        )
        for path in state.site.consumers:
            entry = self.plan.entries[f"{name}.{path}"]
            if entry.status == "transformed":
                entry.status, entry.reason, entry.fold = "quantized", "the transform failed its proof", ""

    def _quantize_site(self, name: str, block: nn.Module, state: SiteState) -> None:
        """Replace the site's planned consumers by QuantLinears; those left out stay float Linears."""
        scheme = self.recipe.scheme
        quantizer = state.quantizer(scheme.inputs)
        state.transform.remove_hooks()
        for group, moments in zip(state.site.groups, state.moments, strict=True):
            inside = [path for path in group if f"{name}.{path}" in self.wanted]
            rounded = self._round(inside, block, moments)
            for path in inside:
                linear = block.get_submodule(path)
                assert isinstance(linear, nn.Linear)
                bias = None if linear.bias is None else linear.bias.detach()
                codes = rounded.get(path, {})
                importance = moments.second_moment.float() if moments.count else None
                module = QuantLinear.from_float(
                    linear.weight.detach(), bias, scheme.weights, _copy(quantizer), importance=importance, **codes
                )
                block.set_submodule(path, module)
        record = {
            "site": state.site.kind,
            "consumers": state.site.consumers,
            "absmax": float(state.range.absmax.amax()),
            "p99": state.quantile.quantile(0.99),
            **state.detail,
        }
        if quantizer.scale is not None:
            record["input_scale"] = float(quantizer.scale)
        self.outcome.sites[f"{name}.{state.target.name}"] = record

    def _quantize_attention(self, block: nn.Module) -> None:
        scheme = self.recipe.scheme
        if scheme.attention is None and scheme.kv is None:
            return
        prefix = len(self.prefix.tokens) if self.prefix else 0
        for module in attention_modules(block):
            module.calib_attention = AttentionFormat(scheme.attention, scheme.kv, prefix)  # type: ignore[assignment]

    def _round(self, paths: Sequence[str], block: nn.Module, moments: Any) -> Mapping[str, dict[str, Tensor]]:
        """A weight method's codes for Linears of one input, solved together (one factorisation)."""
        if self.weights is None or not paths or moments.gram is None:
            return {}
        assert isinstance(self.weights, GPTQ)
        modules = [block.get_submodule(path) for path in paths]
        stacked = torch.cat([m.weight.detach() for m in modules])  # type: ignore[arg-type,operator]
        spec = self.recipe.scheme.weights
        if spec.granularity == "tensor":
            results = [self.weights.quantize(m.weight.detach(), moments.gram, spec, self.recipe) for m in modules]  # type: ignore[operator,arg-type]
            return {p: dict(codes=c, scale=s, zero_point=z) for p, (c, s, z) in zip(paths, results, strict=True)}
        sizes = [m.weight.shape[0] for m in modules]  # type: ignore[union-attr]
        codes, scale, zero = self.weights.quantize(stacked, moments.gram, spec, self.recipe)
        parts = zip(paths, codes.split(sizes), scale.split(sizes), zero.split(sizes), strict=True)
        return {path: dict(codes=c.contiguous(), scale=s, zero_point=z) for path, c, s, z in parts}


def _copy(quantizer: ActivationQuantizer) -> ActivationQuantizer:
    twin = ActivationQuantizer(
        quantizer.spec,
        quantizer.features,
        shift=quantizer.shift is not None,
        rescale=quantizer.rescale is not None,
        hadamard=quantizer.hadamard,
        float_rows=quantizer.float_rows,
    )
    twin.load_state_dict(quantizer.state_dict())
    return twin


__all__ = ["Engine", "Hadamard", "Outcome", "Site", "split_probes"]
