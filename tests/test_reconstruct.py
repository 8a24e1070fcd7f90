"""Learned rounding: never worse on windows held out, the same bits again, and what it must not touch."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import calib
from calib.engine import learning
from calib.errors import InputError, NumericsError
from calib.nn import ActivationQuantizer, LowRankLinear, QuantLinear
from calib.quantizers import AffineSpec
from calib.recipe import recipe
from calib.recipe import scheme as scheme_of
from calib.tuning import FoldableSite, reconstruct
from calib.tuning.reconstruct import LearnedLinear, LearnedSite
from tests.families import batches, build

SPECS = {
    "channel": AffineSpec(4),
    "group": AffineSpec(3, granularity="group", group_size=8),
    "asymmetric": AffineSpec(4, symmetric=False, granularity="group", group_size=16),
}


def quantized(spec: AffineSpec, inputs: AffineSpec | None = None, seed: int = 0) -> tuple[QuantLinear, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 32, generator=g)
    quantizer = ActivationQuantizer(inputs, 32)
    return QuantLinear.from_float(weight, torch.randn(24, generator=g), spec, quantizer), weight


@pytest.mark.parametrize("name", SPECS)
def test_it_starts_at_the_codes_that_are_there(name: str) -> None:
    module, weight = quantized(SPECS[name])
    spec = SPECS[name]
    other = (module.codes() + torch.randint(-1, 2, (24, 32))).clamp(spec.qmin, spec.qmax).to(torch.int8)
    zero = module.weight_zero_point
    module.set_codes(other, module.weight_scale, torch.zeros(()) if zero is None else zero)
    x = torch.randn(5, 32)
    want = module.set_mode("float")(x)
    learning = LearnedLinear(module, weight, LearnedSite(module.input, FoldableSite(("",)), ()))
    assert torch.allclose(learning(x), want, atol=1e-5), "a solver's codes, not round to nearest"
    assert torch.equal(learning.learned().codes(), other)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("inputs", [None, AffineSpec(8, symmetric=False, granularity="token", dynamic=True)])
def test_learned_rounding_lowers_the_error_and_is_exported_as_computed(name: str, inputs: AffineSpec | None) -> None:
    module, weight = quantized(SPECS[name], inputs)
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(32, 32, generator=g)
    xs = [torch.randn(64, 32, generator=g) @ mix for _ in range(8)]
    float_layer = nn.Linear(32, 24)
    float_layer.weight.data, float_layer.bias.data = weight, module.bias.clone()  # type: ignore[union-attr]
    block = nn.Sequential(module).requires_grad_(False)
    with torch.no_grad():
        targets = [float_layer(x) for x in xs]
    found = reconstruct(
        block, {"0": weight}, lambda i: block(xs[i]), targets.__getitem__, [None] * 8, steps=60, seed=0, held=1
    )
    assert found.taken and found.after < 0.98 * found.before
    with torch.no_grad():
        after = float((block(xs[0]) - targets[0]).square().sum(-1).mean())
    assert after == pytest.approx(found.after)
    assert isinstance(block[0], QuantLinear) and not any(p.requires_grad for p in block.parameters())
    codes = block[0].codes()
    assert int(codes.min()) >= SPECS[name].qmin and int(codes.max()) <= SPECS[name].qmax


def test_what_does_not_help_is_undone() -> None:
    module, weight = quantized(SPECS["channel"])
    codes, scale = module.codes().clone(), module.weight_scale.clone()
    xs = [torch.randn(16, 32) for _ in range(8)]
    block = nn.Sequential(module)
    with torch.no_grad():
        targets = [block(x) for x in xs]  # already perfect
    found = reconstruct(block, {"0": weight}, lambda i: block(xs[i]), targets.__getitem__, [None] * 8, 10, 0)
    assert not found.taken and found.after >= found.before
    assert torch.equal(module.codes(), codes) and torch.equal(module.weight_scale, scale)


EVERYTHING = ("rounding", "clipping", "inputs", "scale", "shift")


@pytest.mark.parametrize("fused", [False, True])
def test_inputs_scale_and_shift_are_learned_and_folded(fused: bool) -> None:
    """A norm, two linears that share its output on a bad static grid: what is learned is what the modules then hold."""
    g = torch.Generator().manual_seed(0)
    spec = AffineSpec(4, symmetric=False, granularity="tensor")
    norm, xs = nn.LayerNorm(32), [torch.randn(64, 32, generator=g) for _ in range(8)]
    norm.bias.data = torch.randn(32, generator=g)
    floats, linears = {}, []
    for name in ("a", "b"):
        module, floats[name] = quantized(SPECS["group"], spec, seed=ord(name))
        module.input.scale, module.input.zero_point = torch.tensor([0.7]), torch.tensor([1], dtype=torch.int32)
        linears.append(module)
    block = nn.ModuleDict({"norm": norm, "a": linears[0], "b": linears[1]}).requires_grad_(False)

    def run(i: int) -> Tensor:
        x = block["norm"](xs[i])
        return torch.cat([block["a"](x), block["b"](x)], -1)

    with torch.no_grad():
        targets = [torch.cat([nn.functional.linear(norm(x), floats[n], block[n].bias) for n in "ab"], -1) for x in xs]
    folded = []

    def fold(shift: Tensor | None, scale: Tensor | None) -> None:
        assert shift is not None and scale is not None
        given = torch.zeros(32) if fused else shift  # the inputs subtract it themselves
        norm.bias.data, norm.weight.data = (norm.bias - given) / scale, norm.weight / scale
        folded.append((shift, scale))

    def learned(learn: tuple[str, ...]) -> float:
        found = reconstruct(
            block, floats, run, targets.__getitem__, [None] * 8, 80, 0, held=1, learn=learn,
            sites=[FoldableSite(("a", "b"), fold, takes_shift=not fused)],
        )  # fmt: skip
        with torch.no_grad():
            after = float((run(0) - targets[0]).square().sum(-1).mean())
        assert found.taken and after == pytest.approx(found.after, rel=1e-4)
        return found.after / found.before

    if fused:
        for module in linears:
            module.input.register_buffer("shift", torch.full((32,), 0.1))
            module.bias = module.bias + floats["a" if module is linears[0] else "b"] @ module.input.shift
    first = learned(EVERYTHING)
    assert first < 0.9 and len(folded) == 1 and float((folded[0][1] - 1).abs().max()) > 0.001
    assert torch.equal(block["a"].input.scale, block["b"].input.scale) and float(block["a"].input.scale) != 0.7


def test_a_fold_that_undoes_what_was_learned_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is the block's error after folding: here the norm takes ten times what it should."""
    found = learning.foldable

    def broken(state: Any) -> FoldableSite:
        site = found(state)
        fold = None if site.fold is None else lambda shift, scale: state.target.producer.module.weight.mul_(10)
        return replace(site, fold=fold)

    monkeypatch.setattr(learning, "foldable", broken)
    with pytest.raises(NumericsError, match="undid it"):
        calib.quantize(
            build("llama"), "w4a8-static", "os+", batches("llama", 8), refine=12, learn=EVERYTHING, prefix="none",
            progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "bert", "gpt_neox"])
def test_everything_learned_survives_saving(family: str, tmp_path: Path) -> None:
    result = calib.quantize(
        build(family), "w4a8-static", "os+", batches(family, 8), tmp_path / "out", refine=12, learn=EVERYTHING,
        prefix="none", progress=False,
    )  # fmt: skip
    plain = calib.quantize(build(family), "w4a8-static", "os+", batches(family, 8), prefix="none", progress=False)
    for name, site in result.report["sites"].items():
        assert site["refined"][1] <= site["refined"][0], name
        for path, module in result.model.named_modules():
            if any(path.endswith(f".{own}") and name.startswith(path[: -len(own)]) for own in site["consumers"]):
                assert site["input_scale"] == pytest.approx(float(module.input.scale)), (
                    "the report's is the learned one"
                )
    batch = batches(family, 1)[0]
    want, found, start = (m(**batch).logits for m in (build(family), calib.load(tmp_path / "out"), plain.model))
    assert (found - want).norm() < (start - want).norm()


def test_a_learned_prefix_stays_float() -> None:
    """Folding what was learned moves no key or value: they are the float model's, not those of the rounded block."""
    learned, plain = (
        calib.quantize(build("llama"), "w4a8-static", "os+", batches("llama", 8), prefix=(7,), progress=False, **more)
        for more in ({"refine": 12, "learn": EVERYTHING}, {})
    )
    assert any(site["refined"][1] < site["refined"][0] for site in learned.report["sites"].values())
    found, want = learned.model.calib_prefix, plain.model.calib_prefix
    assert torch.allclose(found.keys, want.keys, rtol=1e-4, atol=1e-6)
    assert torch.allclose(found.values[0], want.values[0], rtol=1e-4, atol=1e-6)  # later ones bear another v -> o fold


@pytest.mark.parametrize("family, method", [("llama", "gptq"), ("bert", "os+"), ("mixtral", "rtn")])
def test_refining_is_repeatable_and_never_worse_on_held_out_windows(family: str, method: str) -> None:
    first, second = (
        calib.quantize(
            build(family), "w4a8-static", method, batches(family, 8), refine=12, prefix="none", progress=False
        )
        for _ in range(2)
    )
    a, b = first.model.state_dict(), second.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    undone = {note.split(":")[0] for note in first.report["notes"] if "held-out error" in note}
    for name, site in first.report["sites"].items():
        before, after = site["refined"]
        assert after < before or any(name.startswith(f"{block}.") for block in undone), name


@pytest.mark.parametrize(
    "scheme, options, said",
    [
        ("w4a16", {"learn": ("rounding",)}, "refine is 0"),
        ("w2a16", {"refine": 4}, "w2a16 has another"),
        ("none", {"refine": 4}, "none has none"),
        ("w4a16", {"learn": ("inputs",), "refine": 4}, "w4a16 has no static inputs to learn"),
        ("w4a8", {"learn": ("rounding", "shift"), "refine": 4}, "w4a8 has no static inputs to learn"),
    ],
)
def test_what_cannot_be_learned_is_refused(scheme: str, options: dict[str, Any], said: str) -> None:
    method, more = ("low_rank", {"keep": 0.5}) if scheme == "none" else ("rtn", {})
    with pytest.raises(InputError, match=said):
        recipe(scheme_of(scheme), method, **options, **more)
    if scheme != "none":
        with pytest.raises(InputError, match=said):
            calib.quantize(build("llama"), scheme, "auto", batches("llama", 4), **{"refine": 0, **options})


def test_auto_learns_what_it_is_told_to() -> None:
    result = calib.quantize(
        build("llama"), "w4a8-static", "auto", batches("llama", 12), refine=4, learn=("rounding", "inputs"),
        progress=False,
    )  # fmt: skip
    assert result.recipe.learn == ("rounding", "inputs") and result.recipe.refine == 4


def test_an_excluded_block_has_nothing_to_learn() -> None:
    result = calib.quantize(
        build("llama"), scheme_of("w4a8", exclude=[r".*layers\.0\..*"]), "rtn", batches("llama", 8), refine=8,
        progress=False,
    )  # fmt: skip
    refined = {name for name, site in result.report["sites"].items() if "refined" in site}
    assert refined and all(".layers.1." in name for name in refined)


def test_truncated_linears_learn_too() -> None:
    """Their factors' codes are what moves, and the block's error falls."""
    common: dict[str, Any] = {"keep": 0.7, "select": "uniform", "progress": False}
    learned, plain = (
        calib.quantize(build("llama"), "w4a8", "low_rank,gptq", batches("llama", 8), **common, refine=steps)
        for steps in (20, 0)
    )
    first, other = (r.model.get_submodule("model.layers.0.mlp.up_proj") for r in (learned, plain))
    assert isinstance(first, LowRankLinear) and not torch.equal(first.down.codes(), other.down.codes())
    assert all(site["refined"][1] < site["refined"][0] for site in learned.report["sites"].values())


def test_what_no_site_learns_is_a_note() -> None:
    learn = ("rounding", "scale", "shift")  # behind norms only, and here every norm comes after its sum
    result = calib.quantize(
        build("bert"), "w4a8-static", "rtn", batches("bert", 4), refine=4, learn=learn, progress=False
    )
    assert any(note.endswith("no site here learns scale or shift") for note in result.report["notes"])


@pytest.mark.parametrize(
    "method, options", [("os+,rtn,low_rank", {"rank": 2}), ("os+,rtn,low_rank", {"keep": 0.7, "select": "uniform"})]
)
def test_inputs_that_others_read_are_not_moved(method: str, options: dict[str, Any]) -> None:
    """A side branch, or a truncated neighbour, reads the input too: shift and scale stay, and the model is no worse."""
    common = {"prefix": "none", "progress": False, **options}
    learned, plain = (
        calib.quantize(build("llama"), "w4a8-static", method, batches("llama", 8), **common, **more).model
        for more in ({"refine": 12, "learn": EVERYTHING}, {})
    )
    batch = batches("llama", 1)[0]
    want, found, start = (m(**batch).logits for m in (build("llama"), learned, plain))
    assert (found - want).norm() < 1.02 * (start - want).norm()
    norms = [name for name in plain.state_dict() if "layers.0" in name and "norm" in name]
    assert norms and all(torch.equal(plain.state_dict()[name], learned.state_dict()[name]) for name in norms)


def small_task(batches: int, tokens: int) -> tuple[nn.Sequential, Tensor, list[Tensor], list[Tensor]]:
    """A block of one quantized linear, its float weight, inputs and what it should make of them."""
    module, weight = quantized(SPECS["channel"])
    g = torch.Generator().manual_seed(2)
    xs = [torch.randn(tokens, 32, generator=g) for _ in range(batches)]
    targets = [nn.functional.linear(x, weight, module.bias) for x in xs]
    return nn.Sequential(module).requires_grad_(False), weight, xs, targets


@pytest.mark.parametrize("tokens, runs", [(64, 8), (512, 1), (700, 1), (4, 14)])
def test_a_step_sees_enough_tokens(tokens: int, runs: int) -> None:
    """512, or all that there is; of sixteen batches two judge."""
    block, weight, xs, targets = small_task(16, tokens)
    learned: list[int] = []

    def run(i: int) -> Tensor:
        if torch.is_grad_enabled():
            learned.append(i)
        return block(xs[i])

    reconstruct(block, {"0": weight}, run, targets.__getitem__, [None] * 16, steps=3, seed=0, held=2)
    assert len(learned) == 3 * runs and not {0, 1} & set(learned)
    assert all(len(set(learned[s : s + runs])) == runs or tokens == 64 for s in range(0, 3 * runs, runs))


def test_what_gets_worse_is_given_up_at_half(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["calib.tuning.reconstruct"]  # the package's attribute of this name is the function
    monkeypatch.setattr(module, "FACTOR_RATE", 50.0)  # scales run to the ends of their range
    block, weight, xs, targets = small_task(8, 64)
    codes = block[0].codes().clone()
    found = reconstruct(
        block, {"0": weight}, lambda i: block(xs[i]), targets.__getitem__, [None] * 8, steps=20, seed=0, held=1
    )
    assert not found.taken and found.steps == 10 and torch.equal(block[0].codes(), codes)
