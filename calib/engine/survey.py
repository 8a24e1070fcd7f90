"""One pass over the float model before any weight is truncated: what every basis of every layer is worth.

A basis is worth the output energy that is lost without it times the loss that a unit of that layer's error costs:
E||dL/dy||^2 / out, the Fisher information of the layer's outputs, with answers drawn from the model itself. Backward
runs block by block on kept inputs, so that weights may be streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.engine.trial import Frames, Ranks, distances
from calib.methods import LowRank
from calib.model import Batch, BlockInputs, HiddenList, Plan, Resident, Stack, capture, observing, positions, run_after
from calib.observers import Moments
from calib.observers.base import check_finite, rows_of
from calib.solvers import InputStatistics

BACKWARD_TOKENS = 2048


@dataclass
class Survey:
    """Of every planned linear, by full name. energies: of its bases, falling; worth: of a unit of energy; fisher [in]:
    E[(dL/dW)^2], averaged over rows. trial: how far each way of choosing ranks moves the model's answers. notes: what
    could not be found out."""

    energies: dict[str, Tensor] = field(default_factory=dict)
    worth: dict[str, float] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)
    trial: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a safetensors file."""
        worth, trial = (
            {name: torch.tensor(value, dtype=torch.float64) for name, value in each.items()}
            for each in (self.worth, self.trial)
        )
        parts: dict[str, Mapping[str, Tensor]] = {
            "energy": self.energies,
            "worth": worth,
            "fisher": self.fisher,
            "trial": trial,
        }
        return {f"{part}:{name}": t.contiguous() for part, found in parts.items() for name, t in found.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Survey:
        """What ``tensors`` gave."""
        parts: dict[str, dict[str, Tensor]] = {"energy": {}, "worth": {}, "fisher": {}, "trial": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(":")
            parts[part][name] = tensor
        worth, trial = ({name: float(t) for name, t in parts[part].items()} for part in ("worth", "trial"))
        survey = cls(parts["energy"], worth, parts["fisher"], trial)
        survey.notes += _without_gradients(survey)
        return survey


def survey(
    model: nn.Module,
    plan: Plan,
    method: LowRank,
    batches: Sequence[Batch],
    store: Resident,
    hidden: Callable[[], HiddenList],
    seed: int,
    ways: Callable[[Survey], Mapping[str, Ranks]] | None = None,
) -> Survey:
    """hidden: makes an empty list of hidden states. ways: of choosing ranks, to be tried. Gradients are taken, and ways
    tried, where the model is one stack of blocks."""
    found = Survey()
    frames = Frames(hidden()) if ways is not None and len(plan.stacks) == 1 else None
    wanted = plan.quantized()
    kept = _few(batches)
    batches = batches if method.selects else batches[:kept]  # energies want all of the data, gradients some
    for stack in plan.stacks:
        with store.keeping():
            inputs = capture(model, stack, batches, hidden=hidden())
        before: list[list[Tensor]] = []  # [block][batch]
        for i, name in enumerate(stack.names):
            before.append([inputs.hidden[j].clone() for j in range(kept)])
            with store.hold(name):
                taken = _observe(model.get_submodule(name), name, plan, inputs, i, gram=method.selects)
                for path in [w for w in wanted if method.selects and w.startswith(name + ".")]:
                    weight = model.get_submodule(path).weight
                    assert isinstance(weight, Tensor)
                    basis = method.bases(weight, _statistics(taken[path]))
                    found.energies[path] = basis.energy
                    if frames is not None:
                        frames.add(path, basis.up, weight.shape[1])
        if len(plan.stacks) == 1:
            generator = torch.Generator().manual_seed(seed)
            for j in range(kept):
                gradient = _output_gradient(
                    model, stack, batches[j], inputs.hidden[j], inputs.masks[j], store, generator
                )
                for i in reversed(range(len(stack.names))):
                    with store.hold(stack.names[i]):
                        gradient = _backward(model, stack.names[i], inputs, i, j, before[i][j], gradient, found, wanted)
            tokens = sum(positions(batches[j]) for j in range(kept))
            for path in found.worth:
                found.worth[path] /= tokens * plan.entries[path].shape[0]
        if frames is not None and ways is not None and len(tried := ways(found)) > 1:
            found.trial = distances(model, stack, batches[:kept], inputs, before[0], frames, tried, store)
    found.notes += _without_gradients(found)
    return found


def _without_gradients(found: Survey) -> list[str]:
    if found.worth:
        return []
    return ["no gradients reach an encoder through its decoder: ranks weigh each layer's error by its own output"]


def _few(batches: Sequence[Batch]) -> int:
    """How many batches gradients are taken on."""
    tokens = 0
    for count, batch in enumerate(batches, 1):
        tokens += positions(batch)
        if tokens >= BACKWARD_TOKENS:
            return count
    return len(batches)


def _observe(block: nn.Module, name: str, plan: Plan, inputs: BlockInputs, i: int, gram: bool) -> dict[str, Moments]:
    """The moments of every planned linear's input; the block's outputs take the place of its inputs."""
    taken: dict[str, Moments] = {}
    taps: dict[str, Moments] = {}
    for site in plan.blocks[name].sites:
        moments = [Moments(site.features, gram) for _ in site.groups]
        for group, each in zip(site.groups, moments, strict=True):
            taps[group[0]] = each
            taken.update({f"{name}.{path}": each for path in group})
    mask: list[Tensor | None] = [None]

    def take(path: str, x: Tensor) -> None:
        taps[path].update(rows_of(x, mask[0]))

    with observing({path: block.get_submodule(path) for path in taps}, take):
        for j, mask[0] in enumerate(inputs.masks):
            inputs.hidden[j] = inputs.calls[j][i].run(block, inputs.hidden[j])
    for path, moments_ in taps.items():
        check_finite(moments_.square, f"the input of {name}.{path}")
    return taken


def _statistics(moments: Moments) -> InputStatistics:
    assert moments.gram is not None
    return InputStatistics(moments.gram / max(moments.count, 1), moments.second_moment.sqrt())


def _output_gradient(
    model: nn.Module,
    stack: Stack,
    batch: Batch,
    hidden: Tensor,
    mask: Tensor | None,
    store: Resident,
    generator: torch.Generator,
) -> Tensor:
    """dL/dh of the last block's output, L = -log p of answers drawn from p; without logits, of a random direction."""
    with torch.enable_grad(), store.keeping():
        leaf = hidden.detach().requires_grad_()
        out = run_after(model, stack, batch, leaf)
        logits = out.logits if "logits" in out else None
        if logits is None:
            last = out.last_hidden_state
            loss = (last * torch.randn(last.shape, generator=generator).to(last)).sum()
        else:
            keep = slice(None) if mask is None or mask.shape != logits.shape[:-1] else mask
            logits = logits[keep].float().reshape(-1, logits.shape[-1])
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits, drawn, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def _backward(
    model: nn.Module,
    name: str,
    inputs: BlockInputs,
    i: int,
    j: int,
    hidden: Tensor,
    gradient: Tensor,
    found: Survey,
    wanted: Sequence[str],
) -> Tensor:
    """dL/dh of a block's input from that of its output; adds up what its linears' outputs and weights get."""
    block = model.get_submodule(name)
    linears = {path: model.get_submodule(path) for path in wanted if path.startswith(name + ".")}
    with torch.enable_grad(), _outputs_of(linears) as seen:
        leaf = hidden.detach().requires_grad_()
        out = inputs.calls[j][i].run(block, leaf)
        ran = {path: pairs for path, pairs in seen.items() if pairs}
        outputs = [y for pairs in ran.values() for _, y in pairs]
        below, *gradients = torch.autograd.grad(out, [leaf, *outputs], gradient, allow_unused=True)
    rest = iter(gradients)
    for path, pairs in ran.items():
        found.worth.setdefault(path, 0.0)
        for x, _ in pairs:
            dy: Tensor | None = next(rest)
            if dy is None:
                continue
            found.worth[path] += float(dy.double().square().sum())
            x, dy = (t.reshape(len(hidden), -1, t.shape[-1]) if t.dim() == 3 else t[None] for t in (x, dy))
            square = (dy.transpose(1, 2) @ x).square().mean(1).sum(0).double()
            found.fisher[path] = found.fisher.get(path, torch.zeros_like(square)) + square
    assert below is not None
    return below


@contextmanager
def _outputs_of(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """(input, output) of each call of each linear inside."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in linears}

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, args, y: seen[path].append((args[0].detach(), y))

    handles = [linear.register_forward_hook(hook(path)) for path, linear in linears.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
