"""A rotation learned for what it does: rows without a large entry, which cost little when they are rounded.

A row rounded over its own range of +-max|x R| is off by max|x R|^2 / 12 a channel, in units of the squared step of one.
R = R_0 (I + S)^-1 (I - S) with S skew is orthogonal for every S (Cayley; SpinQuant, arXiv 2405.16406, learns such
rotations by the network's loss). Here the loss is that expected error: it needs no pass through the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

RATE = 1e-2  # of Adam, in entries of S
ROWS = 4096  # a step
HELD = 4  # of as many rows one is held out


@dataclass(frozen=True)
class LearnedTurn:
    """turn [n, n], fp64. before, after: mean cost of the held-out rows, at the start and now."""

    turn: Tensor
    before: float
    after: float


def peak_cost(rows: Tensor, worth: Tensor, turn: Tensor) -> Tensor:
    """Sum over rows [T, n] of worth [T] times max|x R|^2."""
    return ((rows @ turn).abs().amax(1).square() * worth).sum()


def learn_turn(
    rows: Tensor, worth: Tensor, start: Tensor, steps: int, seed: int = 0, *, keeps_mean: bool, progress: bool = False
) -> LearnedTurn:
    """The turn that makes ``peak_cost`` of rows [T, n] (fp32) small, from start [n, n] (fp64), by ``steps`` of Adam.

    keeps_mean: R 1 = 1 stays, as it is at the start. The start itself where the held-out rows would not gain.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator)
    held, kept = order[::HELD], torch.cat([order[k::HELD] for k in range(1, HELD)])
    n, first = len(start), start.float()
    mean = torch.full((n, n), 1 / n) if keeps_mean else torch.zeros(n, n)
    free = torch.zeros(n, n, requires_grad=True)
    adam = torch.optim.Adam([free], lr=RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))
    before = float(peak_cost(rows[held], worth[held], first))
    if not before > 0:
        return LearnedTurn(start, before, before)
    for _ in tqdm(range(steps), desc="learn the turn", disable=not progress):
        some = kept[torch.randperm(len(kept), generator=generator)[:ROWS]]
        loss = peak_cost(rows[some], worth[some], first @ _cayley(free, mean))
        adam.zero_grad()
        (loss / before).backward()
        adam.step()
        schedule.step()
    turn = start @ _cayley(free.detach().double(), mean.double())
    after = float(peak_cost(rows[held], worth[held], turn.float()))
    if not after < before:
        turn, after = start, before
    return LearnedTurn(turn, before / len(held), after / len(held))


def _cayley(free: Tensor, mean: Tensor) -> Tensor:
    """An orthogonal matrix that leaves what ``mean`` projects on where it is."""
    eye = torch.eye(len(free), dtype=free.dtype)
    skew = (eye - mean) @ (free - free.T) @ (eye - mean)
    return torch.linalg.solve(eye + skew, eye - skew)
