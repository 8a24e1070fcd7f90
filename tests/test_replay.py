"""A forward repeated from its recorded torch calls gives the model's own bits, or the model itself runs."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import calib
from calib.nn import Prefix, QuantLinear, Replay, use_int8_cache
from calib.nn import replay as module
from calib.nn.program import Program, tensors_in
from tests.families import FAMILIES, batches, build

SCHEMES = ("w8a8-static", "w8a8", "w6a6-static", "w4a16")


def packed(family: str, scheme: str) -> nn.Module:
    options: Any = {"scheme_options": {"weight_group": 16}} if scheme == "w4a16" else {}
    method = "os+" if "a8" in scheme else "rtn"
    result = calib.quantize(build(family), scheme, method, batches(family), progress=False, report=False, **options)
    for each in result.model.modules():
        if isinstance(each, QuantLinear):
            each.set_mode("packed")
    return result.model


def records(replay: Replay) -> list[bool | str]:
    """Of each shape: whether it is repeated, or why not."""
    return [each.trusted if isinstance(each, Program) else str(each) for each in replay._known.values()]


def sentence(length: int = 9, rows: int = 1, padding: int = 0) -> dict[str, Tensor]:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, length - padding :] = 0
    return {"input_ids": torch.randint(3, 120, (rows, length)), "attention_mask": mask}


class Calls:
    """How often a model runs itself."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(self.one_more)

    def one_more(self, *_: object) -> None:
        self.count += 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_classifier_is_repeated_to_the_bit(scheme: str, mode: type) -> None:
    model = packed("bert", scheme)
    replay = Replay(model)
    with mode():
        for turn in range(6):
            for length, rows in ((9, 1), (4, 1), (12, 3)):
                batch = sentence(length, rows, padding=rows - 1)
                want = model(**batch)
                calls = Calls(model)
                got = replay(**batch)
                assert type(got) is type(want) and list(got) == list(want)
                assert torch.equal(got.logits, want.logits)
                assert (calls.count == 0) == (turn > 2)
    assert records(replay) == [True] * 3


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_answers_as_it_does(family: str) -> None:
    model = build(family)
    replay = Replay(model)
    with torch.no_grad():
        for seed in range(5):
            batch = batches(family, count=1, seed=seed)[0]
            options = {} if family in ("bert", "whisper") else {"use_cache": False}
            want, got = model(**batch, **options), replay(**batch, **options)
            assert all(torch.equal(a, b) for a, b in zip(tensors_in(want), tensors_in(got), strict=True))
    assert records(replay) == [True]


def test_what_cannot_be_repeated_runs_the_model() -> None:
    class Odd(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind, self.kept = kind, None
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            if self.kind == "array":
                return x + torch.from_numpy(x.numpy().copy())
            if self.kind == "count":
                return x + self.count.add_(1)
            if self.kind == "rows":
                return x[x[:, 0] > 0].sum(0) / max(1, len(x[x[:, 0] > 0]))
            if self.kind == "hidden":
                with torch._C.DisableTorchFunction():
                    y = x * 2
                return x + y
            if self.kind == "random":
                return x + torch.rand_like(x)
            self.kept = x if self.kept is None else self.kept
            return x + self.kept

    for kind in ("array", "count", "rows", "random", "kept", "hidden"):
        model, replay = Odd(kind).eval(), Replay(Odd(kind).eval())
        with torch.no_grad():
            for turn in range(6):
                x = torch.randn(5, 3)
                torch.manual_seed(turn)
                want = model(x)
                torch.manual_seed(turn)
                got = replay(x)
                assert torch.equal(got, want) or (kind == "count" and turn > 1), "recording counts too"
        assert all(isinstance(each, str) for each in records(replay)) or kind == "kept"


def test_views_of_views_are_one_step() -> None:
    """Taken from what they view in the end, in its memory: what is written through them arrives."""

    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            part = y.view(2, 3, 4).transpose(1, 2)[:, 1:].unflatten(2, (3, 1)).movedim(2, 0)  # five views
            part.mul_(2)
            first, second = (x * 3).view(4, 3, 2).transpose(0, 2).split(1)  # parts stay parts
            return y.sum() + part.square().sum() + (first - second).sum() + x.view(-1)[3:].view(7, 3).sum()

    model = Views().eval()
    replay = Replay(model)
    with torch.no_grad():
        for turn in range(6):
            x = torch.randn(7, 4)[:6] if turn % 2 else torch.randn(9, 4)[3:]  # starts within its memory
            assert torch.equal(replay(x), model(x))
    assert records(replay) == [True]
    (program,) = replay._known.values()
    steps = [step[0].__name__ for part in program._parts for step in part[0]]
    assert steps.count("as_strided") == 2 and "movedim" not in steps and "unflatten" not in steps


def test_values_that_steered_python_are_looked_at_again() -> None:
    model = build("bert")
    replay = Replay(model)
    with torch.no_grad():
        for padding in (0, 0, 0, 0, 3, 0, 2):  # transformers drops a mask that hides nothing
            batch = sentence(9, 2, padding)
            assert torch.equal(replay(**batch).logits, model(**batch).logits)
    assert records(replay) == [True]


def test_a_changed_model_is_recorded_anew() -> None:
    model, other = packed("bert", "w8a8-static"), packed("bert", "w8a8-static")
    replay, batch = Replay(model), sentence()

    def settle() -> None:
        with torch.no_grad():
            for _ in range(5):
                assert torch.equal(replay(**batch).logits, model(**batch).logits)
        assert records(replay) == [True]

    linears = [each for each in model.modules() if isinstance(each, QuantLinear)]
    settle()
    linears[0].set_mode("float")
    settle()
    with torch.no_grad():
        next(each for each in model.modules() if isinstance(each, nn.LayerNorm)).weight.mul_(1.5)  # in place
        model.classifier.bias = nn.Parameter(torch.randn(2))
    settle()
    for each in other.modules():
        if isinstance(each, QuantLinear):
            each.weight_scale.mul_(1.1)
    model.load_state_dict(other.state_dict())
    settle()
    model.to(torch.bfloat16)
    settle()


def test_gradients_training_and_hooks_of_torch_run_the_model() -> None:
    model = build("bert").requires_grad_(True)
    replay, batch = Replay(model), sentence()
    for _ in range(5):
        assert replay(**batch).logits.requires_grad
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(5):
            assert torch.equal(replay(**batch).logits, model(**batch).logits)
    model.train()
    with torch.no_grad():
        for _ in range(5):
            replay(**batch)
    assert not replay._known


def test_threads_share_a_replay_and_copies_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed("bert", "w8a8-static")
    replay, gate = Replay(model), threading.Barrier(8)
    given = [sentence(length) for length in (5, 6, 7, 8)]
    with torch.no_grad():
        wanted = [model(**batch).logits for batch in given]

    def work(_: int) -> bool:
        gate.wait()
        with torch.no_grad():
            return all(
                torch.equal(replay(**batch).logits, want)
                for _ in range(6)
                for batch, want in zip(given, wanted, strict=True)
            )

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert records(replay) == [True] * 4
    for twin in (copy.deepcopy(replay), pickle.loads(pickle.dumps(replay))):
        assert not twin._known
        with torch.no_grad():
            assert all(torch.equal(twin(**given[0]).logits, wanted[0]) for _ in range(4))
    monkeypatch.setattr(module, "SHAPES", 2)
    with torch.no_grad():
        replay(**sentence(11))
    assert len(records(replay)) == 2


def texts(rows: int, padding: int = 0) -> dict[str, Tensor]:
    """A batch of prompts, the last padded on the left."""
    return {key: each.flip(-1) for key, each in sentence(9, rows, padding).items()}


GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 9}


@pytest.mark.parametrize("scheme", ["none", "w8a8-static", "w4a16"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen3", "phi3"])
def test_a_decoder_generates_what_it_does_with_a_cache_of_fixed_length(family: str, scheme: str) -> None:
    model = build(family) if scheme == "none" else packed(family, scheme)
    replay = Replay(model)
    for rows, padding in ((1, 0), (3, 4)):
        batch = texts(rows, padding)
        want = model.generate(**batch, **GREEDY, cache_implementation="static", disable_compile=True)
        for turn in range(3):
            calls = Calls(model.get_submodule("lm_head"))
            assert torch.equal(replay.generate(**batch, **GREEDY), want)
            assert turn == 0 or calls.count == 1, "the prompt is run, its steps are repeated"
    assert records(replay) == [True] * 2
    assert "forward" not in vars(model)


def test_a_step_fills_the_cache_as_the_model_does() -> None:
    model = packed("llama", "w8a8-static")
    replay, ids = Replay(model), sentence(12)["input_ids"]
    with torch.no_grad():
        caches = [StaticCache(model.config, max_cache_len=16) for _ in range(2)]
        for cache in caches:
            model(ids[:, :4], past_key_values=cache)
        for at in range(4, 12):
            step = {"input_ids": ids[:, at : at + 1], "position_ids": torch.tensor([[at]])}
            step["attention_mask"] = (torch.arange(16) <= at).view(1, 1, 1, 16)
            want = model(**step, past_key_values=caches[0])
            got = replay(**step, past_key_values=caches[1])
            assert torch.equal(got.logits, want.logits) and got.past_key_values is caches[1]
            for a, b in zip(module._state(caches[0]), module._state(caches[1]), strict=True):
                assert torch.equal(a, b)
    assert records(replay) == [True]


def test_a_model_behind_a_prefix_generates_from_it() -> None:
    model = build("llama")
    cache, batch = DynamicCache(), texts(2, 3)
    with torch.no_grad():
        model(torch.tensor([[7, 9]]), past_key_values=cache)
    Prefix.from_tensors([7, 9], [x.keys for x in cache.layers], [x.values for x in cache.layers]).install(model)
    replay, want = Replay(model), model.generate(**batch, **GREEDY)
    fixed = StaticCache(model.config, max_cache_len=17)
    with torch.no_grad():
        for at in range(4):  # with the hooks that generate runs by itself
            step = {"input_ids": batch["input_ids"][:, at : at + 1], "position_ids": torch.tensor([[at]] * 2)}
            replay(**step, past_key_values=fixed)
    model.forward = model.forward  # as accelerate wraps one
    for _ in range(3):
        assert torch.equal(replay.generate(**batch, **GREEDY), want)
    assert records(replay)[-2:] == [True] * 2 and "forward" in vars(model)


def test_what_a_generation_may_not_repeat_it_runs() -> None:
    model, batch = build("gemma2"), texts(1)  # sliding windows keep their length as a number
    want = model.generate(**batch, **GREEDY, cache_implementation="static", disable_compile=True)
    replay = Replay(model)
    assert all(torch.equal(replay.generate(**batch, **GREEDY), want) for _ in range(3))
    int8 = use_int8_cache(build("llama"))
    want = int8.generate(**batch, **GREEDY)
    assert torch.equal(Replay(int8).generate(**batch, **GREEDY), want)
