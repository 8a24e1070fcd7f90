"""Ways to share one budget among all layers, each tried on the whole model before anything is truncated.

What a basis is worth is known to first order, and errors compound: which way is best shows only in the model's answers.
All layers are truncated at once and judged by how far the answers move from the float model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from calib.model import Batch, BlockInputs, HiddenList, Resident, Stack, run_after

Ranks = Mapping[str, int | None]


@dataclass
class Frames:
    """Of every layer, by full name, the left bases U [out, k] in bf16: rank r of W [out, in] is U_r U_r^T W.

    kept: where they lie; a list that spills to disk for a model of any size.
    """

    kept: HiddenList
    numbers: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, up: Tensor, columns: int) -> None:
        """As many bases as are ever fewer parameters than the layer has: (out * in - 1) // (out + in)."""
        out = len(up)
        self.numbers[name] = len(self.kept)
        self.kept.append(up[:, : max(1, (out * columns - 1) // (out + columns))].bfloat16())

    def truncated(self, name: str, weight: Tensor, rank: int) -> Tensor:
        up = self.kept[self.numbers[name]][:, :rank].to(weight.dtype)
        return up @ (up.T @ weight)


def distances(
    model: nn.Module,
    stack: Stack,
    batches: Sequence[Batch],
    inputs: BlockInputs,
    first: Sequence[Tensor],
    frames: Frames,
    ways: Mapping[str, Ranks],
    store: Resident,
) -> dict[str, float]:
    """Of each way, how far the answers move: nats a token, KL(float || truncated); without logits |dy|^2 / |y|^2.

    inputs: hidden states that the float model's last block gives; first: that its first block is given, of ``batches``.
    """
    states = {way: list(first) for way in ways}
    for i, name in enumerate(stack.names):
        with store.hold(name):
            block = model.get_submodule(name)
            for way, ranks in ways.items():
                with _truncated(model, name, ranks, frames):
                    states[way] = [inputs.calls[j][i].run(block, hidden) for j, hidden in enumerate(states[way])]
    moved, total = dict.fromkeys(ways, 0.0), 0.0
    with store.keeping():
        for j, batch in enumerate(batches):
            want, told = _answer(model, stack, batch, inputs.hidden[j], inputs.masks[j])
            total += len(want) if told else float(want.square().sum())
            for way, hidden in states.items():
                got, _ = _answer(model, stack, batch, hidden[j], inputs.masks[j])
                moved[way] += float(
                    F.kl_div(got, want, reduction="sum", log_target=True) if told else (got - want).square().sum()
                )
    return {way: value / max(total, 1e-30) for way, value in moved.items()}


@contextmanager
def _truncated(model: nn.Module, block: str, ranks: Ranks, frames: Frames) -> Iterator[None]:
    before: dict[str, Tensor] = {}
    try:
        for path, rank in ranks.items():
            if rank is not None and path.startswith(block + "."):
                weight = model.get_parameter(f"{path}.weight")
                before[path] = weight.data
                weight.data = frames.truncated(path, weight.data, rank)
        yield
    finally:
        for path, data in before.items():
            model.get_parameter(f"{path}.weight").data = data


def _answer(model: nn.Module, stack: Stack, batch: Batch, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, bool]:
    """log p of real tokens [tokens, vocabulary], True; of a model without logits its last hidden state, False."""
    out = run_after(model, stack, batch, hidden)
    told = "logits" in out
    answer = out.logits if told else out.last_hidden_state
    answer = (answer if mask is None or mask.shape != answer.shape[:-1] else answer[mask]).float()
    return (F.log_softmax(answer.reshape(-1, answer.shape[-1]), -1) if told else answer), told
