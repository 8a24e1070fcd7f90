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
from calib.evaluate import Result, class_logits, classification, embed, perplexity, similarity
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
