"""A linear as a sum of bases whose weights are learned: what Basel trains before it decides."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BasisLinear(nn.Module):
    """y = sum over bases k of m_k s_k t_k^2 u_k (v_k . x) + A (B x) + b.

    Frozen: ``up`` [out, k], ``down`` [k, in], ``size`` [k] (s, the importance before training), bias. Learned: ``t``
    [k], at 1 first (its square keeps importances positive), ``new_up`` A [out, r], at 0 first, and ``new_down`` B [r,
    in], random. ``mask`` m [k] only ever loses bases.
    """

    def __init__(
        self, up: Tensor, down: Tensor, size: Tensor, bias: Tensor | None, new: int, seed: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = down.shape[1], len(up)
        frozen = {"up": up, "down": down, "size": size, "mask": torch.ones(len(size)), "bias": bias}
        for name, tensor in frozen.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().to(dtype).clone())
        generator = torch.Generator().manual_seed(seed)
        self.t = nn.Parameter(torch.ones(len(size), dtype=dtype), requires_grad=False)
        self.new_up = nn.Parameter(torch.zeros(len(up), new, dtype=dtype), requires_grad=False)
        drawn = torch.randn(new, down.shape[1], generator=generator).to(dtype) / max(new, 1) ** 0.5
        self.new_down = nn.Parameter(drawn, requires_grad=False)

    up: Tensor
    down: Tensor
    size: Tensor
    mask: Tensor
    bias: Tensor | None

    @property
    def importance(self) -> Tensor:
        """s_k t_k^2 of the bases that are left, 0 of the others; [k]."""
        return self.size * self.t.square() * self.mask

    def merged(self) -> Tensor:
        """The weight [out, in] that this is."""
        return (self.up * self.importance) @ self.down + self.new_up @ self.new_down

    def factors(self) -> tuple[Tensor, Tensor]:
        """B [out, r] and A [r, in] of the bases that are left and the new ones: B A is ``merged``.

        Each basis is shared out evenly, so that its two vectors learn at one pace; whitened bases stay uncorrelated
        (an SVD of the merged weight would undo that, and trains several times slower).
        """
        left = self.mask > 0
        root = self.importance[left].sqrt()
        share = (self.new_down.norm(dim=1) / self.new_up.norm(dim=0).clamp(min=1e-6)).sqrt()
        b = torch.cat([self.up[:, left] * root, self.new_up * share], 1)
        return b, torch.cat([self.down[left] * root[:, None], self.new_down / share[:, None]])

    def forward(self, x: Tensor) -> Tensor:
        y = ((x @ self.down.T) * self.importance) @ self.up.T + (x @ self.new_down.T) @ self.new_up.T
        return y if self.bias is None else y + self.bias
