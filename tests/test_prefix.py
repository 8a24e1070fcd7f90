"""A float prefix in the cache is the same as the prefix tokens in the text; calibration with it is consistent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import calib
from calib.nn import Prefix
from tests.families import batches, build, logits

CAUSAL = ["llama", "opt", "bloom", "gpt2", "gpt_neox", "qwen3", "phi3", "mixtral"]


def primed(family: str, tokens: list[int]) -> PreTrainedModel:
    """The float model behind a prefix taken from itself."""
    model, cache = build(family), DynamicCache()
    with torch.no_grad():
        model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    Prefix.from_tensors(tokens, [x.keys for x in cache.layers], [x.values for x in cache.layers]).install(model)
    return model


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("tokens", [[7], [7, 9, 11]])
def test_prefix_in_the_cache_equals_prefix_in_the_text(family: str, tokens: list[int]) -> None:
    ids = batches(family, 1)[0]["input_ids"]
    head = torch.tensor([tokens]).expand(len(ids), -1)
    want = logits(build(family), {"input_ids": torch.cat([head, ids], 1)})[:, len(tokens) :]
    model = primed(family, tokens)
    assert torch.allclose(logits(model, {"input_ids": ids}), want, atol=2e-5)
    masked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.allclose(logits(model, masked), want, atol=2e-5)
    assert torch.allclose(logits(model, masked), want, atol=2e-5), "a forward must leave nothing behind"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_generate_starts_after_the_prefix(family: str) -> None:
    ids = batches(family, 1, rows=2, length=6)[0]["input_ids"]
    head = torch.tensor([[7]]).expand(2, -1)
    plain = build(family)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    whole = torch.cat([head, ids], 1)
    want = plain.generate(whole, attention_mask=torch.ones_like(whole), **kwargs)[:, 7:]
    model = primed(family, [7])
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        got = model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs, **options)[:, 6:]
        assert torch.equal(got, want)


def test_generate_with_left_padding() -> None:
    model = primed("llama", [7])
    ids = batches("llama", 1, rows=1, length=6)[0]["input_ids"]
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)[:, 6:]
    padded = torch.cat([torch.zeros(1, 4, dtype=ids.dtype), ids], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=ids.dtype), torch.ones_like(ids)], 1)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(padded, attention_mask=mask, **kwargs, **options)[:, 10:], want)


def with_sink(family: str) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """A model whose first position carries a massive activation in one down_proj channel, as real decoders' do."""
    model = build(family)
    layer = model.model.layers[0].mlp
    with torch.no_grad():
        layer.up_proj.weight[5].mul_(40)
        layer.gate_proj.weight[5].mul_(40)
    return model, batches(family)


@pytest.mark.parametrize("method", ["os+", "hadamard,os+", "os+,gptq"])
def test_calibrated_with_a_prefix_then_saved_and_reloaded(method: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, data = with_sink("llama")
    result = calib.quantize(model, "w8a8-static", method, data, prefix=(7,), progress=False)
    prefix = result.model.calib_prefix
    assert isinstance(prefix, Prefix) and prefix.tokens == (7,) and len(prefix.keys) == 2
    assert bool((prefix.values.abs().amax((1, 2, 3)) > 0).all())
    float_model, _ = with_sink("llama")
    cache = DynamicCache()
    with torch.no_grad():
        float_model(torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    assert torch.allclose(prefix.keys[0], cache.layers[0].keys[0], rtol=1e-3, atol=1e-4), "keys are the float model's"
    want = logits(result.model, data[0])
    result.save(tmp_path / "out", "calib", verified=False)
    assert torch.allclose(logits(calib.load(tmp_path / "out", mode="fake"), data[0]), want, atol=1e-4)
    proofs = [site["proof"] for site in result.report["sites"].values() if "proof" in site]
    assert proofs and max(proofs) <= 1e-4, "this model amplifies rounding, and no fold may be lost to that"
    assert not any("undone" in note for note in result.plan.notes)


@pytest.mark.parametrize("family", CAUSAL)
def test_every_decoder_is_calibrated_with_a_prefix(family: str) -> None:
    """Blocks take their cache by name, under two names, or by place (GPT-2)."""
    tokens = [7, 9]
    result = calib.quantize(build(family), "w8a8", "os+", batches(family), prefix=tuple(tokens), progress=False)
    ids = batches(family, 1, seed=5)[0]["input_ids"]
    head = torch.tensor([tokens]).expand(len(ids), -1)
    want = logits(build(family), {"input_ids": torch.cat([head, ids], 1)})[:, 2:]
    assert float((logits(result.model, {"input_ids": ids}) - want).norm() / want.norm()) < 0.15
    cache = DynamicCache()
    with torch.no_grad():
        build(family)(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    assert torch.allclose(result.model.calib_prefix.keys[0], cache.layers[0].keys[0], rtol=1e-3, atol=1e-4)


def test_prefix_is_refused_where_there_is_no_cache() -> None:
    for family in ("bert", "bart"):
        with pytest.raises(calib.InputError, match="prefix"):
            calib.quantize(build(family), "w8a8-static", "os+", batches(family), prefix=(7,), progress=False)


def test_float_rows_narrow_the_static_ranges_and_lose_nothing() -> None:
    data = batches("opt")
    reference = logits(build("opt"), data[0])
    plain = calib.quantize(build("opt"), "w8a8-static", "rtn", data, inputs="float", progress=False)
    spared = calib.quantize(build("opt"), "w8a8-static", "rtn", data, inputs="float", float_rows=0.1, progress=False)
    for name, site in plain.report["sites"].items():
        assert spared.report["sites"][name]["input_scale"] <= site["input_scale"] * 1.001
    error = [float((logits(r.model, data[0]) - reference).norm()) for r in (plain, spared)]
    assert error[1] < error[0]


def test_padding_changes_nothing() -> None:
    """Right-padded rows give the statistics, and so the model, of the same rows alone."""
    short = batches("bert", 1, rows=4, length=10)[0]
    ids = torch.cat([short["input_ids"], torch.full((4, 6), 99)], 1)
    mask = torch.cat([short["attention_mask"], torch.zeros(4, 6, dtype=torch.long)], 1)
    alone = calib.quantize(build("bert"), "w8a8-static", "os+", [short], progress=False)
    padded = calib.quantize(
        build("bert"), "w8a8-static", "os+", [{"input_ids": ids, "attention_mask": mask}], progress=False
    )
    a, b = logits(alone.model, short), logits(padded.model, short)
    coarse = calib.quantize(build("bert"), "w4a4", "rtn", [short], progress=False)
    assert float((a - b).norm()) < 0.05 * float((a - logits(coarse.model, short)).norm())
    for name, site in alone.report["sites"].items():  # thresholds that cost the same may change places
        for key, rel in (("identity_loss", 0.02), ("loss", 0.1)):
            assert site[key] == pytest.approx(padded.report["sites"][name][key], rel=rel), (name, key)


def test_float_inputs_and_batch_order() -> None:
    data = batches("opt", 3)
    one = calib.quantize(build("opt"), "w8a8-static", "rtn", data, inputs="float", progress=False)
    two = calib.quantize(
        build("opt"), "w8a8-static", "rtn", [data[2], data[0], data[1]], inputs="float", progress=False
    )
    for (name, a), (_, b) in zip(one.model.state_dict().items(), two.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), f"{name}: min-max results do not depend on data order"
