"""A site while its block is calibrated: modules, statistics, transform."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib.engine.context import ContextObjective
from calib.errors import NumericsError
from calib.methods import ShiftScale, SiteView
from calib.methods.base import Loss
from calib.model import Site, takes_rotation, target_of
from calib.nn import ActivationQuantizer, block_hadamard
from calib.observers import Moments, Quantile, Range, RowSample, moved, outliers, picture, ranks, row_blocks
from calib.observers.picture import MASSIVE, TOKENS
from calib.observers.quantile import ENOUGH
from calib.quantizers import AffineSpec, AnyWeight, qparams, tensor_range
from calib.recipe import Recipe
from calib.solvers import LinearObjective
from calib.transforms import SiteTransform

EXACT_ROWS = 2048


class SiteState:
    """Statistics of one site (per input tensor: experts have several) and its live transform."""

    def __init__(
        self, block: nn.Module, site: Site, recipe: Recipe, weights: Sequence[AnyWeight], whole: bool, gram: bool
    ) -> None:
        """weights: the format of each consumer. whole: all of them are quantized. gram: keep Gram matrices."""
        self.site, self.block, self.recipe, self.weights, self.whole = site, block, recipe, weights, whole
        self.target = target_of(block, site)
        self.transform = SiteTransform(self.target)
        n = site.features
        self.range = Range(n)
        self.sample = RowSample(n, EXACT_ROWS, seed=recipe.seed)
        self.quantile = Quantile()
        self.moments = [Moments(n, gram) for _ in site.groups]
        self.needs_moments = gram or any(spec.range == "mse" for spec in weights)
        self.tokens = [0] * len(site.groups)
        self.head = torch.empty(0, n)  # the first rows, in order, for the picture
        self.shift: Tensor | None = None
        self.transformed = self.on_device = False
        self.detail: dict[str, Any] = {}

    def observe(self, group: int, x: Tensor, mask: Tensor | None, first: int | None = None) -> None:
        """Take x [..., n], the input of a group of consumers, where the token mask [...] keeps it.

        first: the number, in the whole data, of the token at x's first position (padding counts as a position): with it
        the row sample does not depend on which process saw which batch. None: tokens follow those seen so far. Where a
        site has several groups (experts), routed rows are not the batch's rows and are always numbered so: right for
        one process, and for several a sample as uniform but another one.
        """
        start = first if len(self.site.groups) == 1 else None
        stride, taken = max(1, x.numel() // ENOUGH), 0
        for rows, at in row_blocks(x, mask):
            self.range.update(rows)
            self.sample.update(rows, None if start is None else start + at)
            self.quantile.update(rows[-taken % stride :: stride])
            if len(self.head) < TOKENS:
                self.head = torch.cat([self.head, rows[: TOKENS - len(self.head)].float().cpu()])
            if self.needs_moments:
                self.moments[group].update(rows)
            taken += rows.shape[0]
        self.tokens[group] += taken
        self.on_device |= x.device.type != "cpu"

    def finish(self, name: str) -> None:
        """After observing: become the statistics of all ranks, where torch.distributed runs (every rank must call it,
        once); refuse what is not finite; an expert nobody reached gets the whole site's moments."""
        for observer in (self.range, self.sample, self.quantile, *self.moments):
            observer.all_reduce()
            if self.on_device:  # solving is done on the CPU
                observer.load_state_dict({key: tensor.cpu() for key, tensor in observer.state_dict().items()})
        self.tokens = ranks.total(self.tokens)
        if self.range.count == 0:
            raise NumericsError(f"{name} saw no calibration token", "give more data, or exclude the layer")
        if not bool(torch.isfinite(self.range.absmax).all()):
            raise NumericsError(
                f"activations at {name} hold NaN or inf", "check the weights and the data, or exclude it"
            )
        self.before = (self.head, self.range.lo, self.range.hi)
        for i, moments in enumerate(list(self.moments)):
            if self.tokens[i]:
                continue
            self.detail.setdefault("unseen", []).extend(self.site.groups[i])
            if self.needs_moments:
                merged = Moments(self.site.features, gram=moments.gram is not None)
                for other in self.moments:
                    merged.merge(other)
                self.moments[i] = merged

    def view(self, context: ContextObjective | None) -> SiteView:
        """What site methods see. context: the site's objective, where it is not the output of its consumers."""
        consumers = self.target.consumers
        fused = "fused" in self.recipe.sites and self.whole
        lo, hi = self.target.tie(self.range.lo, "amin"), self.target.tie(self.range.hi, "amax")
        scheme = self.recipe.scheme

        @functools.cache
        def stacked(spec: AnyWeight) -> Tensor:  # where the context is judged it is not needed
            same = [c.weight for c, own in zip(consumers, self.weights, strict=True) if own == spec]
            return torch.cat(same).detach()

        def objective(shift: Tensor | None, hadamard: int) -> tuple[Loss, Loss]:
            low, high = (lo, hi) if shift is None else (lo - shift, hi - shift)
            rotate = functools.partial(block_hadamard, block=hadamard) if hadamard > 1 else None
            rows = self.sample.rows if shift is None else self.sample.rows - shift
            if context is not None:
                return context.prepare(shift, low, high, scheme.inputs, self.weights, rotate, rows)
            parts = [
                LinearObjective(rows, stacked(spec), low, high, scheme.inputs, spec, rotate)
                for spec in dict.fromkeys(self.weights)
            ]
            ranked = [part.few() for part in parts]
            return lambda s: sum(part(s) for part in ranked), lambda s: sum(part(s) for part in parts)

        return SiteView(
            self.target.name,
            self.site.kind,
            lo,
            hi,
            torch.stack([torch.maximum(c.weight.amax(0), -c.weight.amin(0)) for c in consumers]).amax(0).detach(),
            self.target.tie(self.sample.rows.abs().mean(0), "amax"),
            can_shift=self.takes_shift or fused,
            can_scale=self.foldable or fused,
            objective=objective,
            can_rotate=takes_rotation(self.site, self.recipe) and self.whole,
            largest_block=self.site.head if self.folds_rotation else 128,
            noise=0.05 if context is None else 0.2,  # a window differs more than a row
            keep=16 if context is None else 40,
        )

    @property
    def folds_rotation(self) -> bool:
        """True between value and output projection: attention moves rows about and keeps a head together."""
        return self.site.head > 1 and self.foldable

    @property
    def foldable(self) -> bool:
        """True where a producer absorbs a scale and the recipe lets it."""
        return self.target.producer is not None and self.site.kind in self.recipe.sites

    @property
    def takes_shift(self) -> bool:
        """True where the producer absorbs a shift too; quantized probabilities do not sum to one, so v -> o may not."""
        producer, site = self.target.producer, self.site.producer
        if not self.foldable or producer is None or site is None or not site.shift:
            return False
        rounds = self.site.kind == "vo" and self.recipe.scheme.attention is not None
        return (producer.takes_shift or producer.offset is None) and not rounds

    def moved(self, found: ShiftScale) -> None:
        """Carry the statistics through a transform that was kept; nothing is collected again."""
        self.transformed = True
        shift, scale = found.shift, found.scale
        z = 0.0 if shift is None else shift
        s = 1.0 if scale is None else scale
        if self.shift is None:
            self.shift = shift
        self.range.lo, self.range.hi = (self.range.lo - z) / s, (self.range.hi - z) / s
        self.head = (self.head - z) / s
        self.sample.rows = (self.sample.rows - z) / s
        for moments in self.moments:
            moments.transform(shift, scale)
        if found.hadamard > 1:
            self._rotated(found.hadamard)

    def _rotated(self, block: int) -> None:
        """Carry the statistics through a block Hadamard. The extremes are those of the sample, widened by what the
        sample missed of the unrotated ones."""
        missed = self.range.absmax.amax() / self.sample.rows.abs().amax().clamp(min=1e-30)
        self.sample.rows, self.head = block_hadamard(self.sample.rows, block), block_hadamard(self.head, block)
        lo, hi = torch.aminmax(self.sample.rows, dim=0)
        self.range.lo, self.range.hi = lo * missed, hi * missed
        for moments in self.moments:
            moments.rotate(functools.partial(block_hadamard, block=block))

    def picture(self) -> dict[str, Any]:
        """The site before and after its transform, for a reader; a few kilobytes."""
        rows, lo, hi = self.before
        found = picture(rows, lo, hi, self.shift)
        return {**found, "after": moved(found, self.head, self.range.lo, self.range.hi)} if self.transformed else found

    def outliers(self) -> dict[str, Any]:
        """What stood out before the transform. What is no first token is told from the first rows where one is massive,
        and from all of them elsewhere."""
        rows, lo, hi = self.before
        first, rest = float(rows[0].abs().amax()), rows[1:].abs()
        massive = len(rest) > 0 and first >= MASSIVE * float(rest.amax())
        return outliers(lo, hi, first, rest.amax(0) if massive else (-lo).maximum(hi))

    def quantizer(self, spec: AffineSpec | None) -> ActivationQuantizer:
        """The consumers' input quantizer: the fused part of the transform and the chosen static range."""
        fused = self.transform.input
        module = ActivationQuantizer(
            spec,
            self.site.features,
            shift=fused.shift is not None,
            rescale=fused.rescale is not None,
            hadamard=fused.hadamard,
            float_rows=self.recipe.float_rows > 0 and spec is not None and not spec.dynamic,
        )
        if fused.shift is not None:
            module.shift = fused.shift.clone()
        if fused.rescale is not None:
            module.rescale = fused.rescale.clone()
        if spec is not None and not spec.dynamic:
            scale, zero_point = qparams(*self._static_range(spec), spec)
            module.scale, module.zero_point = scale.reshape(1), zero_point.reshape(1)
        return module

    def _static_range(self, spec: AffineSpec) -> tuple[Tensor, Tensor]:
        rows, lo, hi = self.sample.rows, self.range.lo.amin(), self.range.hi.amax()
        if self.recipe.float_rows > 0:  # the largest rows run in float: the range is that of the others
            size = rows.abs().amax(1)
            kept = rows[size <= torch.quantile(size, 1 - self.recipe.float_rows)]
            if len(kept):
                rows, (lo, hi) = kept, torch.aminmax(kept)
        energy = torch.cat([c.weight for c in self.target.consumers]).detach().square().mean(0)
        return tensor_range(rows, lo, hi, spec, energy / energy.mean().clamp(min=1e-30))
