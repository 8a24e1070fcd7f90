"""Orthonormal block Hadamard transforms for any width that has a power-of-two or a known Hadamard factor."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from calib.errors import InputError

DENSE = 64  # blocks up to this order are one matrix product; larger ones two small ones


@functools.lru_cache(maxsize=16)
def hadamard_matrix(order: int) -> Tensor:
    """A Hadamard matrix [order, order] of +-1 entries (H H^T = order I, not always symmetric), fp32 on the
    CPU.

    Sylvester's doubling wherever half the order is known, Paley's first construction for order = q + 1 (q
    prime, q % 4 == 3: 12, 20, 24, 44, ...) and his second for order = 2 (q + 1) (q prime, q % 4 == 1: 28, 36,
    76, ...). Raises InputError where none of these reaches the order. The result is shared: do not write to
    it.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        return _matrix(order)


def _matrix(order: int) -> Tensor:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float32)
    if order % 2 == 0 and _known(order // 2):
        return torch.kron(_signs([[1, 1], [1, -1]]), hadamard_matrix(order // 2))
    if order > 2 and order % 4 == 0:
        if _is_prime(order - 1):
            core = torch.zeros(order, order, dtype=torch.float32)
            core[0, 1:], core[1:, 0] = 1.0, -1.0
            core[1:, 1:] = _jacobsthal(order - 1)
            return core + torch.eye(order)
        half = order // 2
        if (half - 2) % 4 == 0 and _is_prime(half - 1):
            core = torch.zeros(half, half, dtype=torch.float32)
            core[0, 1:], core[1:, 0] = 1.0, 1.0
            core[1:, 1:] = _jacobsthal(half - 1)
            return torch.kron(core, _signs([[1, 1], [1, -1]])) + torch.kron(
                torch.eye(half), _signs([[1, -1], [-1, -1]])
            )
    raise InputError(f"no known Hadamard matrix of order {order}", "choose a power of two that divides the width")


def _signs(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def _jacobsthal(q: int) -> Tensor:
    """chi(i - j) over the field of q elements, q prime: 1 for squares, -1 for the rest, 0 on the diagonal."""
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float32)
    return chi[(torch.arange(q)[:, None] - torch.arange(q)[None, :]) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _known(order: int) -> bool:
    """Whether ``hadamard_matrix`` reaches the order, by arithmetic alone."""
    if order in (1, 2):
        return True
    if order < 1 or order % 4:
        return False
    paley = _is_prime(order - 1) or ((order // 2 - 2) % 4 == 0 and _is_prime(order // 2 - 1))
    return paley or _known(order // 2)


def best_block(width: int, largest: int = 128) -> int:
    """The largest power of two up to ``largest`` that divides width (1 where width is odd)."""
    block = 1
    while block * 2 <= largest and width % (block * 2) == 0:
        block *= 2
    return block


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """x [..., n] times the block-diagonal orthonormal H/sqrt(block); n % block == 0. Same shape and dtype."""
    if block == 1:
        return x
    if x.shape[-1] % block:
        raise InputError(f"Hadamard block {block} does not divide {x.shape[-1]} channels", "choose a divisor")
    outer = _outer(block)
    if outer == 1:
        return (x.reshape(-1, block) @ _orthonormal(block, x.device, x.dtype)).view(x.shape)
    # H = H_outer (x) H_inner, H_outer symmetric: x H is H_outer X H_inner, X the block read as [outer, inner]
    left, right = _orthonormal(outer, x.device, x.dtype), _orthonormal(block // outer, x.device, x.dtype)
    rows = (x.reshape(-1, block // outer) @ right).view(-1, outer, block // outer)
    return torch.matmul(left, rows).view(x.shape)


@functools.lru_cache(maxsize=32)
def _orthonormal(order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return hadamard_matrix(order).to(device=device, dtype=torch.float64).mul_(order**-0.5).to(dtype)


@functools.lru_cache(maxsize=32)
def _outer(block: int) -> int:
    """The power of two, near the root of the block, that doubling put on the outside; 1: keep it dense."""
    if block <= DENSE:
        return 1
    outer = 1
    while outer * outer < block // 2 and block % (2 * outer) == 0 and _known(block // (2 * outer)):
        outer *= 2
    return outer
