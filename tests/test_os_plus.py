"""OS+ against a brute force written from the paper's formulas alone, and the solvers' properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import calib
from calib.methods import OSPlus, SiteView, SmoothQuant
from calib.quantizers import AffineSpec, decode, qparams, weight_range
from calib.recipe import recipe, scheme
from calib.solvers import (
    LinearObjective,
    gptq,
    midpoint,
    scale_for,
    search_exhaustive,
    search_fast,
    smoothing_scale,
)
from calib.solvers.os_plus import exhaustive_grid
from tests.families import batches, build


def site(seed: int, tokens: int = 96, n: int = 24, outputs: int = 20) -> tuple[Tensor, Tensor]:
    """Activations with a few large, off-centre channels, as LayerNorm outputs have them, and a weight."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g)
    worst = torch.randperm(n, generator=g)[:3]
    x[:, worst] = x[:, worst] * 12 + torch.tensor([25.0, -18.0, 6.0])
    return x, torch.randn(outputs, n, generator=g)


def brute_force(x: Tensor, w: Tensor, bits: int, lower: float = 1.0) -> tuple[Tensor, float, Tensor]:
    """z, t, s from arXiv 2304.09145 eqs. 5, 8, 9: static per-tensor symmetric inputs, per-channel weights."""
    top = 2 ** (bits - 1) - 1
    z = (x.max(0).values + x.min(0).values) / 2
    c = x - z
    target, biggest = c @ w.T, c.abs().max().item()
    lower = min(lower, biggest / 100)
    count = max(100, math.floor(biggest / 0.5))
    best = (math.inf, None, None)
    for i in [None, *range(count + 1)]:
        t = math.inf if i is None else biggest - i * ((biggest - lower) / count)
        s = torch.maximum(torch.ones(x.shape[1]), c.abs().max(0).values / t)
        step = (c / s).abs().max() / top
        xq = torch.clamp(torch.round((c / s) / step), -top, top) * step
        ws = w * s
        wstep = ws.abs().max(1, keepdim=True).values / top
        wq = torch.clamp(torch.round(ws / wstep), -top, top) * wstep
        loss = ((xq @ wq.T - target) ** 2).sum(1).mean().item()
        if loss < best[0]:
            best = (loss, t, s)
    return z, best[1], best[2]  # type: ignore[return-value]


def view(x: Tensor, w: Tensor, inputs: AffineSpec, weights: AffineSpec, **can: bool) -> SiteView:
    lo, hi = x.amin(0), x.amax(0)

    def objective(shift: Tensor | None, hadamard: int = 1):  # type: ignore[no-untyped-def]
        z = torch.zeros_like(lo) if shift is None else shift
        loss = LinearObjective(x - z, w, lo - z, hi - z, inputs, weights)
        return loss, loss

    can = {"can_shift": True, "can_scale": True, **can}
    return SiteView("site", "norm", lo, hi, w.abs().amax(0), x.abs().mean(0), objective=objective, **can)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("seed", range(6))
def test_same_pick_as_the_brute_force(bits: int, seed: int) -> None:
    x, w = site(seed)
    inputs, weights = AffineSpec(bits, granularity="tensor"), AffineSpec(bits)
    r = recipe(scheme("w8a8-static"), "os+", search="exhaustive", shift=True)
    found = OSPlus().solve(view(x, w, inputs, weights), r)
    z, t, s = brute_force(x, w, bits)
    assert torch.equal(found.shift, z)
    assert found.detail["threshold"] == pytest.approx(t, rel=1e-12)
    assert found.scale is not None and torch.equal(found.scale, s)


@pytest.mark.parametrize("seed", range(6))
def test_fast_search_is_near_the_exhaustive_one(seed: int) -> None:
    x, w = site(seed, tokens=512, n=64, outputs=48)
    v = view(x, w, AffineSpec(8, granularity="tensor"), AffineSpec(8))
    full = OSPlus().solve(v, recipe(scheme("w8a8-static"), "os+", search="exhaustive")).detail
    fast = OSPlus().solve(v, recipe(scheme("w8a8-static"), "os+")).detail
    assert fast["loss"] <= 1.05 * full["loss"]
    assert full["loss"] < 0.5 * full["identity_loss"], "planted outliers must be worth suppressing"


def test_shift_and_scale_can_be_switched_off_each() -> None:
    x, w = site(0)
    v = view(x, w, AffineSpec(6, granularity="tensor"), AffineSpec(6))
    only_shift = OSPlus().solve(v, recipe(scheme("w6a6-static"), "os+", scale=False, shift=True))
    only_scale = OSPlus().solve(v, recipe(scheme("w6a6-static"), "os+", shift=False))
    assert only_shift.scale is None and torch.equal(only_shift.shift, midpoint(v.lo, v.hi))
    assert only_scale.shift is None and only_scale.scale is not None
    blocked = OSPlus().solve(
        view(x, w, AffineSpec(), AffineSpec(), can_shift=False, can_scale=False), recipe(scheme("w8a8"), "os+")
    )
    assert blocked.shift is None and blocked.scale is None


@given(st.integers(0, 10_000), st.sampled_from([2, 4, 8]))
@settings(max_examples=25, deadline=None)
def test_never_worse_than_identity_and_never_below_one(seed: int, bits: int) -> None:
    x, w = site(seed, tokens=40, n=12, outputs=8)
    loss = LinearObjective(x, w, x.amin(0), x.amax(0), AffineSpec(bits, granularity="tensor"), AffineSpec(bits))
    absmax = x.abs().amax(0)
    for found in (search_fast(absmax, loss, loss), search_exhaustive(absmax, loss)):
        assert found.loss <= found.identity_loss
        assert bool((found.scale >= 1).all())
        assert found.loss == loss(found.scale)
        assert min(score for _, score in found.curve) >= 0


def test_shift_is_kept_only_where_it_helps() -> None:
    """Off-centre channels want it; one-sided ones with most values at zero (GELU, ReLU) do not."""
    x, w = site(0)
    specs = AffineSpec(6, symmetric=False, granularity="tensor"), AffineSpec(6)
    kept = OSPlus().solve(view(x, w, *specs), recipe(scheme("w6a6-static"), "os+"))
    assert kept.shift is not None
    gelu = torch.nn.functional.gelu(torch.randn(400, 24) * torch.linspace(0.5, 3, 24) - 2)
    dropped = OSPlus().solve(view(gelu, w, *specs), recipe(scheme("w6a6-static"), "os+"))
    assert dropped.shift is None
    assert dropped.detail["variants"]["plain"] < dropped.detail["variants"]["shifted"]


def test_small_and_zero_tensors_are_searched_too() -> None:
    small = torch.full((4,), 0.01)
    assert len(exhaustive_grid(small)) == 101 and exhaustive_grid(small)[0] == pytest.approx(0.01)
    zero = search_fast(torch.zeros(4), lambda s: 0.0, lambda s: 0.0)
    assert torch.equal(zero.scale, torch.ones(4))
    assert torch.equal(scale_for(torch.tensor([1.0, 4.0]), 2.0), torch.tensor([1.0, 2.0]))


def test_smoothquant_formula_and_dead_channels() -> None:
    got = smoothing_scale(torch.tensor([16.0, 0.0, 4.0]), torch.tensor([4.0, 1.0, 0.0]), 0.5)
    assert torch.allclose(got, torch.tensor([2.0, 1.0, 1.0]))
    x, w = site(1)
    method = SmoothQuant("0.8")
    found = method.solve(view(x, w, AffineSpec(), AffineSpec()), recipe(scheme("w8a8"), "smoothquant:0.8"))
    assert torch.allclose(found.scale, x.abs().amax(0) ** 0.8 / w.abs().amax(0) ** 0.2)
    with pytest.raises(calib.InputError, match=r"outside 0\.\.1"):
        SmoothQuant("7")


@pytest.mark.parametrize(
    "spec", [AffineSpec(4), AffineSpec(3, symmetric=False), AffineSpec(4, granularity="group", group_size=8)]
)
def test_gptq_beats_rounding_on_its_objective(spec: AffineSpec) -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 8) @ torch.randn(8, 32) + 0.3 * torch.randn(400, 32)
    w = torch.randn(24, 32)
    codes, scale, zero = gptq(w, x.T @ x, spec)
    s, z = qparams(*weight_range(w, spec), spec)
    from calib.quantizers import fake_quantize

    plain = fake_quantize(w, s, z, spec)
    error = lambda v: float(((v - w) @ x.T).square().sum())  # noqa: E731
    assert codes.dtype == torch.int8 and int(codes.min()) >= spec.qmin and int(codes.max()) <= spec.qmax
    assert error(decode(codes, scale, zero, spec)) < 0.6 * error(plain)


def test_gptq_with_white_inputs_is_rounding_and_survives_dead_and_deficient_ones() -> None:
    w, spec = torch.randn(6, 16), AffineSpec(4)
    codes, scale, zero = gptq(w, torch.eye(16), spec, act_order=False, damp=0.0)
    s, _ = qparams(*weight_range(w, spec), spec)
    assert torch.equal(codes.float(), torch.round(w / s).clamp(spec.qmin, spec.qmax))
    one = torch.randn(1, 16)
    one[:, 3] = 0
    codes, scale, zero = gptq(w, one.T @ one, spec)
    assert bool(torch.isfinite(decode(codes, scale, zero, spec)).all())


def test_the_engine_solves_with_the_paper_formulas() -> None:
    """On a tiny OPT (LayerNorm with bias): the folded norm of block 0 carries exactly z and s of the brute force."""
    data = batches("opt", 2)
    stock, model = build("opt"), build("opt")
    seen: list[Tensor] = []
    layer = stock.model.decoder.layers[0]
    layer.fc1.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            stock(**batch)
    options = {"weight_granularity": "tensor", "input_symmetric": True}
    result = calib.quantize(
        model,
        "w8a8-static",
        "os+",
        data,
        search="exhaustive",
        shift=True,
        inputs="float",
        progress=False,
        scheme_options=options,
    )
    x = torch.cat(seen)
    record = result.report["sites"]["model.decoder.layers.0.fc1"]
    assert record["method"] == "os+" and record["proof"] <= 1e-5
    z = midpoint(x.amin(0), x.amax(0))
    absmax = (x - z).abs().amax(0)
    t = record["threshold"]
    s = scale_for(absmax, t) if t < math.inf else torch.ones_like(absmax)
    folded = result.model.model.decoder.layers[0].final_layer_norm
    assert torch.allclose(folded.weight, layer.final_layer_norm.weight / s, rtol=1e-4)
    assert torch.allclose(folded.bias, (layer.final_layer_norm.bias - z) / s, rtol=1e-3, atol=1e-3)


def test_the_objective_can_be_chosen() -> None:
    data = batches("llama")
    runs = [
        calib.quantize(build("llama"), "w8a8-static", "os+", data, objective=o, progress=False)
        for o in ("context", "output")
    ]
    joint, plain = (run.report["sites"]["model.layers.0.self_attn.q_proj+k_proj+v_proj"] for run in runs)
    assert joint["identity_loss"] != plain["identity_loss"], "attention context and linear output are other losses"
