"""How fast this machine is, measured in two seconds; other machines are described by hand."""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from calib.nn import ActivationQuantizer, QuantLinear
from calib.quantizers import AffineSpec, AnyWeight

GIGA = 1e9
DISK_BYTES = 32 << 20


@dataclass(frozen=True)
class Machine:
    """Sustained speeds. Flops count a multiply and an add as two; GB are 10^9 bytes.

    gemm: flop/s (in 10^9) of a float Linear; packed: of a quantized Linear, quantization of its input included;
    attention: of scaled dot product attention; copy: GB/s read plus written; pointwise: the same through a
    transcendental function (SiLU); read, write: of a file past the page cache; sha: GB/s of hashing; call: seconds to
    start one op; network: GB/s a process sends and receives. baseline: bytes resident before any model is loaded.
    """

    name: str
    gemm: float
    packed: float
    attention: float
    copy: float
    pointwise: float
    read: float
    write: float
    sha: float = 1.0
    call: float = 5e-6
    network: float = 1.0
    baseline: int = 300 << 20

    def with_(self, **changes: object) -> Machine:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Shapes:
    """What the model at hand asks for: rows of a batch, width of its Linears, tokens and width of a head."""

    rows: int = 1024
    width: int = 1024
    tokens: int = 512
    head: int = 64


def probe(
    folder: str | os.PathLike[str] | None = None,
    shapes: Shapes = Shapes(),
    weights: AnyWeight | None = None,
    inputs: AffineSpec | None = None,
    dtype: torch.dtype = torch.float32,
) -> Machine:
    """Measure this machine in about two seconds, at the threads torch is set to.

    folder: whose disk is meant (default: the temporary one). shapes: of the products, up to 1024 rows and channels.
    weights, inputs: the formats of a quantized Linear (default: 8 bits, float inputs); dtype: of a float one.
    """
    found = _measure(folder, shapes, weights or AffineSpec(8), inputs, dtype)
    return found.with_(baseline=resident_bytes())  # now that the libraries are loaded and the tensors are gone


def _measure(
    folder: str | os.PathLike[str] | None,
    shapes: Shapes,
    weights: AnyWeight,
    inputs: AffineSpec | None,
    dtype: torch.dtype,
) -> Machine:
    rows, tokens = min(max(shapes.rows, 64), 1024), min(max(shapes.tokens, 16), 1024)
    group = weights.group_size or 1
    width = -(-min(max(shapes.width, 64), 1024) // group) * group
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x, w = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, width))
        flops = 2 * rows * width * width
        gemm = flops / _seconds(lambda: F.linear(x, w))
        linear = QuantLinear.from_float(
            w,
            None,
            weights.with_(range="minmax" if isinstance(weights, AffineSpec) else "published"),
            ActivationQuantizer(inputs, width),
        )
        linear.set_mode("packed")
        packed = flops / _seconds(lambda: linear(x))
        q = torch.randn(1, 8, tokens, shapes.head, generator=generator).to(dtype)
        attention = 4 * q.numel() * tokens / _seconds(lambda: F.scaled_dot_product_attention(q, q, q))
        a = torch.randn(1 << 22, generator=generator)
        b = torch.empty_like(a)
        copied = 2 * a.nbytes / _seconds(lambda: b.copy_(a))
        curved = 2 * a.nbytes / _seconds(lambda: F.silu(a))
        tiny = torch.zeros(4)
        call = _seconds(lambda: [tiny + 1 for _ in range(100)]) / 100
    read, write = _disk(Path(folder) if folder is not None else Path(tempfile.gettempdir()))
    data = bytes(8 << 20)
    sha = len(data) / _seconds(lambda: hashlib.sha256(data))
    return Machine(
        name=f"{platform.machine()}, {torch.get_num_threads()} threads",
        gemm=gemm / GIGA,
        packed=packed / GIGA,
        attention=attention / GIGA,
        copy=copied / GIGA,
        pointwise=curved / GIGA,
        read=read / GIGA,
        write=write / GIGA,
        sha=sha / GIGA,
        call=call,
    )


def _seconds(run: Callable[[], object], least: float = 0.15, repeats: int = 3) -> float:
    """Seconds of the median call, over ``least`` seconds and three calls at the fewest: as a long run meets them."""
    run()
    times: list[float] = []
    while len(times) < repeats or (sum(times) < least and len(times) < 200):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes a second of reading and writing a file there, past the page cache where the system lets it."""
    data = os.urandom(1 << 20) * (DISK_BYTES >> 20)
    with tempfile.TemporaryFile(dir=folder if folder.is_dir() else None, buffering=0) as file:
        start = time.perf_counter()
        file.write(data)
        os.fsync(file.fileno())
        wrote = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        file.read()
        took = time.perf_counter() - start
    return DISK_BYTES / took, DISK_BYTES / wrote


def resident_bytes() -> int:
    """What this process holds resident now; 300 MiB where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 300 << 20
