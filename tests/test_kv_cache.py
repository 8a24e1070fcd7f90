"""The int8 key-value cache: the values that the simulated one rounds to, in a quarter of the memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import calib
from calib.errors import InputError
from calib.nn import (
    AttentionFormat,
    Int8Cache,
    Prefix,
    attention,
    attention_modules,
    block_hadamard,
    kv_cache,
    route_attention,
    use_int8_cache,
)
from calib.quantizers import AffineSpec, fake_quantize_dynamic
from tests.families import FAMILIES, batches, build

DECODERS = [name for name in FAMILIES if name not in ("bert", "bart")]
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def simulated(model: PreTrainedModel, prefix: int = 0) -> PreTrainedModel:
    """Floats in the cache, rounded by the attention."""
    twin = copy.deepcopy(model)
    route_attention(twin)
    for module in attention_modules(twin):
        module.calib_attention = AttentionFormat(cache=kv_cache.INT8, prefix=prefix)  # type: ignore[assignment]
    return twin


def stepwise(model: PreTrainedModel, cache: Any = None, first: int = 16) -> tuple[Tensor, Any]:
    """Logits of a prompt and of the tokens behind it, one by one, and the cache."""
    with torch.no_grad():
        out = model(input_ids=IDS[:, :first], past_key_values=cache, use_cache=True)
        found = [out.logits]
        for i in range(first, IDS.shape[1]):
            out = model(input_ids=IDS[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return torch.cat(found, dim=1), out.past_key_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_holds_what_the_grid_says(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 3, 5, 7) * torch.logspace(-3, 2, 5)[:, None]).to(dtype)
    x[0, 0, 0], x[1, 2, 4, 0] = 0.0, 300.0
    rows = kv_cache.pack(x)
    assert rows.dtype == torch.int8 and rows.shape == (2, 3, 5, 12)
    assert torch.equal(kv_cache.unpack(rows, dtype), fake_quantize_dynamic(x, kv_cache.INT8))
    assert kv_cache.unpack(kv_cache.pack(x[:, :, :0]), dtype).shape == (2, 3, 0, 7)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox", "qwen3", "phi3", "mixtral"])
def test_logits_are_those_of_the_simulated_cache(name: str) -> None:
    reference = simulated(build(name))
    want, plain = stepwise(reference)
    got, cache = stepwise(use_int8_cache(copy.deepcopy(reference)))  # type: ignore[arg-type]
    assert torch.equal(got, want)
    assert isinstance(cache.layers[0], kv_cache.Int8Layer) and type(plain) is DynamicCache
    dim = plain.layers[0].keys.shape[-1]
    assert cache.get_seq_length() == plain.get_seq_length() == IDS.shape[1]
    assert kv_cache.cache_bytes(cache) * 4 * dim == kv_cache.cache_bytes(plain) * (dim + kv_cache.BEHIND)
    # by transformers' own attention too, which sums in another order
    stock, _ = stepwise(use_int8_cache(build(name)))  # type: ignore[arg-type]
    assert float((stock - want).abs().max()) <= 1e-3 * float(want.max() - want.min())


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_generates(name: str) -> None:
    """As with floats, but for the rounding: greedy, in beams, padded, and with a cache of the caller's own."""
    model = build(name)
    given, _ = stepwise(model)
    rounded, cache = stepwise(use_int8_cache(model))  # type: ignore[arg-type]
    # on average, for what is rounded may choose another expert
    assert 0 < float((rounded - given).abs().mean()) <= 1e-2 * float(given.max() - given.min())
    own = DynamicCache(config=model.config)
    again, filled = stepwise(model, own)
    assert filled is own and torch.equal(again, rounded)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    for options in ({}, {"num_beams": 3}):
        tokens = model.generate(
            input_ids=IDS, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options
        )
        assert tokens.shape == (2, 30)
    if type(own.layers[-1]) is kv_cache.Int8Layer and name != "gemma2":
        own.crop(-4)
        assert own.get_seq_length() == IDS.shape[1] - 4
        own.batch_repeat_interleave(2)
        assert own.layers[0].keys.shape[0] == 4
    cache.reset()
    assert cache.get_seq_length() == 0


def test_an_encoder_and_decoder_keeps_its_own_keys_in_int8() -> None:
    model = build("bart")
    plain = model.generate(input_ids=IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1)
    use_int8_cache(model)
    out = model.generate(
        input_ids=IDS,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape == plain.shape
    held = out.past_key_values
    assert type(held.self_attention_cache.layers[0]) is kv_cache.Int8Layer
    assert type(held.cross_attention_cache.layers[0]) is not kv_cache.Int8Layer
    assert kv_cache.cache_bytes(held) > kv_cache.cache_bytes(held.self_attention_cache) > 0


def test_a_prefix_stays_float() -> None:
    model = build("llama")
    with torch.no_grad():
        primed = model(input_ids=torch.tensor([[7, 9]]), use_cache=True).past_key_values
    keys, values = ([getattr(layer, part) * 100 for layer in primed.layers] for part in ("keys", "values"))
    reference = simulated(model, prefix=2)
    Prefix.from_tensors((7, 9), keys, values).install(reference)
    Prefix.from_tensors((7, 9), keys, values).install(model)
    want, _ = stepwise(reference)
    model.set_attn_implementation("eager")
    got, cache = stepwise(use_int8_cache(model))  # type: ignore[arg-type]
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
    assert cache.get_seq_length() == IDS.shape[1] + 2
    layer = cache.layers[0]
    assert layer.keys.dtype == torch.int8 and layer.keys.shape[2] == IDS.shape[1]
    key, _ = layer.update(layer.keys.new_zeros(2, 2, 1, 16).float(), layer.keys.new_zeros(2, 2, 1, 16).float())
    assert torch.equal(key[1, :, :2], keys[0][0])


def test_load_offers_it_and_a_checkpoint_may_ask_for_it(tmp_path: Path) -> None:
    data = batches("llama")
    for name, options in (("float", {}), ("rounded", {"kv_bits": 8}), ("four", {"kv_bits": 4})):
        result = calib.quantize(build("llama"), "w8a8", "rtn", data, progress=False, scheme_options=options)
        result.save(tmp_path / name, verified=False)
    cases = {
        ("float", "packed", None): False,
        ("float", "packed", "int8"): True,
        ("rounded", "packed", None): True,
        ("rounded", "fake", None): False,
        ("four", "packed", None): False,
    }
    logits = {}
    for (name, mode, wanted), held in cases.items():
        model: Any = calib.load(tmp_path / name, mode=mode, kv_cache=wanted)  # type: ignore[arg-type]
        logits[name, mode, wanted], cache = stepwise(model)
        assert (type(cache.layers[0]) is kv_cache.Int8Layer) == held
        forms = [m.calib_attention.turned for m in model.modules() if hasattr(m, "calib_attention")]
        assert forms == {"float": [], "rounded": [False] * 2, "four": [True] * 2}[name]
    assert torch.equal(logits["rounded", "packed", None], logits["rounded", "fake", None])
    assert not torch.equal(logits["float", "packed", None], logits["float", "packed", "int8"])


def test_what_it_is_not_for() -> None:
    with pytest.raises(calib.InputError, match="BertForSequenceClassification keeps no key-value cache"):
        use_int8_cache(build("bert"))
    with pytest.raises(calib.InputError, match="unknown kv_cache 'int4'"):
        calib.load("nowhere", kv_cache="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_cache_of_fixed_length_is_refused(family: str) -> None:
    """It would hold floats, and nothing would say so."""
    model = use_int8_cache(build(family))
    with pytest.raises(InputError, match="fixed length"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static", disable_compile=True)


def test_a_cache_can_be_made_by_hand() -> None:
    model = build("gemma2")
    cache = Int8Cache(model.config)
    _, filled = stepwise(model, cache)
    assert filled is cache
    kinds = {type(layer) is kv_cache.Int8Layer for layer in cache.layers}
    assert kinds == {True, False}  # its windowed layers hold 16 tokens and no more


def test_a_turned_cache_loses_less_of_keys_with_a_channel_that_stands_out() -> None:
    four = AffineSpec(4, symmetric=False, granularity="token", dynamic=True)
    keys = torch.randn(2, 3, 40, 64)
    keys[..., 5] += 20
    plain, turned = (AttentionFormat(cache=four, prefix=2, turned=on).keys_or_values(keys) for on in (False, True))
    errors = [float((got - keys)[:, :, 2:, 6:].square().mean()) for got in (plain, turned)]
    assert errors[1] < 0.3 * errors[0]
    assert torch.equal(turned[:, :, :2], keys[:, :, :2])
    odd = torch.randn(1, 2, 4, 7)  # no block divides it
    assert torch.equal(*(AttentionFormat(cache=four, turned=on).keys_or_values(odd) for on in (False, True)))


@pytest.mark.parametrize("block", [2, 8, 64, 128])
def test_what_a_fold_has_turned_is_turned_on_not_back(block: int) -> None:
    turn = block_hadamard(torch.eye(block) * attention._bent_signs(block, block), block)
    twice = block_hadamard(torch.eye(block), block) @ turn
    assert torch.allclose(turn @ turn.T, torch.eye(block), atol=1e-5)
    assert float(twice.abs().amax()) <= (2 / block) ** 0.5 + 1e-5
