"""What one linear, or one block, alone costs at a scheme, and which formats a size is best spent on.

Each linear is rounded to nearest by itself, its input too, and the loss of a few rows is measured again; so is each
block. Other formats are not run: a small error of an output costs in proportion to its square, so a format's cost is
the measured one times how much more, or less, it changes that output. Which linear takes which format is then an
integer program under a budget of bytes (calib.solvers.allocate).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from calib.data import TokenData
from calib.errors import InputError
from calib.evaluate.held import few, next_token_loss, single_rows
from calib.model import Batch, BlockInputs, Plan, Resident, Stack, capture, run_after
from calib.quantizers import AnyWeight
from calib.recipe import SCHEMES, Override, Recipe, Scheme
from calib.solvers import allocate, quantize_input, rounded

TOKENS, LENGTH = 512, 128  # that each change is measured on, in rows so long at most
ERROR_ROWS = 256  # rows of an input that a format's error is measured on
FORMATS = ("w2a16", "w3a16", "w4a16", "w4a8", "w6a6", "w8a8")  # whose weight formats are proposed
FLOAT, FLOAT_BITS = "float", 32.0


class Sensitivity:
    """Measures a float model. ranges: (lo, hi) [n] of each linear's input, for static schemes."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        recipe: Recipe,
        store: Resident,
        ranges: Mapping[str, tuple[Tensor, Tensor]],
        progress: bool = True,
    ) -> None:
        self.model, self.plan, self.recipe, self.store, self.ranges = model, plan, recipe, store, ranges
        self.scheme, self.progress = recipe.scheme, progress

    def measure(self, tokens: TokenData, max_size: int | None = None) -> dict[str, Any]:
        """``linears``, ``blocks``: the added loss of each alone; ``advice``: formats that fit max_size, a Scheme."""
        if len(self.plan.stacks) != 1:
            raise InputError("sensitivity needs a model of one chain of blocks", "inspect it without --sensitivity")
        (stack,) = self.plan.stacks
        rows = few([{k: v[:, :LENGTH] for k, v in row.items()} for b in tokens for row in single_rows(b)], TOKENS)
        self.stack, self.rows = stack, rows
        with torch.no_grad():
            with self.store.keeping():
                inputs = capture(self.model, stack, rows)
            self.base = self._float_losses(stack, inputs, rows)
            blocks, linears, errors = self._all(stack, inputs)
        found = {
            "scheme": self.scheme.name,
            "metric": "next-token loss" if self.predicts else "relative squared error",
            "float_loss": sum(self.base) / len(self.base),
            "rows": len(rows),
            "tokens": sum(next(iter(row.values())).numel() for row in rows),
            "blocks": blocks,
            "linears": linears,
        }
        return {**found, "advice": self._advice(linears, errors, max_size)}

    def _float_losses(self, stack: Stack, inputs: BlockInputs, rows: Sequence[Batch]) -> list[float]:
        hidden = [inputs.hidden[j] for j in range(len(rows))]
        self.predicts, self._wanted = True, list[Tensor]()
        for i, name in enumerate(stack.names):
            with self.store.hold(name):
                hidden = self._through(name, i, inputs, hidden)
        outs = [run_after(self.model, stack, row, h) for row, h in zip(rows, hidden, strict=True)]
        generates = bool(getattr(self.model, "can_generate", lambda: False)())
        self.predicts = generates and all("logits" in out for out in outs)
        if not self.predicts:
            self._wanted = [out[0].float() for out in outs]
        return [self._loss(out, j) for j, out in enumerate(outs)]

    def _loss(self, out: Any, j: int) -> float:
        if self.predicts:
            return next_token_loss(out.logits, self.rows[j])
        want = self._wanted[j]
        return float((out[0].float() - want).square().sum() / want.square().sum())

    def _all(self, stack: Stack, inputs: BlockInputs) -> tuple[list[Any], list[Any], dict[str, dict[str, float]]]:
        blocks: list[Any] = []
        linears: list[Any] = []
        errors: dict[str, dict[str, float]] = {}
        hidden = [inputs.hidden[j] for j in range(len(self.rows))]
        planned = self.plan.quantized()
        with tqdm(total=len(planned) + len(stack.names), unit="change", disable=not self.progress) as bar:
            bar.set_description("sensitivity")
            for i, name in enumerate(stack.names):
                paths = [path for path in planned if path.startswith(name + ".")]
                changes = [[path] for path in paths] + ([paths] if paths else [])
                after: list[list[Tensor]] = []
                with self.store.hold(name):
                    taken = self._inputs_of(name, i, inputs, hidden, paths)
                    errors |= {path: self._errors(path, taken[path]) for path in paths if path in taken}
                    for change in changes:
                        with _replaced({path: self._rounded(path) for path in change}, self.model):
                            after.append(self._through(name, i, inputs, hidden))
                    hidden = self._through(name, i, inputs, hidden)
                for k in range(i + 1, len(stack.names)):
                    with self.store.hold(stack.names[k]):
                        after = [self._through(stack.names[k], k, inputs, each) for each in after]
                for change, each in zip(changes, after, strict=True):
                    entry = self._added(stack, each)
                    if change is changes[-1]:
                        blocks.append({"name": name, **entry})
                    else:
                        linears.append({"name": change[0], **entry})
                    bar.update()
        return blocks, linears, errors

    def _through(self, name: str, i: int, inputs: BlockInputs, hidden: Sequence[Tensor]) -> list[Tensor]:
        block = self.model.get_submodule(name)
        return [inputs.calls[j][i].run(block, h) for j, h in enumerate(hidden)]

    def _added(self, stack: Stack, hidden: Sequence[Tensor]) -> dict[str, Any]:
        """Mean added loss and Student's 95 % interval over the rows."""
        outs = [run_after(self.model, stack, row, h) for row, h in zip(self.rows, hidden, strict=True)]
        added = torch.tensor([self._loss(out, j) - self.base[j] for j, out in enumerate(outs)], dtype=torch.float64)
        mean, n = float(added.mean()), len(added)
        half = float(stats.t.ppf(0.975, n - 1) * added.std() / n**0.5) if n > 1 else None
        return {"loss": mean, "ci95": None if half is None else [mean - half, mean + half]}

    def _rounded(self, path: str) -> Callable[[Tensor], Tensor]:
        linear = self.model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        weight = _on_grid(linear.weight, self.scheme.weights_of(path))
        return lambda x: F.linear(quantize_input(x, self.scheme.inputs, *self.ranges[path]), weight, linear.bias)

    def _inputs_of(
        self, name: str, i: int, inputs: BlockInputs, hidden: Sequence[Tensor], paths: Sequence[str]
    ) -> dict[str, Tensor]:
        """At most 256 rows of each linear's input, evenly spaced."""
        taken: dict[str, list[Tensor]] = {}
        modules = {path: self.model.get_submodule(path) for path in paths}

        def hook(path: str) -> Callable[..., None]:
            return lambda _, args: taken.setdefault(path, []).append(args[0].flatten(0, -2))

        handles = [module.register_forward_pre_hook(hook(path)) for path, module in modules.items()]
        try:
            self._through(name, i, inputs, hidden)
        finally:
            for handle in handles:
                handle.remove()
        rows = {path: torch.cat(parts) for path, parts in taken.items()}
        return {path: x[:: -(-len(x) // ERROR_ROWS)] for path, x in rows.items() if len(x)}

    def _errors(self, path: str, x: Tensor) -> dict[str, float]:
        """Mean squared change of the output in each format that fits, and at the scheme itself (key '')."""
        linear = self.model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        want = F.linear(x, linear.weight)
        got = quantize_input(x, self.scheme.inputs, *self.ranges[path])
        specs = {"": self.scheme.weights_of(path)} | {
            name: SCHEMES[name].weights for name in FORMATS if _fits(SCHEMES[name].weights, linear.in_features)
        }
        return {k: float((F.linear(got, _on_grid(linear.weight, s)) - want).square().mean()) for k, s in specs.items()}

    def _advice(
        self, linears: Sequence[Mapping[str, Any]], errors: Mapping[str, Mapping[str, float]], max_size: int | None
    ) -> dict[str, Any] | None:
        """Which format each linear takes under the budget, as a Scheme that ``calib quantize --scheme`` reads."""
        entries = [self.plan.entries[e["name"]] for e in linears if e["name"] in errors]
        added = {e["name"]: max(e["loss"], 0.0) for e in linears}
        if not entries:
            return None
        floor = 0.01 * max(added.values())  # what one measurement of a few rows cannot tell from nothing
        cost, size, formats = list[list[float]](), list[list[float]](), [*FORMATS, FLOAT]
        for e in entries:
            known, weights = errors[e.name], e.shape[0] * e.shape[1]  # a format that does not fit stands for float
            unit = max(added[e.name], floor) / max(known[""], 1e-30)
            bits = [SCHEMES[f].weights.bits_per_weight(e.shape) if f in known else FLOAT_BITS for f in FORMATS]
            cost.append([unit * known[f] if f in known else 0.0 for f in formats])
            size.append([weights * each / 8 for each in (*bits, FLOAT_BITS)])
        owners = {id(p): p for p in self.model.parameters()}.values()
        outside = sum(p.numel() * p.element_size() for p in owners) - sum(row[-1] for row in size)
        uniform = sum(e.shape[0] * e.shape[1] * e.bits / 8 for e in entries)
        picks = allocate(cost, size, uniform if max_size is None else max_size - outside)
        chosen = {}
        for e, k in zip(entries, picks, strict=True):
            chosen[e.name] = formats[k] if formats[k] in errors[e.name] else FLOAT
        takes, costs = (sum(row[k] for row, k in zip(rows, picks, strict=True)) for rows in (size, cost))
        sizes = [f"{(part + outside) / 2**20:.4g} MiB" for part in (takes, uniform)]
        return {
            "text": f"{_counted(chosen)}: {sizes[0]}, and an added loss of about {costs:.4f} if the costs of single "
            f"linears add up, against {sizes[1]} and {sum(added[e.name] for e in entries):.4f} for {self.scheme.name} "
            "everywhere, in round to nearest.",
            "formats": chosen,
            "bytes": round(takes + outside),
            "scheme": self._scheme(chosen).model_dump(mode="json"),
        }

    def _scheme(self, chosen: Mapping[str, str]) -> Scheme:
        """The scheme with overrides, one rule a format, and exclusions."""
        names: dict[str, list[str]] = {}
        for name, format in chosen.items():
            names.setdefault(format, []).append(name)
        rule = {f: f"^({'|'.join(map(re.escape, found))})$" for f, found in names.items()}
        exclude = (*self.scheme.exclude, *([rule[FLOAT]] if FLOAT in rule else []))
        overrides = tuple(
            Override(rule=rule[f], weights=SCHEMES[f].weights)
            for f in rule
            if f != FLOAT and SCHEMES[f].weights != self.scheme.weights
        )
        name = f"{self.scheme.name}-mixed"
        return self.scheme.model_copy(update={"name": name, "exclude": exclude, "overrides": overrides})


def _on_grid(weight: Tensor, spec: AnyWeight) -> Tensor:
    codes, scale, zero_point = rounded(weight.detach(), spec)
    return spec.decode(codes, scale, zero_point).to(weight.dtype)


def _fits(spec: AnyWeight, features: int) -> bool:
    return spec.group_size is None or features % spec.group_size == 0


def _counted(chosen: Mapping[str, str]) -> str:
    counts: dict[str, int] = {}
    for format in chosen.values():
        counts[format] = counts.get(format, 0) + 1
    return ", ".join(f"{n} linear{'s' * (n > 1)} in {_weights(format)}" for format, n in sorted(counts.items()))


def _weights(format: str) -> str:
    """w4a16 -> the weights of w4a16: only they are overridden."""
    return format if format == FLOAT else f"{format.partition('a')[0]} weights of {format}"


class _replaced:
    """Linears whose forward is another inside."""

    def __init__(self, forwards: Mapping[str, Callable[[Tensor], Tensor]], model: nn.Module) -> None:
        self.forwards = {model.get_submodule(path): forward for path, forward in forwards.items()}

    def __enter__(self) -> None:
        for module, forward in self.forwards.items():
            module.forward = forward

    def __exit__(self, *_: object) -> None:
        for module in self.forwards:
            del module.forward
