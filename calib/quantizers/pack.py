"""Dense bit packing: each row is a little-endian bit stream over int32 words, padded to a whole word.

The layout is that of compressed-tensors' ``pack-quantized``: code q in [-2^(b-1), 2^(b-1)-1] is stored as the
unsigned q + 2^(b-1) in bits [i*b, i*b + b) of its row. Trits q in {-1, 0, 1} go five to a byte, its digits q + 1
in base 3, lowest first: 1.6 bits each. Words are read as bytes, so the host has to be little-endian.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from calib.errors import InputError

BLOCK = 1 << 20  # codes handled at a time: bounds the temporaries and keeps them in cache


def packed_width(columns: int, bits: int) -> int:
    """int32 words of a packed row."""
    return -(-columns * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack signed int8 codes [rows, columns] into int32 [rows, packed_width], on the codes' device.

    Raises InputError for bits outside 1..8 or codes that are not int8. Codes outside the grid lose their high
    bits.
    """
    if codes.dtype != torch.int8:
        raise InputError(f"codes to pack are {codes.dtype}, not int8", "encode first")
    rows, columns = codes.shape
    period, octets, moves = _layout(bits)
    groups, width = -(-columns // period), packed_width(columns, bits) * 4
    offset, mask = 1 << (bits - 1), (1 << bits) - 1
    out = torch.zeros(rows, width, dtype=torch.uint8, device=codes.device)
    for start, stop in _blocks(rows, columns):
        unsigned = codes[start:stop].contiguous().view(torch.uint8).add(offset).bitwise_and_(mask)
        unsigned = F.pad(unsigned, (0, groups * period - columns)).unflatten(1, (groups, period))
        stream = torch.zeros(stop - start, groups, octets, dtype=torch.uint8, device=codes.device)
        for i, byte, bit in moves:
            stream[..., byte] |= unsigned[..., i] << bit
            if bit + bits > 8:
                stream[..., byte + 1] |= unsigned[..., i] >> (8 - bit)
        used = min(groups * octets, width)
        out[start:stop, :used] = stream.flatten(1)[:, :used]
    return out.view(torch.int32)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Signed int8 codes [rows, columns] of ``pack``'s words, on their device."""
    rows = packed.shape[0]
    if packed.dtype != torch.int32 or packed.shape[1] != packed_width(columns, bits):
        raise InputError(
            f"packed {packed.dtype} of width {packed.shape[1]} is not {columns} codes of {bits} bits",
            f"expected int32 words, {packed_width(columns, bits)} a row",
        )
    period, octets, moves = _layout(bits)
    groups = -(-columns // period)
    offset, mask = 1 << (bits - 1), (1 << bits) - 1
    out = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    for start, stop in _blocks(rows, columns):
        stream = packed[start:stop].contiguous().view(torch.uint8)
        if bits == 4:  # one byte to two in 16-bit arithmetic, four times faster than strided writes
            pair = stream.to(torch.int16)
            pair.bitwise_or_(pair << 4).bitwise_and_(0x0F0F)
            out[start:stop] = pair.view(torch.int8)[:, :columns].sub_(offset)
            continue
        missing = groups * octets - stream.shape[1]
        stream = F.pad(stream, (0, missing)) if missing > 0 else stream[:, : groups * octets]
        stream = stream.unflatten(1, (groups, octets))
        unsigned = torch.empty(stop - start, groups, period, dtype=torch.uint8, device=packed.device)
        for i, byte, bit in moves:
            value = stream[..., byte] >> bit
            if bit + bits > 8:
                value |= stream[..., byte + 1] << (8 - bit)
            unsigned[..., i] = value
        signed = unsigned.bitwise_and_(mask).sub_(offset).view(torch.int8)
        out[start:stop] = signed.flatten(1)[:, :columns]
    return out


def trits_width(columns: int) -> int:
    """int32 words of a packed row of trits."""
    return -(-columns // 20)


def pack_trits(codes: Tensor) -> Tensor:
    """Pack int8 codes [rows, columns] of -1, 0, 1 into int32 [rows, trits_width]. Raises InputError for others."""
    if codes.dtype != torch.int8 or (codes.numel() and int(codes.abs().max()) > 1):
        raise InputError("codes to pack as trits are not int8 in -1..1", "encode first")
    rows, columns = codes.shape
    width = trits_width(columns)
    out = torch.empty(rows, width * 4, dtype=torch.uint8, device=codes.device)
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=codes.device)
    for start, stop in _blocks(rows, columns):
        digits = F.pad(codes[start:stop] + 1, (0, width * 20 - columns)).view(torch.uint8)
        out[start:stop] = (digits.unflatten(1, (-1, 5)) * powers).sum(-1, dtype=torch.uint8)
    return out.view(torch.int32)


def unpack_trits(packed: Tensor, columns: int) -> Tensor:
    """int8 codes [rows, columns] of ``pack_trits``'s words, on their device."""
    rows = packed.shape[0]
    if packed.dtype != torch.int32 or packed.shape[1] != trits_width(columns):
        raise InputError(
            f"packed {packed.dtype} of width {packed.shape[1]} is not {columns} trits",
            f"expected int32 words, {trits_width(columns)} a row",
        )
    table = _trits().to(packed.device)
    out = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    for start, stop in _blocks(rows, columns):
        octets = packed[start:stop].contiguous().view(torch.uint8)
        out[start:stop] = table.index_select(0, octets.flatten().int()).view(stop - start, -1)[:, :columns]
    return out


@functools.cache
def _trits() -> Tensor:
    """The five trits of each byte [256, 5], int8; bytes beyond 3^5 - 1 are never written."""
    octet = torch.arange(256)
    return torch.stack([octet // 3**i % 3 - 1 for i in range(5)], dim=1).to(torch.int8)


def _layout(bits: int) -> tuple[int, int, list[tuple[int, int, int]]]:
    """The stream repeats every ``period`` codes, ``octets`` bytes; (code, first byte, first bit) of each."""
    if not 1 <= bits <= 8:
        raise InputError(f"cannot pack {bits} bits", "choose bits in 1..8")
    period = 8 // gcd(8, bits)
    return period, period * bits // 8, [(i, i * bits // 8, i * bits % 8) for i in range(period)]


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // max(columns, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
