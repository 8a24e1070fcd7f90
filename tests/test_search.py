"""The fast threshold search: integer losses are the float simulation's, and its pick is near the whole grid's best."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import calib
from calib.engine.context import ContextObjective
from calib.model import Site
from calib.nn import block_hadamard
from calib.quantizers import AffineSpec, product
from calib.solvers import LinearObjective, rank_coarse, scale_for, search_exhaustive, search_fast
from calib.solvers import objective as module
from calib.solvers.os_plus import exhaustive_grid, fast_grid, ranked_search
from tests.families import batches, build

STATIC = AffineSpec(8, symmetric=False, granularity="tensor")
TOKEN = AffineSpec(8, symmetric=False, granularity="token", dynamic=True)
Rotation = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _integers_wherever_they_are_exact() -> Iterator[None]:
    """Also on a machine where their operator is slow, and a search takes floats."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "_vnni", lambda: True)
        product.int_mm_refusal.cache_clear()
        yield
    product.int_mm_refusal.cache_clear()


def test_a_machine_without_vnni_searches_in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_vnni", lambda: False)
    product.int_mm_refusal.cache_clear()
    assert "plain loop" in product.int_mm_refusal(127)
    assert not objective(*site(1), STATIC, AffineSpec(8)).integer


def site(seed: int, tokens: int = 600, n: int = 64, outputs: int = 320) -> tuple[Tensor, Tensor]:
    """Off-centre activations, some channels much larger, and a weight."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g) + torch.randn(n, generator=g)
    worst = torch.randperm(n, generator=g)[:3]
    x[:, worst] *= 2 + 40 * torch.rand(3, generator=g)
    return x, torch.randn(outputs, n, generator=g)


def objective(
    x: Tensor, w: Tensor, inputs: AffineSpec, weights: AffineSpec, rotate: Rotation | None = None, integer: bool = True
) -> LinearObjective:
    return LinearObjective(x, w, x.amin(0), x.amax(0), inputs, weights, rotate, integer)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("inputs", [STATIC, STATIC.with_(symmetric=True), TOKEN, TOKEN.with_(symmetric=True, bits=4)])
def test_integer_losses_are_the_float_ones(bits: int, granularity: str, rotated: bool, inputs: AffineSpec) -> None:
    x, w = site(bits)
    weights = AffineSpec(bits, granularity=granularity)  # type: ignore[arg-type]
    rotate = functools.partial(block_hadamard, block=32) if rotated else None
    exact, simulated = (objective(x, w, inputs, weights, rotate, integer) for integer in (True, False))
    assert exact.integer and not simulated.integer
    few, simulated_few = exact.sampled(256, 256), simulated.sampled(256, 256)
    absmax = x.abs().amax(0)
    for threshold in (float("inf"), 8.0, 1.5):
        scale = scale_for(absmax, threshold)
        assert exact(scale) == pytest.approx(simulated(scale), rel=1e-4)
        assert few(scale) == pytest.approx(simulated_few(scale), rel=1e-4)


def test_row_blocks_and_odd_sizes_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = site(0, tokens=333, n=50, outputs=37)
    scale = scale_for(x.abs().amax(0), 3.0)
    for inputs in (STATIC, TOKEN):
        whole = objective(x, w, inputs, AffineSpec(8))(scale)
        monkeypatch.setattr(module, "PRODUCT", 1)
        monkeypatch.setattr(module, "CACHED", 7 * 50)
        assert objective(x, w, inputs, AffineSpec(8))(scale) == pytest.approx(whole, rel=1e-5)
        monkeypatch.undo()


def test_formats_without_an_integer_product_are_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = site(1)
    for weights in (AffineSpec(4, granularity="group", group_size=32), AffineSpec(8, symmetric=False)):
        assert not objective(x, w, STATIC, weights).integer
    assert not LinearObjective(x, w, x.amin(0), x.amax(0), None, AffineSpec(8)).integer
    assert not objective(x, w, STATIC.with_(dynamic=True), AffineSpec(8)).integer, "one range spans all rows of a batch"
    monkeypatch.setattr(module, "int_mm_refusal", lambda limit: "refused")
    assert not objective(x, w, STATIC, AffineSpec(8)).integer


def test_a_subsample_estimates_the_whole_and_keeps_the_massive_tokens() -> None:
    x, w = site(2, tokens=2048)
    x[1234] *= 100
    weights = AffineSpec(8)
    whole = objective(x, w, STATIC, weights)
    few, absmax = whole.sampled(256, 256), x.abs().amax(0)
    assert few.x.shape == (256, 64) and few.weight.shape == (256, 64)
    assert bool((few.x == x[1234]).all(1).any())
    for threshold in (float("inf"), 100.0, 10.0):
        assert few(scale_for(absmax, threshold)) == pytest.approx(whole(scale_for(absmax, threshold)), rel=0.2)
    small = objective(*site(3, tokens=100, outputs=40), STATIC, weights)
    assert small.sampled(256, 256) is small
    assert whole.sampled(4096).weight is whole.weight
    tensor = objective(x, w, STATIC, AffineSpec(8, granularity="tensor")).sampled(256, 256)
    assert tensor.weight is not None and len(tensor.weight) == len(w), "one range spans all outputs"


@given(seed=st.integers(0, 10_000), bits=st.sampled_from([8, 8, 6]), symmetric=st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_pick_is_within_one_percent_of_the_grids_best(seed: int, bits: int, symmetric: bool) -> None:
    x, w = site(seed)
    absmax, inputs = x.abs().amax(0), STATIC.with_(symmetric=symmetric)
    loss = objective(x, w, inputs, AffineSpec(bits))
    few, top = loss.few(), float(absmax.amax())
    grid = [top * k / 100 for k in range(100, 0, -1)]
    full = search_exhaustive(absmax, loss, grid)
    fast = search_fast(absmax, few, loss, grid=grid)
    assert fast.loss <= 1.01 * full.loss
    assert fast.loss <= fast.identity_loss == full.identity_loss
    assert fast.threshold in {float("inf"), *grid}
    assert torch.equal(fast.scale, scale_for(absmax, fast.threshold)) and fast.loss == loss(fast.scale)


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_a_misleading_ranking_never_costs_more_than_no_scale(seed: int, noise: float) -> None:
    """s = 1 is scored exactly, whatever the ranking says; its own best is scored too."""
    g = torch.Generator().manual_seed(seed)
    table: dict[float, float] = {}

    def lossy(scale: Tensor) -> float:
        return table.setdefault(float(scale.sum()), float(torch.rand((), generator=g)))

    def exact(scale: Tensor) -> float:
        return 1.0 + noise * (lossy(scale) - 0.5) if float(scale.amax()) > 1 else 1.0

    absmax = torch.rand(16, generator=g) * 10 + 0.1
    found = search_fast(absmax, lossy, exact)
    assert found.loss <= found.identity_loss == 1.0
    assert found.threshold == float("inf") or found.loss < 1.0
    assert [t for t, _ in found.curve] == sorted((t for t, _ in found.curve), reverse=True)


def test_a_unimodal_curve_gives_the_grids_own_best() -> None:
    absmax = torch.linspace(0.1, 50, 32)
    for grid in (fast_grid(absmax), exhaustive_grid(absmax), [50 * k / 100 for k in range(100, 0, -1)]):
        for target in (0.9, 7.0, 31.0):
            asked: list[float] = []

            def loss(scale: Tensor, target: float = target, asked: list[float] = asked) -> float:
                threshold = 50 / float(scale.amax())
                asked.append(threshold)
                return abs(threshold - target)

            found = search_fast(absmax, loss, loss, grid=grid)
            best = min(grid, key=lambda t: abs(t - target))
            assert found.threshold == pytest.approx(best)
            assert len(asked) <= len(grid) + 10, "each is ranked once, and few are scored"


def test_a_coarse_ranking_that_is_known_is_not_asked_again() -> None:
    absmax, asked = torch.linspace(0.1, 50, 32), list[float]()

    def loss(scale: Tensor) -> float:
        asked.append(float(scale.amax()))
        return abs(50 / asked[-1] - 7.0)

    coarse = rank_coarse(absmax, loss)
    found = search_fast(absmax, loss, lambda scale: loss(scale), coarse)
    ranked = asked[: len(found.curve)]
    assert len(coarse) == 17 and len(set(ranked)) >= len(ranked) - 1, "only s = 1 is also the largest threshold's"


class Gated(nn.Module):
    """Two Linears whose outputs meet before a third."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(48, 96, bias), nn.Linear(48, 96, bias), nn.Linear(96, 48)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("inputs", [STATIC, TOKEN])
def test_the_context_objective_is_the_same_in_integers(
    bias: bool, shifted: bool, inputs: AffineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block = nn.ModuleDict({"mlp": Gated(bias)}).requires_grad_(False)
    x = site(4, tokens=120, n=48)[0].view(2, 60, 48)
    part = Site("norm", [["mlp.gate", "mlp.up"]], 48, context="mlp", stops=["mlp.down"])
    mask = torch.rand(2, 60) > 0.2
    runs = [lambda: block["mlp"](x), lambda: block["mlp"](x[:, :30])]
    lo, hi = x.flatten(0, 1).aminmax(dim=0)
    shift = (lo + hi) / 2 if shifted else None
    z = 0.0 if shift is None else shift
    losses = []
    for exact in (True, False):
        if not exact:
            monkeypatch.setattr(module, "int_mm_refusal", lambda limit: "refused")
        context = ContextObjective(block, part, runs, [mask, mask[:, :30]])
        arguments = (shift, lo - z, hi - z, inputs, [AffineSpec(8)] * len(part.consumers))
        few, loss = context.prepare(*arguments)
        absmax = torch.maximum(z - lo, hi - z)
        whole = ContextObjective(block, part, runs, [mask, mask[:, :30]], few=2).prepare(*arguments)[0]
        first = ContextObjective(block, part, runs[:1], [mask]).prepare(*arguments)[1]
        for scale in (torch.ones_like(absmax), scale_for(absmax, 5.0)):
            assert loss(scale) == pytest.approx(whole(scale), rel=1e-12), "the few calls are part of the many"
            assert few(scale) == first(scale)
        losses.append([loss(scale_for(absmax, t)) for t in (float("inf"), 5.0, 1.0, 5.0)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][1] == losses[0][3], "buffers carry nothing from one candidate to the next"
    assert "forward" not in vars(block["mlp"].gate), "the Linears are themselves again"


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_engines_fast_search_is_near_its_exhaustive_one(family: str) -> None:
    """On every site of a tiny model; the two grids differ, so the fast pick may also be the better one."""
    data, found = batches(family), {}
    for search in ("fast", "exhaustive"):
        result = calib.quantize(
            build(family), "w8a8-static", "os+", data, search=search, inputs="float", prefix="none", progress=False
        )
        found[search] = result.report["sites"]
    ratios = []
    for name, fast in found["fast"].items():
        assert fast["loss"] <= fast["identity_loss"], name
        assert len(fast["curve"]) >= 16
        ratios.append(fast["loss"] / found["exhaustive"][name]["loss"])
    assert math.prod(ratios) ** (1 / len(ratios)) <= 1.05
    assert max(ratios) <= 1.3, "losses of so few tokens and channels are jagged"


def test_a_plateau_does_not_fill_the_short_list() -> None:
    """Thresholds below every channel scale all alike: thirty equal ranks, and the best is ranked behind them."""
    values = [32.0 - i for i in range(32)]
    exact = dict.fromkeys(values, 1.0) | {30.0: 0.9}
    ranks = {value: 1.0 + 1e-4 * value for value in values} | {30.0: 1.04, float("inf"): 2.0}

    def scale_of(value: float) -> Tensor:
        return torch.tensor([value])

    def rank(scale: Tensor) -> float:
        return ranks[float("inf") if float(scale) == 1.0 else float(scale)]

    def score(scale: Tensor) -> float:
        return 2.0 if float(scale) == 1.0 else exact[float(scale)]

    found = ranked_search(values[:-1], scale_of, rank, score, keep=4, slack=0.1)
    assert (found.threshold, found.loss, found.identity_loss) == (30.0, 0.9, 2.0)
