"""Basel: learn on the target application which bases of each weight matter, drop the others, add new ones, fine-tune.

After "Basis selection: low-rank decomposition of pretrained large language models for target applications" (arXiv
2405.15877). As there: frozen bases with learned importances, pruned exponentially and for good, new bases beside them,
factors fine-tuned. Ours: bases are those of the whitened weight, so that an importance is an output error from the
start (``basel:svd`` takes the published ones); one budget over all layers (solvers/basis.py) in the place of a share of
each, the new bases counted; biases are kept; the factors that are tuned are the bases, not an SVD of their sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib.errors import InputError
from calib.model import Batch, call_model, observing
from calib.nn import BasisLinear, LowRankLinear
from calib.observers import Moments
from calib.observers.base import rows_of
from calib.recipe import Recipe
from calib.solvers import Bases, bases, choose_ranks, uniform_ranks
from calib.tuning import Tuning, next_token_loss, tune

IMPORTANCE_RATE = 10.0  # importances start at 1, factors at much less: their rate is this many times the factors'
EVENTS = 50  # prunings


class Basel:
    """``basel`` or ``basel:svd``; keep, steps, lr and new_bases of the recipe."""

    name = "basel"

    def __init__(self, recipe: Recipe, value: str = "") -> None:
        if value not in ("", "svd"):
            raise InputError(f"basel:{value} is unknown", "use basel, or basel:svd for the published bases")
        self.recipe, self.whitened = recipe, not value

    def run(
        self,
        model: nn.Module,
        names: Sequence[str],
        batches: Sequence[Batch],
        worth: Mapping[str, float],
        budget: float,
        *,
        folder: Path | None = None,
        progress: bool = False,
    ) -> dict[str, Any]:
        """Replace the named Linears by trained LowRankLinears (or, where factors are no smaller, by what was learned).

        worth: of a unit of each layer's output error. budget: parameters that are kept. folder: where the two stages
        keep their state. Returns losses and ranks, for the report.
        """
        recipe = self.recipe
        found = decompose(model, names, batches if self.whitened else None)
        linears = {name: model.get_submodule(name) for name in names}
        shapes: list[tuple[int, int]] = [(m.out_features, m.in_features) for m in linears.values()]  # type: ignore[misc]
        whole = sum(out * n for out, n in shapes)
        new = new_ranks(shapes, budget / whole, recipe.new_bases)
        layers = {
            name: self._layer(linears[name], found[name], new[i], seed=recipe.seed * 9973 + i)
            for i, name in enumerate(names)
        }
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        steps = recipe.steps // 2
        pruned = [max(1, round(steps * 0.2 + steps * 0.7 * e / EVENTS)) for e in range(1, EVENTS + 1)]
        ranks: list[int | None] = []

        def prune(step: int) -> None:
            """Keep the best of what is left; the budget falls exponentially from all of it to what the recipe keeps."""
            done = sum(at <= step for at in pruned)
            if done and (step in pruned or step == steps):
                ranks[:] = select(layers, [worth[n] for n in names], (budget / whole) ** (done / EVENTS) * whole)

        groups = [
            ({f"{n}.t": layer.t for n, layer in layers.items()}, IMPORTANCE_RATE),
            ({f"{n}.{k}": getattr(layer, k) for n, layer in layers.items() for k in ("new_up", "new_down")}, 1.0),
        ]
        losses = tune(
            groups,
            next_token_loss(model),
            batches,
            Tuning(steps, lr=recipe.lr, seed=recipe.seed),
            buffers={f"{n}.mask": layer.mask for n, layer in layers.items()},
            before_step=prune,
            file=None if folder is None else folder / "importance.safetensors",
            progress=progress,
        )
        prune(steps)
        chosen = dict(zip(names, ranks, strict=True))
        self._settle(model, layers, linears, chosen)
        tuned = finetune(
            model,
            [n for n in names if chosen[n] is not None],
            batches,
            Tuning(recipe.steps - steps, lr=recipe.lr, seed=recipe.seed + 1),
            file=None if folder is None else folder / "factors.safetensors",
            progress=progress,
        )
        return {"importance_loss": losses, "factor_loss": tuned, "ranks": chosen}

    def _layer(self, linear: nn.Module, found: Bases, new: int, seed: int) -> BasisLinear:
        size = found.energy.clamp(min=1e-30).sqrt()
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, torch.Tensor)
        down = found.down / size[:, None]
        return BasisLinear(found.up, down, size, bias, new, seed, weight.dtype)  # type: ignore[arg-type]

    def _settle(
        self,
        model: nn.Module,
        layers: Mapping[str, BasisLinear],
        linears: Mapping[str, nn.Module],
        ranks: Mapping[str, int | None],
    ) -> None:
        """Put the bases that are left in the place of their layer: no more than its rank."""
        for name, layer in layers.items():
            linear = linears[name]
            if ranks[name] is None:
                linear.weight.data.copy_(layer.merged().detach())  # type: ignore[operator]
                model.set_submodule(name, linear)
            else:
                b, a = layer.factors()
                model.set_submodule(name, LowRankLinear.of(b, a, layer.bias, layer.up.dtype))


def decompose(model: nn.Module, names: Sequence[str], batches: Sequence[Batch] | None) -> dict[str, Bases]:
    """The bases of each named Linear: of W H^1/2 with H from the batches' inputs, or of W itself."""
    linears = {name: model.get_submodule(name) for name in names}
    moments = {name: Moments(int(m.in_features), gram=True) for name, m in linears.items()}  # type: ignore[arg-type]
    mask: list[torch.Tensor | None] = [None]
    if batches is not None:
        with torch.no_grad(), observing(linears, lambda name, x: moments[name].update(rows_of(x, mask[0]))):
            for batch in batches:
                given = batch.get("attention_mask")
                mask[0] = None if given is None else given.bool()
                call_model(model, batch)
    found = {}
    for name, linear in linears.items():
        gram, weight = moments.pop(name), linear.weight
        assert isinstance(weight, torch.Tensor) and gram.gram is not None
        metric = torch.ones(weight.shape[1]) if batches is None else gram.gram / max(gram.count, 1)
        found[name] = bases(weight.detach(), metric)
    return found


def new_ranks(shapes: Sequence[tuple[int, int]], keep: float, new: int) -> list[int]:
    """How many new bases each layer gets: at most a quarter of its share of what is kept."""
    return [
        min(new, (rank or min(shape)) // 4) for rank, shape in zip(uniform_ranks(shapes, keep), shapes, strict=True)
    ]


def select(layers: Mapping[str, BasisLinear], worth: Sequence[float], budget: float) -> list[int | None]:
    """Mask what does not fit the budget, new bases counted; each layer's rank with them, None: it stays dense."""
    shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    added = [len(layer.new_down) for layer in layers.values()]
    reserved = sum(new * sum(shape) for new, shape in zip(added, shapes, strict=True))
    energies = [layer.importance.detach().double().square() for layer in layers.values()]
    ordered = [e.sort(descending=True) for e in energies]
    whole = [(layer.size * layer.t.detach().square()).double().square().sum() for layer in layers.values()]
    lost = [float(total - e.sum()) for total, e in zip(whole, energies, strict=True)]
    ranks = choose_ranks(shapes, [o.values for o in ordered], worth, budget - reserved, lost)
    for layer, order, rank in zip(layers.values(), ordered, ranks, strict=True):
        if rank is not None:
            layer.mask[order.indices[rank:]] = 0
    together = [None if rank is None else rank + new for rank, new in zip(ranks, added, strict=True)]
    return [
        None if rank is None or rank * (out + n) >= out * n else rank
        for rank, (out, n) in zip(together, shapes, strict=True)
    ]


def finetune(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    tuning: Tuning,
    *,
    file: Path | None = None,
    progress: bool = False,
) -> list[float]:
    """Train the factors (biases apart) of the named LowRankLinears on next tokens; the loss before every step."""
    factors: dict[str, nn.Parameter] = {}
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, LowRankLinear)
        factors |= {f"{name}.{part}": getattr(module, part).weight for part in ("down", "up")}
    if not factors:
        return []
    return tune([(factors, 1.0)], next_token_loss(model), batches, tuning, file=file, progress=progress)
