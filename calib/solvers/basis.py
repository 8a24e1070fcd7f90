"""Which bases of a weight to keep: W ~ B A, chosen by what they do to the layer's output.

Every published scaling S (W' = T_r(W S) S^-1, T_r the best rank-r approximation) is a metric M = S S^T on inputs. As
T_r(N) = U_r U_r^T N for the left singular vectors U of N, W' = U_r U_r^T W, with U the eigenvectors of W M W^T: no root
of M is taken and nothing is inverted, so a singular M (few tokens, dead channels) is as good as any. Dropping basis k
costs its eigenvalue, exactly: with M = E[x x^T], tr((W - W') M (W - W')^T) = the sum of those dropped.

SVD: M = I. FWSVD (arXiv 2207.00112): diag of the Fisher information, averaged over rows. ASVD (arXiv 2312.05821):
diag E|x|^(2 alpha). rms: diag E[x^2]. SVD-LLM (arXiv 2403.07378), whitened: E[x x^T].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.errors import InputError, NumericsError

TRUNCATIONS = ("whitened", "svd-llm", "rms", "asvd", "fwsvd", "svd")
RIDGE = 1e-9  # of the mean energy: orders the bases that the data say nothing about by their own size


@dataclass(frozen=True, eq=False)
class Bases:
    """W = up @ down with all k = min(out, in) bases, by falling energy; the first r of them are the best r.

    up [out, k] has orthonormal columns, down [k, in], energy [k]: what dropping each one costs; fp64.
    """

    up: Tensor
    down: Tensor
    energy: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B [out, r] and A [r, in], each with the root of the singular values, so that B A is the best rank r."""
        root = self.energy[:rank].clamp(min=1e-30 + 1e-12 * float(self.energy[0])).pow(0.25)
        return self.up[:, :rank] * root, self.down[:rank] / root[:, None]


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Of a linear's input: gram [n, n] = E[x x^T], absmean [n] = E|x|, fisher [n]: rows' mean of E[(dL/dW)^2]."""

    gram: Tensor
    absmean: Tensor
    fisher: Tensor | None = None

    def metric(self, variant: str, alpha: float = 0.5) -> Tensor:
        """M of a variant: [n] where it is diagonal, else [n, n]; fp64."""
        if variant in ("whitened", "svd-llm"):
            return self.gram.double()
        if variant == "fwsvd":
            if self.fisher is None:
                raise InputError("fwsvd weighs channels by gradients and none were taken", "use low_rank:whitened")
            return self.fisher.double()
        if variant == "asvd":
            return (self.absmean.double() + 1e-6).pow(2 * alpha)
        return self.gram.diagonal().double() if variant == "rms" else torch.ones_like(self.absmean, dtype=torch.float64)


def bases(weight: Tensor, metric: Tensor) -> Bases:
    """All bases of weight [out, in] under metric [in] (diagonal) or [in, in]. NumericsError: either is not finite."""
    w, m = weight.double(), metric.double()
    if not bool(torch.isfinite(w).all() and torch.isfinite(m).all()):
        raise NumericsError("a weight or its input statistics hold NaN or inf", "check the weights and the data")
    out, n = w.shape
    frame, core = torch.linalg.qr(w) if out > n else (None, w)  # W = frame core: eigenvectors are sought in its span
    diagonal = m if m.dim() == 1 else m.diagonal()
    ridge = RIDGE * float(diagonal.mean().clamp(min=1e-30))
    seen = core * m if m.dim() == 1 else core @ m
    energy, vectors = torch.linalg.eigh(_symmetric((seen + ridge * core) @ core.T))
    energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
    up = vectors if frame is None else frame @ vectors
    return Bases(up, vectors.T @ core, energy)


def svd_llm_bases(weight: Tensor, gram: Tensor) -> Bases:
    """The same bases as published: SVD of W L, gram = L L^T by Cholesky, shifted by its least eigenvalue where it has
    to be. For comparison."""
    w, h = weight.double(), _symmetric(gram.double())
    if not bool(torch.isfinite(w).all() and torch.isfinite(h).all()):
        raise NumericsError("a weight or its input statistics hold NaN or inf", "check the weights and the data")
    lower, failed = torch.linalg.cholesky_ex(h)
    if bool(failed):
        shift = 1e-6 * float(h.diagonal().mean().clamp(min=1e-30)) - min(float(torch.linalg.eigvalsh(h)[0]), 0.0)
        lower = torch.linalg.cholesky(h + shift * torch.eye(len(h), dtype=h.dtype))
    u, s, vt = torch.linalg.svd(w @ lower, full_matrices=False)
    down = torch.linalg.solve_triangular(lower, s[:, None] * vt, upper=False, left=False)
    return Bases(u, down, s.square())


def refit(weight: Tensor, down: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """B [out, r] that brings B A x' nearest to W x: A = ``down`` [r, in] reads the inputs x' that compressed layers
    before it give, gram = E[x' x'^T], cross = E[x x'^T]. SVD-LLM's sequential update; fp64."""
    a, h = down.double(), gram.double()
    normal = _symmetric(a @ h @ a.T)
    normal.diagonal().add_(1e-8 * normal.diagonal().mean().clamp(min=1e-30))
    return torch.linalg.solve(normal, a @ cross.double().T @ weight.double().T).T


def uniform_ranks(shapes: Sequence[tuple[int, int]], keep: float) -> list[int | None]:
    """The rank that keeps the same share of parameters in every layer (out, in); None: a layer stays dense."""
    if keep >= 1:
        return [None] * len(shapes)
    return [max(1, int(keep * out * n / (out + n))) for out, n in shapes]


def evened(
    shapes: Sequence[tuple[int, int]], ranks: Sequence[int | None], keep: float, even: float
) -> list[int | None]:
    """Ranks that lie the share ``even`` of the way from ``ranks`` to `uniform_ranks`, of layers (out, in) that keep as
    much of their parameters either way; they cost no more."""
    found: list[int | None] = []
    for (out, n), chosen, flat in zip(shapes, ranks, uniform_ranks(shapes, keep), strict=True):
        dense = out * n / (out + n)  # factors of this rank cost as much
        from_rank, to_rank = (dense if each is None else each for each in (chosen, flat))
        rank = from_rank + even * (to_rank - from_rank) + 1e-9  # equal ranks stay as they are
        found.append(None if rank >= dense else max(1, int(rank)))
    return found


def choose_ranks(
    shapes: Sequence[tuple[int, int]],
    energies: Sequence[Tensor],
    worth: Sequence[float],
    budget: float,
    lost: Sequence[float] | None = None,
) -> list[int | None]:
    """Ranks of all layers under one ``budget`` of parameters, by gain per parameter; None: the layer stays dense.

    shapes: (out, in); energies: of each layer's bases, falling; worth: of a unit of a layer's energy, while little of
    it is lost; a layer that keeps the share q of its energy is charged -log q times all that it is worth: without bound
    as q falls, so that none is ruined. A rank costs out + in, a dense layer out * in, the most it can cost. On each
    layer's upper concave hull of (cost, value) the steps of steepest gain are bought first: the optimum, but for the
    last step. lost: energy of bases that a layer had and that are gone.
    """
    ranks: list[int | None] = [1 if out * n > out + n else None for out, n in shapes]
    left = budget - sum(out * n if r is None else r * (out + n) for r, (out, n) in zip(ranks, shapes, strict=True))
    if left < 0:
        raise InputError(f"a budget of {budget:.0f} parameters does not hold one basis a layer", "keep more")
    steps: list[tuple[float, int, int | None, int]] = []  # gain per parameter, layer, rank after it, its cost
    for layer, start in enumerate(ranks):
        if start is not None:
            gone = 0.0 if lost is None else lost[layer]
            hull = _hull(*shapes[layer], energies[layer], worth[layer], gone)
            steps += [(gain, layer, rank, cost) for gain, rank, cost in hull if gain > 0]
    stopped: set[int] = set()
    for _, layer, rank, cost in sorted(steps, key=lambda step: -step[0]):
        if layer in stopped:
            continue
        if cost > left:
            stopped.add(layer)
            continue
        ranks[layer], left = rank, left - cost
    return ranks


def _hull(out: int, n: int, energy: Tensor, worth: float, lost: float) -> list[tuple[float, int | None, int]]:
    """Steps (gain per parameter, rank or None for dense, cost) from rank 1 to dense, of falling slope."""
    each, whole, left = out + n, out * n, energy.double().sum()
    total = (left + lost).clamp(min=1e-30)
    most = min((whole - 1) // each, len(energy))
    share = torch.cat([energy[:most].double().cumsum(0), left[None]]) / total
    kept = (worth * total * share.clamp(1e-30, 1).log()).tolist()
    costs = [each * rank for rank in range(1, most + 1)] + [whole]
    corners = [0]
    for i in range(1, len(costs)):
        while len(corners) > 1 and _slope(costs, kept, corners[-1], i) >= _slope(costs, kept, corners[-2], corners[-1]):
            corners.pop()
        corners.append(i)
    return [
        (_slope(costs, kept, a, b), None if b == most else b + 1, costs[b] - costs[a])
        for a, b in itertools.pairwise(corners)
    ]


def _slope(costs: Sequence[int], kept: Sequence[float], a: int, b: int) -> float:
    return (kept[b] - kept[a]) / (costs[b] - costs[a])


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.T) / 2
