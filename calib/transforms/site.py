"""What a transform needs of a site: modules and channel maps, without how they were found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calib.nn.hadamard import block_hadamard


@dataclass(eq=False)
class FoldProducer:
    """A norm (``offset`` + weight is its gain) or a Linear (``offset`` None) that absorbs per-channel (z, s)."""

    module: nn.Module
    index: Tensor  # [n]: producer channel behind each channel of the site
    offset: float | None
    takes_shift: bool

    @property
    def channels(self) -> int:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0]

    def rotate(self, starts: Tensor, block: int) -> None:
        """Turn each run of ``block`` channels that begins at one of starts [k]: a Linear's output rows and bias."""
        rows = (starts[:, None] + torch.arange(block)).flatten()
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            weight[rows] = block_hadamard(weight[rows].T.contiguous(), block).T
            if isinstance(bias, Tensor):
                bias[rows] = block_hadamard(bias[rows], block)

    def absorb(self, shift: Tensor | None, scale: Tensor | None) -> None:
        """y <- (y - z) / s in producer channels: subtract before dividing."""
        module = self.module
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            if shift is not None:
                moved = -shift.to(weight) if bias is None else bias - shift.to(weight)
                module.bias = nn.Parameter(moved, requires_grad=False)
            if scale is not None:
                s = scale.to(weight)
                if self.offset is None:
                    weight.div_(s[:, None])
                else:
                    weight.copy_((weight + self.offset) / s - self.offset)
                bias = getattr(module, "bias", None)
                if isinstance(bias, Tensor):
                    module.bias = nn.Parameter(bias / s, requires_grad=False)


@dataclass(eq=False)
class FoldTarget:
    """One site: its consumers and, where there is one, the producer that can absorb a fold."""

    name: str
    features: int
    consumers: list[nn.Linear]
    producer: FoldProducer | None

    def tie(self, values: Tensor, reduce: str) -> Tensor:
        """values [n], made equal by ``amin``/``amax`` where channels share a producer channel (grouped-query heads)."""
        if self.producer is None:
            return values
        index = self.producer.index
        pooled = values.new_zeros(self.producer.channels).scatter_reduce(0, index, values, reduce, include_self=False)
        return pooled[index]

    def runs(self, block: int) -> Tensor | None:
        """Where in the producer each run of ``block`` of the site's channels begins, [k] without repetition; None where
        one does not lie there as a whole, in order, apart from the others, or the producer is no Linear.
        """
        if self.producer is None or self.producer.offset is not None or self.features % block:
            return None
        index = self.producer.index.view(-1, block)
        starts = index[:, 0].unique()
        whole = torch.equal(index, index[:, :1] + torch.arange(block))
        return starts if whole and bool((starts.diff() >= block).all()) else None

    def to_producer(self, values: Tensor | None, neutral: float) -> Tensor | None:
        """values [n], equal on tied channels, in producer channels; ``neutral`` where the site takes nothing."""
        if values is None or self.producer is None:
            return None
        out = values.new_full((self.producer.channels,), neutral)
        out[self.producer.index] = values
        return out
