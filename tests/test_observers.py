"""Streaming, merged and batch statistics are the same; masks are obeyed; memory is bounded."""

from __future__ import annotations

import itertools
import multiprocessing
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from calib.engine.state import SiteState
from calib.observers import Moments, Observer, Quantile, Range, RowSample, row_blocks, rows_of


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
    few = RowSample(1, 40)
    few.update(torch.arange(7.0)[:, None])
    assert torch.equal(few.rows[:, 0], torch.arange(7.0))
    assert RowSample(3).rows.shape == (0, 3)


@given(st.integers(0, 999), st.integers(1, 60), st.lists(st.integers(0, 300), max_size=6), st.randoms())
@settings(max_examples=30, deadline=None)
def test_sample_does_not_depend_on_who_saw_what(seed: int, capacity: int, sizes: list[int], random: Any) -> None:
    x = rows(seed, 500)
    whole = RowSample(5, capacity, seed)
    whole.update(x)
    first, parts = 0, []
    for part in cut(x, sizes):
        parts.append((part, first))
        first += len(part)
    random.shuffle(parts)
    several = [RowSample(5, capacity, seed) for _ in range(3)]
    for i, (part, start) in enumerate(parts):
        numbers = torch.arange(start, start + len(part))
        several[i % 3].update(part, start if i % 2 else numbers)
    random.shuffle(several)
    for other in several[1:]:
        several[0].merge(other)
    several[0].merge(several[1])  # rows of the same numbers are the same rows
    assert torch.equal(several[0].number, whole.number) and torch.equal(several[0].rows, whole.rows)
    assert torch.equal(whole.rows, x[whole.number]) and len(whole.rows) == min(capacity, 500)
    assert bool((whole.number.diff() > 0).all())
    other_seed = RowSample(5, 40, seed + 1)
    other_seed.update(x)
    assert not torch.equal(other_seed.number, whole.number)


def test_sample_takes_part_in_arithmetic_after_a_transform() -> None:
    sample = RowSample(5, 10)
    sample.update(rows(0, 100))
    kept = sample.rows.clone()
    sample.rows = (sample.rows - 1) / 2
    assert torch.equal(sample.rows, (kept - 1) / 2)


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


def same_rows(x: Tensor, mask: Tensor | None) -> None:
    positions = torch.arange(x[..., 0].numel()).view(x.shape[:-1])
    got, numbers = [], []
    for block, at in row_blocks(x, mask):
        got.append(block)
        numbers.append(at if isinstance(at, Tensor) else torch.arange(at, at + len(block)))
    assert torch.equal(torch.cat(got), rows_of(x, mask))
    assert torch.equal(torch.cat(numbers), rows_of(positions[..., None], mask)[:, 0])


def test_row_blocks_are_the_rows_with_their_positions() -> None:
    x = torch.randn(4, 700, 640)
    for shape in (x, x.transpose(0, 1), x.transpose(1, 2), x[0], x[0].T, x[0, 0], x[:0], x[:, ::3, :5]):
        mask = torch.rand(shape.shape[:-1]) < 0.6
        same_rows(shape, None), same_rows(shape, mask), same_rows(shape, mask[None])
    assert next(iter(row_blocks(x, None)))[0].data_ptr() == x.data_ptr()
    assert not sum(len(block) for block, _ in row_blocks(x, torch.zeros(4, 700).bool()))


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@given(st.integers(0, 9999), st.sampled_from(DTYPES), st.lists(st.integers(0, 80), max_size=4))
@settings(max_examples=60, deadline=None)
def test_range_is_exact_for_every_sign_dtype_and_stride(seed: int, dtype: torch.dtype, sizes: list[int]) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(90, 12, generator=g)
    x[:, 0].abs_(), x[:, 1].abs_().neg_(), x[:, 2].zero_(), x[:, 3].zero_().neg_(), x[:, 4].relu_()
    x[:, 5] = -x[:, 5].relu()
    x[:40, 6].abs_(), x[40:, 6].abs_().neg_()
    x[torch.randint(90, (1,), generator=g), 7] = torch.inf
    x[torch.randint(90, (1,), generator=g), 8] = -torch.inf
    x = x.to(dtype)
    for laid in (x, x.T.contiguous().T, torch.cat([x, x], 1)[:, :12], x.repeat_interleave(2, 0)[::2]):
        observer = Range(12)
        for part in cut(laid, sizes):
            observer.update(part)
        assert torch.equal(observer.lo, x.float().amin(0)) and torch.equal(observer.hi, x.float().amax(0))
        assert not observer.lo[2:4].signbit().any() and not observer.hi[2:4].signbit().any(), "one zero only"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("make", [torch.randn, torch.rand], ids=["two signs", "one sign"])
def test_nan_is_seen(dtype: torch.dtype, sign: float, make: Any) -> None:
    for where in (0, 300, 511, 520):
        x = make(521, 3).to(dtype)
        x[where, 1] = torch.tensor(float("nan"), dtype=dtype).copysign(torch.tensor(sign, dtype=dtype))
        for parts in ([x], x.split(100)):
            observer = Range(3)
            for part in parts:
                observer.update(part)
            assert bool(observer.lo[1].isnan()) and bool(observer.hi[1].isnan()), where
            assert bool(observer.absmax[[0, 2]].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 50, 1001])
def test_rows_that_are_folded_give_the_same_extremes(dtype: torch.dtype, rows: int) -> None:
    x = torch.randn(rows, 200).to(dtype)
    x[:, 0].abs_(), x[:, 1].abs_().neg_(), x[rows // 2 :, 2].abs_(), x[: rows // 2, 2].abs_().neg_()
    x[rows - 1, 3] = torch.nan
    observer = Range(200)
    for part in x.split(400):
        observer.update(part)
    assert torch.equal(observer.lo.isnan(), torch.arange(200) == 3)
    keep = ~observer.lo.isnan()
    assert torch.equal(observer.lo[keep], x.float().amin(0)[keep])
    assert torch.equal(observer.hi[keep], x.float().amax(0)[keep])


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_any_dtype_stride_and_batch(gram: bool, double: bool, dtype: torch.dtype) -> None:
    x = torch.randn(1300, 300).to(dtype)
    exact = x.double()
    for laid in (x, x.T.contiguous().T, torch.cat([x, x], 1)[:, :300]):
        for size in (7, 600, 1300):
            m = Moments(300, gram, double)
            m.update(laid[:0])
            for part in laid.split(size):
                m.update(part)
                if size == 600:
                    assert m.gram is None or bool(m.gram.isfinite().all())  # reading between updates loses nothing
            tight = 1e-13 if double and (gram or dtype != torch.float64) else 2e-6
            assert float((m.square / exact.square().sum(0) - 1).abs().max()) < tight
            assert float((m.total - exact.sum(0)).abs().max()) < tight * 1300
            assert m.count == 1300
            if m.gram is not None:
                assert torch.equal(m.gram, m.gram.T)
                assert same_gram(m.gram.double(), exact.T @ exact, tight)


class Largest(TorchDispatchMode):
    """The most elements any operation wrote to memory that no tensor held before."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        held = {t.untyped_storage().data_ptr() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in held:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("strided", [False, True])
def test_hot_path_makes_no_large_temporary(dtype: torch.dtype, strided: bool) -> None:
    x = torch.randn(4096, 512).to(dtype)
    x = x.T.contiguous().T if strided else x
    sample = RowSample(512, 256)
    observers = [Range(512), Moments(512), Moments(512, gram=True), Quantile()]
    for observer in observers:
        observer.update(x)
    sample.update(x)
    for observer in (*observers, sample):
        tracemalloc.start()  # numpy's
        with Largest() as largest:
            observer.update(x)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert largest.elements <= 1 << 17 and peak < 1 << 19, type(observer)


def site_state(groups: int = 1) -> SiteState:
    """What observing needs of one."""
    state = SiteState.__new__(SiteState)
    names = [[f"{i}"] for i in range(groups)]
    vars(state).update(
        site=SimpleNamespace(groups=names, features=5),
        range=Range(5),
        sample=RowSample(5, 16, seed=3),
        quantile=Quantile(),
        moments=[Moments(5, gram=True) for _ in names],
        needs_moments=True,
        tokens=[0] * groups,
        on_device=False,
        head=torch.empty(0, 5),
        detail={},
    )
    return state


def test_site_observes_masked_batches_by_number() -> None:
    x, mask = rows(4, 12 * 8).view(12, 8, 5), torch.ones(12, 8).bool()
    mask[::2, 5:] = False
    x[~mask] = 1e6
    one, left, right = site_state(), site_state(), site_state()
    for i in range(0, 12, 2):
        (left, right)[i % 4 // 2].observe(0, x[i : i + 2], mask[i : i + 2], first=i * 8)
    one.observe(0, x, mask, 0)
    left.sample.merge(right.sample)
    assert torch.equal(left.sample.rows, one.sample.rows)
    assert torch.equal(one.sample.rows, x.view(-1, 5)[one.sample.number]) and float(one.range.hi.max()) < 1e5
    assert one.tokens == [int(mask.sum())] and one.moments[0].count == int(mask.sum())
    assert int(one.quantile.counts.sum()) == int(mask.sum()) * 5
    one.observe(0, x, torch.zeros_like(mask), 96)
    one.observe(0, x[:0], None, 96)
    assert one.tokens == [int(mask.sum())] and one.sample.seen == one.tokens[0], "no row, no change"
    by_itself = site_state()
    by_itself.observe(0, x[:6], None), by_itself.observe(0, x[6:], None)
    assert by_itself.sample.seen == 96 and int(by_itself.sample.number.max()) < 96
    one.finish("site")
    experts = site_state(groups=2)
    experts.observe(0, x[mask][:30], mask[:2], first=0), experts.observe(0, x[mask][30:60], mask[:2], first=0)
    assert len(experts.sample.number.unique()) == 16
    experts.finish("experts")
    assert experts.detail["unseen"] == ["1"] and torch.equal(experts.moments[1].gram, experts.moments[0].gram)


def observers() -> dict[str, Observer]:
    return {
        "range": Range(5),
        "sample": RowSample(5, 64, seed=1),
        "routed": RowSample(5, 64, seed=1),
        "small": RowSample(5, 1000, seed=1),
        "quantile": Quantile(),
        "moments": Moments(5),
        "gram": Moments(5, gram=True),
        "double": Moments(5, gram=True, double=True),
    }


def take(made: dict[str, Observer], part: Tensor, first: int) -> None:
    for name, observer in made.items():
        if isinstance(observer, RowSample) and name != "routed":
            observer.update(part, first)
        else:
            observer.update(part)


def one_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    made = observers()
    for i, part in enumerate(rows(7, 700).split(100)):
        if i % 2 == rank:
            take(made, part, 100 * i)
    state = site_state()
    state.observe(0, rows(rank, 50), None, first=50 * rank)
    state.finish("site")
    assert state.tokens == [100] and state.moments[0].count == 100
    for name, observer in made.items():
        observer.all_reduce()
        save_file(observer.state_dict(), folder / f"{name}-{rank}.safetensors")
    nan = Range(2)
    nan.update(torch.tensor([[1.0, torch.nan if rank else 2.0]]))
    nan.all_reduce()
    assert bool(nan.hi[1].isnan()) and float(nan.hi[0]) == 1.0
    dist.destroy_process_group()
    (folder / f"done-{rank}").touch()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_two_processes_are_as_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=one_rank, args=(rank, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        worker.kill()
    assert all((tmp_path / f"done-{rank}").exists() for rank in range(2))
    alone = observers()
    take(alone, rows(7, 700), 0)
    for name, observer in alone.items():
        both = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2)]
        for key, value in observer.state_dict().items():
            assert torch.equal(both[0][key], both[1][key]), (name, key)
            if name == "routed":  # numbered by rank: another sample, as large
                assert both[0][key].shape == value.shape
            elif name in ("range", "sample", "small", "quantile") or key == "count":
                assert torch.equal(both[0][key], value), (name, key)
            else:
                assert torch.allclose(both[0][key], value, rtol=1e-12 if name == "double" else 2e-6)
    counts = [load_file(tmp_path / f"routed-{rank}.safetensors")["number"] for rank in range(2)]
    assert len(counts[0].unique()) == 64 and 10 < int((counts[0] < 1 << 40).sum()) < 54


def test_all_reduce_does_nothing_in_one_process() -> None:
    made = observers()
    take(made, rows(1, 200), 0)
    before = {name: {k: v.clone() for k, v in o.state_dict().items()} for name, o in made.items()}
    for name, observer in made.items():
        observer.all_reduce()
        assert all(torch.equal(v, before[name][k]) for k, v in observer.state_dict().items()), name


@pytest.mark.parametrize("make", [lambda: Range(5), lambda: Moments(5, gram=True), lambda: RowSample(5, 10), Quantile])
def test_state_survives_safetensors(make, tmp_path) -> None:  # type: ignore[no-untyped-def]
    observer: Observer = make()
    observer.update(rows(0, 50))
    save_file({k: v.contiguous() for k, v in observer.state_dict().items()}, tmp_path / "state.safetensors")
    back: Observer = make()
    back.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for key, value in observer.state_dict().items():
        assert torch.equal(value, back.state_dict()[key])
