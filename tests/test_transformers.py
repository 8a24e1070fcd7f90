"""calib's checkpoints through transformers' doors, after ``import calib``: load, pad, cache, generate, save again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import calib
from calib.export import hf
from calib.nn import QuantLinear
from tests.families import batches, build

CAUSAL = ("llama", "gpt2", "mixtral", "gemma2")  # plain, transposed Conv1D, experts as one parameter, sliding window
IDS = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> a folder in calib's format, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("saved") / family
            scheme = "w4a8" if family == "gpt2" else "w8a8-static"
            result = calib.quantize(
                build(family), scheme, "os+", batches(family), samples=8, seq_len=24, prefix="none", progress=False
            )
            result.save(made[family], "calib", verified=False)
        return made[family]

    return folder


@pytest.mark.parametrize("family", CAUSAL)
def test_left_padding_and_cache_change_nothing(family: str, saved: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(family), device_map="cpu")
    assert any(isinstance(m, QuantLinear) and m.mode == "packed" for m in model.modules())
    padded = torch.cat([torch.full((1, 4), 3), IDS], dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    with torch.no_grad():
        alone = model(input_ids=IDS).logits
        span = float(alone.max() - alone.min())
        both = model(
            input_ids=torch.cat([padded, padded.flip(1)]),
            attention_mask=torch.cat([mask, torch.ones_like(mask)]),
            position_ids=torch.cat([(torch.arange(13) - 4).clamp(min=0)[None], torch.arange(13)[None]]),
        ).logits
        cache, steps = None, []
        for token in IDS[0]:
            out = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    # other shapes are summed in another order: a code next to a boundary may flip, no more
    assert float((both[0, 4:] - alone[0]).abs().max()) <= 1e-2 * span
    assert float((torch.cat(steps, 1) - alone).abs().max()) <= 1e-2 * span


@pytest.mark.parametrize("family", CAUSAL)
def test_generate_batched_is_generate_alone(family: str, saved: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(family))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    short = IDS[:, :5]
    rows = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), IDS])
    mask = torch.ones_like(rows)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 8, "do_sample": False}
    together = model.generate(rows, attention_mask=mask, **settings)[:, 9:]
    apart = [model.generate(each, attention_mask=torch.ones_like(each), **settings) for each in (short, IDS)]
    assert torch.equal(together[0], apart[0][0, 5:]) and torch.equal(together[1], apart[1][0, 9:])


@pytest.mark.parametrize("family", [*CAUSAL, "bert"])
def test_saved_again_is_the_same_bits(family: str, saved: Any, tmp_path: Path) -> None:
    kind: Any = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    kind.from_pretrained(saved(family)).save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / "model.safetensors") for folder in (saved(family), tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(first[k].dtype == again[k].dtype and torch.equal(first[k], again[k]) for k in first)
    batch = batches(family, 1)[0]
    with torch.no_grad():
        answers = [
            hf.set_mode(kind.from_pretrained(folder), "fake")(**batch).logits
            for folder in (saved(family), tmp_path / "again")
        ]
    assert torch.equal(*answers)


def test_the_headless_class_runs_the_same_linears(saved: Any) -> None:
    headless = AutoModel.from_pretrained(saved("llama"))
    whole = AutoModelForCausalLM.from_pretrained(saved("llama"))
    with torch.no_grad():
        assert torch.equal(whole.lm_head(headless(IDS).last_hidden_state), whole(IDS).logits)
