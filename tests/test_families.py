"""Every architecture family through tracing, folding, the one call, and reload."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import calib
from calib.model import make_plan, target_of
from calib.model.linears import find_rewrites
from calib.nn import QuantLinear
from calib.recipe import recipe, scheme
from calib.transforms import SiteTransform, relative_error, undone_on_failure
from tests.families import FAMILIES, batches, build, logits

ALL_SITES = ("norm", "vo", "updown", "fc", "fused")
EXPECTED = {  # site classes that a fold must be found for in each block
    "llama": {"norm", "vo", "updown"},
    "opt": {"norm", "vo", "fc"},
    "bloom": {"norm", "vo"},
    "gpt2": {"norm", "vo"},
    "bert": {"vo"},
    "gpt_neox": {"norm", "vo"},
    "qwen3": {"norm", "vo", "updown"},
    "gemma2": {"norm", "vo", "updown"},
    "phi3": {"norm", "vo", "updown"},
    "mixtral": {"norm", "vo", "updown"},
    "bart": {"vo"},
}


def a_recipe(**options: object):  # type: ignore[no-untyped-def]
    return recipe(scheme("w8a8-static"), "os+", sites=ALL_SITES, **options)


def assert_same(after: torch.Tensor, before: torch.Tensor) -> None:
    assert relative_error(after, before) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fold_leaves_the_logits_unchanged(family: str) -> None:
    model, batch = build(family), batches(family, 1)[0]
    before = logits(model, batch)
    plan = make_plan(model, a_recipe(), batch)
    assert torch.equal(logits(model, batch), before), "planning must put every weight back, bit for bit"
    torch.manual_seed(3)
    kinds = set()
    for block_plan in plan.blocks.values():
        block = model.get_submodule(block_plan.name)
        for site in block_plan.sites:
            target = target_of(block, site)
            transform = SiteTransform(target)
            s = target.tie(torch.rand(site.features) * 3 + 0.3, "amax")
            z = target.tie(torch.randn(site.features), "amax")
            if target.producer is not None:
                kinds.add(site.kind)
                takes = target.producer.takes_shift or (site.producer.shift and site.producer.gain is None)  # type: ignore[union-attr]
                transform.fold(z if takes else None, s)
                transform.fuse(None if takes else z, None)
            else:
                transform.fuse(z, s)
            assert_same(logits(model, batch), before)
    assert kinds == EXPECTED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_site_is_refused_and_undone(family: str) -> None:
    """The next block's norm, a wrong channel map and a missed consumer all fail their proof."""
    model, batch = build(family), batches(family, 1)[0]
    plan = make_plan(model, a_recipe(), batch)
    before = logits(model, batch)
    block_plan = next(iter(plan.blocks.values()))
    block = model.get_submodule(block_plan.name)
    site = next(site for site in block_plan.sites if site.producer is not None)
    wrong = replace(site, producer=replace(site.producer, index=site.producer.index.roll(1)))  # type: ignore[type-var]
    transform = SiteTransform(target_of(block, wrong))
    s = transform.target.tie(torch.rand(site.features) + 0.5, "amax")
    with undone_on_failure(transform, lambda: logits(model, batch), 1e-5) as error:
        transform.fold(None, s)
    transform.remove_hooks()
    assert error[0] > 1e-5
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert", "gpt_neox", "phi3", "bart"])
def test_a_rotation_between_value_and_output_folds_head_by_head(family: str) -> None:
    result = calib.quantize(build(family), "w8a8-static", "rotate", batches(family), prefix="none", progress=False)
    values = [(b.name, s) for b in result.plan.blocks.values() for s in b.sites if s.kind == "vo"]
    assert values
    for name, site in values:
        assert site.head == 16, "the families' heads have 16 channels, and none may be mixed with another's"
        for path in site.consumers:
            module = result.model.get_submodule(f"{name}.{path}")
            assert isinstance(module, QuantLinear) and module.input.hadamard == 1, "folded: nothing runs online"
    assert not [note for note in result.report["notes"] if "undone" in note]


def test_gelu_paths_are_proposed_and_named_as_refused() -> None:
    model, batch = build("gpt2"), batches("gpt2", 1)[0]
    plan = make_plan(model, recipe(scheme("w8a8-static"), "os+", stock=True), batch)
    entry = plan.entries["transformer.h.0.mlp.c_proj"]
    assert entry.status == "quantized"
    assert "changes the block's output" in entry.reason


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name, method", [("w8a8-static", "os+"), ("w4a8", "os+,gptq"), ("w6a6-static", "rotate,os+")])
def test_planned_linears_change_and_no_other_parameter(family: str, name: str, method: str) -> None:
    model, data = build(family), batches(family)
    reference = build(family)
    stock = {k: v.clone() for k, v in reference.state_dict().items()}
    result = calib.quantize(model, name, method, data, sites=ALL_SITES, progress=False)
    planned = set(result.plan.quantized())
    quantized = {n for n, m in result.model.named_modules() if isinstance(m, QuantLinear)}
    assert quantized == planned
    assert planned, "something must be quantized"
    for module_name in planned:
        module = result.model.get_submodule(module_name)
        assert isinstance(module, QuantLinear)
        assert module.codes().unique().numel() > 2, f"{module_name} holds no real codes"
    producers = {
        f"{block.name}.{site.producer.path}"
        for block in result.plan.blocks.values()
        for site in block.sites
        if site.producer
    }
    for key, value in result.model.state_dict().items():
        owner = key.rpartition(".")[0]
        if (
            key in stock
            and value.is_floating_point()
            and owner not in producers
            and not any(key.startswith(p + ".") for p in planned)
        ):
            assert torch.equal(value, stock[key]), f"{key} is in no plan but changed"
    for entry in result.plan.entries.values():
        assert entry.status != "excluded" or entry.reason


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_logits_stay_near_float(family: str) -> None:
    data = batches(family)
    float_logits = logits(build(family), data[0])
    result = calib.quantize(build(family), "w8a8", "os+", data, progress=False)
    got = logits(result.model, data[0])
    plain = calib.quantize(build(family), "w4a4", "rtn", data, progress=False)
    coarse = logits(plain.model, data[0])
    near, far = (got - float_logits).norm(), (coarse - float_logits).norm()
    assert near < 0.25 * far
    assert near < 0.2 * float_logits.norm()


def test_experts_and_conv1d_are_rewritten_exactly() -> None:
    for family, kinds in (("gpt2", {"conv1d"}), ("mixtral", {"parameter"}), ("llama", set())):
        model, batch = build(family), batches(family, 1)[0]
        before = logits(model, batch)
        rewrites = find_rewrites(model, batch)
        assert {r["kind"] for r in rewrites} == kinds
        calib.model.apply_rewrites(model, rewrites)
        assert_same(logits(model, batch), before)


def test_an_expert_no_token_reached_is_still_folded() -> None:
    """Three tokens cannot reach four experts twice over; the fold must be exact for the tokens that come later."""
    model, seen, later = build("mixtral"), batches("mixtral", 1, rows=1, length=2)[0], batches("mixtral", 1)[0]
    before = logits(model, later)
    plan = make_plan(model, a_recipe(), seen)
    for block_plan in plan.blocks.values():
        block = model.get_submodule(block_plan.name)
        for site in block_plan.sites:
            if site.producer is not None:
                target = target_of(block, site)
                SiteTransform(target).fold(None, target.tie(torch.rand(site.features) + 0.5, "amax"))
    assert_same(logits(model, later), before)


def test_routers_stay_float() -> None:
    plan = make_plan(build("mixtral"), a_recipe(), batches("mixtral", 1)[0])
    entry = plan.entries["model.layers.0.mlp.gate.weight"]
    assert entry.status == "excluded" and "experts" in entry.reason


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_reloaded(family: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = batches(family)
    result = calib.quantize(build(family), "w8a8-static", "os+", data, sites=ALL_SITES, progress=False)
    want = logits(result.model, data[0])
    result.save(tmp_path / family, "calib", verified=False)
    loaded = calib.load(tmp_path / family, mode="fake")
    assert_same(logits(loaded, data[0]), want)
    packed = calib.load(tmp_path / family)
    spread = float(want.max() - want.min())
    assert float((logits(packed, data[0]) - want).abs().max()) <= 2e-2 * spread
    assert not any(isinstance(m, nn.Linear) and n in result.plan.quantized() for n, m in packed.named_modules())


@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"attention_bits": 8}])
def test_quantized_attention_is_saved_and_reloaded(options: dict[str, int], tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = batches("llama")
    plain = calib.quantize(build("llama"), "w8a8", "os+", data, progress=False)
    result = calib.quantize(build("llama"), "w8a8", "os+", data, progress=False, scheme_options=options)
    want = logits(result.model, data[0])
    assert not torch.equal(want, logits(plain.model, data[0])), "the option must do something"
    result.save(tmp_path / "out", verified=False)
    assert_same(logits(calib.load(tmp_path / "out", mode="fake"), data[0]), want)


def test_attention_that_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(calib.InputError, match="attention of BloomForCausalLM"):
        calib.quantize(build("bloom"), "w8a8", "os+", batches("bloom"), progress=False, scheme_options={"kv_bits": 8})
