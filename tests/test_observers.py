"""Streaming, merged and batch statistics are the same; masks are obeyed; memory is bounded."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.observers import Moments, Observer, Quantile, Range, RowSample, rows_of


def rows(seed: int, count: int, n: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, n, generator=g) * torch.tensor([1.0, 10.0, 0.1, 100.0, 1.0]) + 3


def cut(x: Tensor, sizes: list[int]) -> list[Tensor]:
    edges = [0]
    for size in sizes:
        edges.append(min(edges[-1] + size, len(x)))
    return [x[a:b] for a, b in itertools.pairwise(edges)] + [x[edges[-1] :]]


def same_gram(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Entries agree relative to the channels' sizes (off-diagonals may cancel)."""
    size = b.diagonal().sqrt()
    return float(((a - b) / torch.outer(size, size)).abs().max()) < tolerance


@given(st.integers(0, 999), st.lists(st.integers(0, 700), max_size=5))
@settings(max_examples=30, deadline=None)
def test_streamed_and_merged_equal_batch(seed: int, sizes: list[int]) -> None:
    x = rows(seed, 1500)
    whole, streamed, left, right = Range(5), Range(5), Range(5), Range(5)
    m_whole, m_streamed, m_left, m_right = (Moments(5, gram=True, double=True) for _ in range(4))
    q_whole, q_left, q_right = Quantile(), Quantile(), Quantile()
    whole.update(x), m_whole.update(x), q_whole.update(x)
    for i, part in enumerate(cut(x, sizes)):
        if not len(part):
            continue
        streamed.update(part), m_streamed.update(part)
        side = i % 2
        (left, right)[side].update(part), (m_left, m_right)[side].update(part), (q_left, q_right)[side].update(part)
    left.merge(right), m_left.merge(m_right), q_left.merge(q_right)
    for r in (whole, streamed, left):
        assert torch.equal(r.lo, x.amin(0)) and torch.equal(r.hi, x.amax(0)) and r.count == len(x)
    for m in (m_streamed, m_left):
        assert m.gram is not None and m_whole.gram is not None and m.count == len(x)
        assert same_gram(m.gram, m_whole.gram)
        assert torch.allclose(m.mean, x.double().mean(0), rtol=1e-4, atol=1e-4)
    assert torch.equal(q_left.counts, q_whole.counts)


def test_moments_without_gram_and_in_fp32() -> None:
    x = rows(1, 3000)
    for gram in (False, True):
        m = Moments(5, gram=gram)
        m.update(x)
        assert torch.allclose(m.second_moment.float(), x.square().mean(0), rtol=1e-4)
        if gram:
            assert torch.allclose(m.gram, x.T @ x, rtol=1e-4)


@pytest.mark.parametrize("gram", [False, True])
def test_moments_move_through_a_transform(gram: bool) -> None:
    x, z, s = rows(2, 800), torch.randn(5), torch.rand(5) + 0.5
    moved, fresh = Moments(5, gram, double=gram), Moments(5, gram, double=gram)
    moved.update(x), fresh.update((x - z) / s)
    moved.transform(z, s)
    assert torch.allclose(moved.square, fresh.square, rtol=1e-3)
    assert torch.allclose(moved.total, fresh.total, rtol=1e-3, atol=1e-2)
    if gram:
        assert moved.gram is not None and fresh.gram is not None and same_gram(moved.gram, fresh.gram, 1e-4)


def test_sample_is_bounded_uniform_and_mergeable() -> None:
    hits = torch.zeros(400)
    for seed in range(60):
        sample = RowSample(1, capacity=40, seed=seed)
        x = torch.arange(400.0)[:, None]
        for part in x.split(37):
            sample.update(part)
        assert len(sample.rows) == 40 and len(sample.rows.unique()) == 40
        hits[sample.rows[:, 0].long()] += 1
    assert 3.5 < float(hits[:200].mean()) < 8.5 and 3.5 < float(hits[200:].mean()) < 8.5
    a, b = RowSample(1, 40, seed=1), RowSample(1, 40, seed=2)
    a.update(torch.arange(100.0)[:, None]), b.update(torch.arange(100.0, 200.0)[:, None])
    a.merge(b)
    assert len(a.rows) == 40 and bool((a.rows > 100).any()) and bool((a.rows < 100).any())
    few = RowSample(1, 40)
    few.update(torch.arange(7.0)[:, None])
    assert torch.equal(few.rows[:, 0], torch.arange(7.0))


@pytest.mark.parametrize("q", [0.01, 0.5, 0.99, 0.999, 1.0])
def test_quantile_is_within_its_stated_error(q: float) -> None:
    x = torch.cat([torch.randn(200_000), torch.tensor([1e-8, 5000.0])])
    observer = Quantile()
    for part in x.split(10_001):
        observer.update(part)
    exact = float(x.abs().sort().values[max(0, round(q * len(x)) - 1)])
    assert observer.quantile(q) == pytest.approx(exact, rel=0.03)
    assert Quantile().quantile(0.5) == 0.0


def test_masked_rows_never_count() -> None:
    x = torch.randn(2, 6, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    x[~mask] = 1e6
    assert float(rows_of(x, mask).max()) < 100 and len(rows_of(x, mask)) == 8
    assert len(rows_of(x.flatten(0, 1), mask)) == 12, "a mask of another shape does not apply"


def test_nan_is_seen() -> None:
    for where in (0, 300, 511, 520):
        x = torch.randn(521, 3)
        x[where, 1] = float("nan")
        observer = Range(3)
        observer.update(x)
        assert bool(torch.isnan(observer.absmax[1])), where


@pytest.mark.parametrize("make", [lambda: Range(5), lambda: Moments(5, gram=True), lambda: RowSample(5, 10), Quantile])
def test_state_survives_safetensors(make, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file, save_file

    observer: Observer = make()
    observer.update(rows(0, 50))
    save_file({k: v.contiguous() for k, v in observer.state_dict().items()}, tmp_path / "state.safetensors")
    back: Observer = make()
    back.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for key, value in observer.state_dict().items():
        assert torch.equal(value, back.state_dict()[key])
