"""A turn of the residual stream: x -> x R for one orthogonal R, in everything that writes and reads it.

Writers take W -> R^T W and b -> b R, embeddings E -> E R. A norm's gain and bias move into its readers first, for
they are not the same in another basis: W -> W diag(g), b -> b + W beta; then W -> W R. Where a reader has no bias (a
head, mostly) the norm keeps one, (beta / g) R. What the model computes stays, and no product is added. Sources:
SliceGPT (arXiv 2401.15024), QuaRot (2404.00456), SpinQuant (2405.16406).

Those turn LayerNorm, which subtracts the mean, into another norm. Here R then keeps the vector of ones, R 1 = 1: a mean
over channels is as it was, and so is the model's class.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calib.errors import InputError
from calib.nn.hadamard import hadamard_matrix

LEAST_GAIN = 1e-3  # of the largest


def rotation(width: int, keeps_mean: bool, generator: torch.Generator) -> Tensor:
    """R [width, width], orthogonal, fp64: a Hadamard matrix with random signs where the width has one, else random.

    keeps_mean: R 1 = 1; the complement of the ones is then turned at random.
    """
    if keeps_mean:
        inner = torch.eye(width, dtype=torch.float64)
        inner[1:, 1:] = _random(width - 1, generator)
        normal = torch.full((width,), -(width**-0.5), dtype=torch.float64)
        normal[0] += 1
        if float(normal.norm()) > 0:
            normal /= normal.norm()
        mirror = torch.eye(width, dtype=torch.float64) - 2 * torch.outer(normal, normal)  # takes e_1 to 1 / sqrt(width)
        return mirror @ inner @ mirror
    try:
        matrix = hadamard_matrix(width).double() * width**-0.5
    except InputError:
        return _random(width, generator)
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    return signs[:, None] * matrix


def _random(width: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


@torch.no_grad()
def turn_writer(module: nn.Module, turn: Tensor) -> None:
    """An embedding's rows, or a Linear's outputs and bias."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    exact = weight.double()
    weight.copy_(exact @ turn if isinstance(module, nn.Embedding) else turn.T @ exact)
    if isinstance(bias, Tensor):
        bias.copy_(bias.double() @ turn)


@torch.no_grad()
def turn_reader(module: nn.Linear, turn: Tensor, gain: Tensor | None = None, bias: Tensor | None = None) -> None:
    """A Linear that reads the stream, through a norm of gain and bias [width] where they are given."""
    exact = module.weight.double()
    if bias is not None and bool(bias.any()):
        moved = exact @ bias.double()
        old = moved if module.bias is None else module.bias.double() + moved
        module.bias = nn.Parameter(old.to(module.weight.dtype), requires_grad=False)
    if gain is not None:
        exact = exact * gain.double()
    module.weight.copy_(exact @ turn)


@torch.no_grad()
def free_norm(
    module: nn.Module, offset: float, bias: str | None, turn: Tensor, keeps_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gain and bias [width], fp64, for the readers of a norm, whose own gain is then 1 everywhere.

    keeps_bias: the norm keeps its bias, in units of the gain and turned, and the readers get none; not where a gain is
    too near 0 to divide by.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    gain = weight.double() + offset
    weight.fill_(1.0 - offset)
    if bias is None:
        return gain, None
    beta = getattr(module, bias)
    found = beta.double().clone()
    if keeps_bias and bool((gain.abs() >= LEAST_GAIN * gain.abs().amax()).all()):
        beta.copy_((found / gain) @ turn)
        return gain, None
    beta.zero_()
    return gain, found
