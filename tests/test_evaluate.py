"""Perplexity, classification and similarity against by-hand computations and known figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from calib.data import read_labelled
from calib.errors import CalibError, DataError, InputError, ModelError, NumericsError
from calib.evaluate import (
    Continuations,
    Result,
    agreement,
    bootstrap95,
    class_logits,
    classification,
    continuations,
    embed,
    paired,
    perplexity,
    similarity,
)
from model_zoo import load_model

Tokenizer = PreTrainedTokenizerFast
TEXT = "A line of text.\n" * 40


class Toy(nn.Module):
    """Logits (and hidden states) looked up by token; no context."""

    def __init__(self, outputs: int, *, vocab: int = 258, limit: int = 512, pooled: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, outputs)
        self.pooled = pooled
        self.config = SimpleNamespace(max_position_embeddings=limit)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        assert not torch.is_grad_enabled()
        assert not self.training
        hidden = self.table(input_ids)
        if self.pooled and attention_mask is not None:
            weight = attention_mask.unsqueeze(-1)
            return SimpleNamespace(logits=(hidden * weight).sum(1) / weight.sum(1))
        return SimpleNamespace(logits=hidden, last_hidden_state=hidden)


def test_perplexity_is_the_mean_over_windows(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Toy(258).train()
    (tmp_path / "t.txt").write_text(TEXT)
    result = perplexity(model, byte_tokenizer, tmp_path / "t.txt", windows=5, seq_len=33, batch_size=2)
    ids = torch.tensor(byte_tokenizer(TEXT, add_special_tokens=False)["input_ids"])[:165].view(5, 33)
    logp = model.table(ids).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    losses = -logp.mean(dim=1).double().detach()
    assert result.outputs is not None
    torch.testing.assert_close(result.outputs, losses, rtol=1e-5, atol=1e-6)
    assert result.value == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    low, high = stats.t.interval(0.95, 4, loc=losses.mean().item(), scale=losses.std().item() / math.sqrt(5))
    assert result.ci95 == pytest.approx((math.exp(low), math.exp(high)), rel=1e-5)
    assert model.training  # restored
    from_text = perplexity(model, byte_tokenizer, TEXT, windows=5, seq_len=33)
    assert from_text.value == pytest.approx(result.value, rel=1e-6)


def test_strided_windows_score_each_token_with_context(byte_tokenizer: Tokenizer) -> None:
    text = "".join(chr(97 + (7 * i * i + i) % 26) for i in range(200))
    ids = torch.tensor(byte_tokenizer(text)["input_ids"])
    model = Toy(258)
    result = perplexity(model, byte_tokenizer, text + "\n", windows=5, seq_len=32, stride=8)
    ids = torch.tensor(byte_tokenizer(text, add_special_tokens=False)["input_ids"])
    logp = model.table(ids).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    assert result.outputs is not None
    for k in range(5):  # the last 8 tokens of the window that begins at 8 k
        expected = -logp[8 * k + 23 : 8 * k + 31].mean()
        assert float(result.outputs[k]) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(InputError, match="stride of 32"):
        perplexity(model, byte_tokenizer, text + "\n", windows=2, seq_len=32, stride=32)
    with pytest.raises(DataError, match="use --windows 22"):
        perplexity(model, byte_tokenizer, text + "\n", windows=30, seq_len=32, stride=8)


def _result(task: str, outputs: Tensor, truth: Tensor | None = None) -> Result:
    return Result(task, "m", 0.0, None, len(outputs), 0.0, None, outputs, truth)


def test_bootstrap_agrees_with_theory() -> None:
    losses = torch.randn(60, dtype=torch.float64) * 0.3 + 3
    found = bootstrap95(_result("perplexity", losses))
    half = 1.96 * float(losses.std()) / math.sqrt(60)
    assert found == pytest.approx((math.exp(losses.mean() - half), math.exp(losses.mean() + half)), rel=0.02)
    right = torch.arange(100) < 80
    logits = torch.stack([right.float(), 1 - right.float()], 1)
    low, high = bootstrap95(_result("classification", logits, torch.zeros(100))) or (0, 0)
    exact = stats.binomtest(80, 100).proportion_ci(method="wilson")
    assert low == pytest.approx(exact.low, abs=0.02) and high == pytest.approx(exact.high, abs=0.02)
    x = torch.randn(80, dtype=torch.float64)
    y = x + torch.randn(80, dtype=torch.float64)
    low, high = bootstrap95(_result("similarity", x, y)) or (0, 0)
    assert low < stats.spearmanr(x, y).statistic < high and 0.1 < high - low < 0.4
    assert bootstrap95(_result("classification", logits[:50], torch.zeros(50))) is None, "they do not vary"


def test_paired_tests_see_what_single_intervals_cannot() -> None:
    losses = torch.randn(40, dtype=torch.float64) + 3
    worse = losses + 0.02 + 0.01 * torch.randn(40, dtype=torch.float64)
    found = paired(_result("perplexity", worse), _result("perplexity", losses))
    assert found["p"] < 0.001 and found["ci95"][0] < 0.02 < found["ci95"][1] and found["ci95"][0] > 0.01
    same = paired(_result("perplexity", losses), _result("perplexity", losses))
    assert same == {"difference": 0.0, "ci95": None, "p": 1.0, "test": "permutation of items"}
    few = [torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 4, 6, 8])]
    assert paired(_result("perplexity", few[0]), _result("perplexity", few[1]))["p"] == pytest.approx(2 / 16)  # exact

    truth = torch.zeros(20)
    right, other = torch.zeros(20), torch.zeros(20)
    other[:6], right[6] = 1, 1  # six that only the first gets right, one that only the second does
    results = [_result("classification", torch.stack([1 - w, w], 1), truth) for w in (right, other)]
    found = paired(*results)
    assert (found["won"], found["lost"]) == (6, 1) and found["difference"] == pytest.approx(0.25)
    assert found["p"] == pytest.approx(2 * (1 + 7) / 2**7)  # both tails of a fair coin thrown seven times

    scores = torch.randn(50, dtype=torch.float64)
    good, bad = scores + 0.1 * torch.randn(50), torch.randn(50, dtype=torch.float64)
    found = paired(_result("similarity", good, scores), _result("similarity", bad, scores))
    assert found["p"] < 0.01 and found["ci95"][0] > 0
    with pytest.raises(InputError, match="cannot be paired"):
        paired(_result("perplexity", losses), _result("perplexity", losses[:5]))


def test_generation_agrees_with_itself_only(shared: Path) -> None:
    model, tokenizer = load_model(shared / "models/stories260k", progress=False)
    story = "Once upon a time there was a little girl named Lily. She loved to play with her toys.\n" * 40
    wanted = continuations(model, tokenizer, story, prompts=4, prompt_len=16, new_tokens=8)
    assert wanted.tokens.shape == (4, 8)
    alone = model.generate(wanted.prompts[1:2], do_sample=False, max_new_tokens=8, min_new_tokens=8)
    assert torch.equal(alone[0, 16:], wanted.tokens[1])
    same = agreement(model, wanted)
    assert same.value == 1 and same.detail["forced_top1"] == 1 and same.as_dict()["forced_top1"] == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * parameter.std() * torch.randn_like(parameter))
    other = agreement(model, wanted)
    assert other.value < other.detail["forced_top1"] < 1
    assert other.outputs is not None and other.value == pytest.approx(float(other.outputs.mean()))
    changed = wanted.tokens.clone()
    changed[:, 6] += 1
    model, _ = load_model(shared / "models/stories260k", progress=False)
    assert agreement(model, Continuations(wanted.prompts, changed)).value == pytest.approx(6 / 8)
    with pytest.raises(ModelError, match="does not generate"):
        continuations(Toy(258), tokenizer, story, prompts=1, prompt_len=8)


def test_result_is_json(byte_tokenizer: Tokenizer) -> None:
    result = perplexity(Toy(258), byte_tokenizer, TEXT, windows=1, seq_len=32)
    held = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert list(held) == ["task", "metric", "value", "ci95", "n", "seconds", "peak_rss_mib"]
    assert held["ci95"] is None  # one window has no spread
    assert held["peak_rss_mib"] is None or held["peak_rss_mib"] > 10
    assert isinstance(result, Result)


def test_perplexity_errors(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    bad = Toy(258)
    with torch.no_grad():
        bad.table.weight[byte_tokenizer.convert_tokens_to_ids("x")] = math.nan
    cases: list[tuple[type[CalibError], nn.Module, str | Path, dict[str, int], str]] = [
        (DataError, Toy(258), TEXT, {"windows": 40, "seq_len": 64}, "use --windows 10"),
        (DataError, Toy(258), tmp_path / "no.txt", {}, "no file"),
        (InputError, Toy(258, limit=16), TEXT, {"seq_len": 32}, "limit of 16"),
        (InputError, Toy(258), TEXT, {"windows": 0}, "measure nothing"),
        (NumericsError, bad, "\n" * 32 + "x" * 64, {"windows": 3, "seq_len": 32}, "window 2"),
        (ModelError, Toy(3, pooled=False), TEXT, {"windows": 2, "seq_len": 32}, "no next-token"),
    ]
    for kind, model, text, options, says in cases:
        if kind is ModelError:
            model = nn.Sequential(model)
            model.forward = lambda input_ids: SimpleNamespace()  # type: ignore[method-assign, assignment]
        with pytest.raises(kind, match=says):
            perplexity(model, byte_tokenizer, text, **options)


def test_classification_by_hand(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Toy(2, pooled=True)
    rows = [("good", 1), ("bad film", 0), ("a much longer sentence", 1), ("x", 0), ("y", 1)]
    file = tmp_path / "c.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    result = classification(model, byte_tokenizer, file, batch_size=2)
    expected = torch.stack([model.table(torch.tensor(byte_tokenizer(t)["input_ids"])).mean(0) for t, _ in rows])
    assert result.outputs is not None
    torch.testing.assert_close(result.outputs, expected.detach())
    right = int((expected.argmax(1) == torch.tensor([label for _, label in rows])).sum())
    assert result.value == right / 5
    interval = stats.binomtest(right, 5).proportion_ci(method="wilson")
    assert result.ci95 == pytest.approx((interval.low, interval.high), abs=1e-6)
    file.write_text("sentence\tlabel\nfine\t2\n")
    with pytest.raises(DataError, match="label 2, the model has 2 classes"):
        classification(model, byte_tokenizer, file)
    with pytest.raises(ModelError, match="class logits"):
        class_logits(Toy(2), byte_tokenizer, ["fine"])


def test_similarity_by_hand(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Toy(8)
    pairs = [
        ("a b", "a b", 5.0),
        ("one", "two", 1.0),
        ("three", "tree", 3.5),
        ("q", "zzzz", 0.2),
        ("hi", "hi!", 4),
    ]
    file = tmp_path / "s.tsv"
    file.write_text("".join(f"g\tf\ty\t{i}\t{s}\t{a}\t{b}\n" for i, (a, b, s) in enumerate(pairs)))
    result = similarity(model, byte_tokenizer, file, batch_size=3)
    one, two = (
        torch.stack([model.table(torch.tensor(byte_tokenizer(p[k])["input_ids"])).mean(0) for p in pairs])
        for k in (0, 1)
    )
    cosines = torch.cosine_similarity(one, two).detach()
    assert result.outputs is not None
    torch.testing.assert_close(result.outputs, cosines)
    assert result.value == pytest.approx(stats.spearmanr(cosines, [p[2] for p in pairs]).statistic)
    assert result.ci95 is not None
    assert result.ci95[0] < result.value < result.ci95[1]
    with pytest.raises(DataError, match="several scores"):
        file.write_text("g\tf\ty\t1\t2\ta\tb\n")
        similarity(model, byte_tokenizer, file)
    with torch.no_grad():
        model.table.weight.fill_(math.nan)
    with pytest.raises(NumericsError):
        embed(model, byte_tokenizer, ["text"])


def test_grad_mode_survives_errors(byte_tokenizer: Tokenizer) -> None:
    for call in (
        lambda: class_logits(Toy(2), byte_tokenizer, ["x"]),
        lambda: perplexity(Toy(2), byte_tokenizer, TEXT),
    ):
        with pytest.raises((CalibError, IndexError)):
            call()
        assert torch.is_grad_enabled()


def test_stories_model(shared: Path) -> None:
    model, tokenizer = load_model(shared / "models/stories260k", progress=False)
    story = "Once upon a time there was a little girl named Lily. She loved to play with her toys.\n" * 40
    result = perplexity(model, tokenizer, story, windows=4, seq_len=128)
    assert 1 < result.value < 20
    noise = perplexity(model, tokenizer, shared / "data/wikitext-2/test.txt", windows=2, seq_len=128)
    assert noise.value > 2 * result.value  # trained on stories, not on Wikipedia


def test_sst2_model_sample(shared: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(shared / "models/minilm-l6-sst2", progress=False)
    sentences, labels = read_labelled(shared / "data/sst2/test.tsv")
    file = tmp_path / "sample.tsv"
    rows = zip(sentences[:100], labels[:100], strict=True)
    file.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    result = classification(model, tokenizer, file)
    assert result.value >= 0.75
    alone = class_logits(model, tokenizer, sentences[:100], batch_size=1)
    assert result.outputs is not None
    torch.testing.assert_close(result.outputs, alone, rtol=1e-4, atol=1e-4)  # padding does not count


@pytest.mark.slow
def test_known_accuracy(shared: Path) -> None:
    model, tokenizer = load_model(shared / "models/minilm-l6-sst2", progress=False)
    result = classification(model, tokenizer, shared / "data/sst2/test.tsv")
    assert round(100 * result.value, 2) == pytest.approx(85.09, abs=0.12)  # one sentence is 0.11


@pytest.mark.slow
def test_known_similarity(shared: Path) -> None:
    model, tokenizer = load_model("minilm-l6", progress=False)
    result = similarity(model, tokenizer, shared / "data/stsb/sts-test.tsv")
    assert result.value == pytest.approx(0.8203, abs=2e-4)


@pytest.mark.slow
def test_known_perplexity(shared: Path) -> None:
    model, tokenizer = load_model("smollm2-135m", progress=False)
    result = perplexity(model, tokenizer, shared / "data/wikitext-2/test.txt")
    assert result.value == pytest.approx(25.615, abs=0.01)
