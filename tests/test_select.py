"""Choosing calibration data: features, weights and draws against plain references; pools of every kind; bad input."""

from __future__ import annotations

import copy
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tokenizers import models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import calib
from calib import cli
from calib.data import calibration_data, coverage, generate_windows, like, select
from calib.data.encode import Merges, Stretches, cuts_at_spaces, encoded, encoder
from calib.data.features import PRIOR, Features, learn_pieces, ngrams, word_ids
from calib.data.pool import Pool, cut
from calib.data.select import _RECORD, _Draw, _drop_repeats
from calib.data.weights import effective_size, gumbel, log_ratio, temperature
from calib.errors import CalibError, DataError, InputError, OutputError

Tokenizer = PreTrainedTokenizerFast
MODULE = importlib.import_module("calib.data.select")  # the package holds the function by that name
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
NOUNS = ("cat", "river", "engine", "garden", "planet", "violin", "bridge", "letter")
THINGS = ("def", "return", "lambda", "assert", "yield", "import", "class", "while")


def sentences(nouns: tuple[str, ...], count: int, seed: int = 0, length: int = 30) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"{draw.choice(nouns)}{draw.randrange(9)}" for _ in range(length)) for _ in range(count)]


# ---- an independent reference: Python integers, dictionaries and fsum ----


def plain_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def plain_words(text: str) -> list[int]:
    """Runs of word characters or of punctuation in lower case; polynomial hashes of their bytes."""
    found = re.findall(rb"[A-Za-z0-9_\x80-\xff]+|[^\sA-Za-z0-9_\x80-\xff\x00-\x20\x7f]+", text.lower().encode())
    return [sum((byte + 1) * pow(0x100000001B3, j, 2**64) for j, byte in enumerate(token)) & MASK for token in found]


def plain_grams(ids: list[int], salt: int) -> list[int]:
    ones = [plain_mix((i + salt * GOLDEN) & MASK) for i in ids]
    return ones + [plain_mix((a * GOLDEN + b) & MASK) for a, b in itertools.pairwise(ones)]


texts_of = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(texts_of)
def test_words_and_ngrams_equal_the_reference(texts: list[str]) -> None:
    ids, owner = word_ids(texts)
    assert [int(i) for i in ids] == [token for text in texts for token in plain_words(text)]
    assert owner.tolist() == [index for index, text in enumerate(texts) for _ in plain_words(text)]
    ones, twos, pairs = ngrams(ids, owner, np.uint64(2))
    expected = Counter(gram for text in texts for gram in plain_grams(plain_words(text), 2))
    assert Counter(map(int, np.concatenate([ones, twos]))) == expected
    assert len(pairs) == len(twos)


def test_scores_equal_a_float64_reference_at_every_granularity(byte_tokenizer: Tokenizer) -> None:
    target, pool = sentences(NOUNS, 20), [*sentences(THINGS, 12, 1, 9), "cat", "", "...", "été naïve 漢字"]
    fast, buckets = byte_tokenizer.backend_tokenizer, 97
    features = Features(buckets=buckets, subword=fast, pieces=learn_pieces(target))

    def grams(text: str) -> list[int]:
        subwords = fast.encode(text, add_special_tokens=False).ids
        pieces = features.pieces.encode(text).ids
        return plain_grams(subwords, 1) + plain_grams(plain_words(text), 2) + plain_grams(pieces, 3)

    bags = [Counter(gram % buckets for text in texts for gram in grams(text)) for texts in (target, pool)]
    totals = [bag.total() + 0.5 * buckets for bag in bags]
    ratio = [
        math.log((bags[0][b] + 0.5) / totals[0]) - math.log((bags[1][b] + 0.5) / totals[1]) for b in range(buckets)
    ]
    expected = [math.fsum(ratio[g % buckets] for g in grams(text)) / (len(grams(text)) + PRIOR) for text in pool]
    counted = [features.count(texts) for texts in (target, pool)]
    found = log_ratio(*(np.bincount(counts.buckets, minlength=buckets) for counts in counted))
    np.testing.assert_allclose(found, ratio, atol=1e-12)
    np.testing.assert_allclose(counted[1].means(found), expected, atol=1e-12)
    alone = np.concatenate([features.count([text]).means(found) for text in pool])
    np.testing.assert_allclose(alone, expected, atol=1e-12)


NASTY = [
    "a b  c\n d",
    " \u00a0 x\u3000 y",
    "été ना ै 1 2,3 's it's",
    "x" * 300 + " " + "漢" * 90,
    "",
    " ",
    "a\u0301 \u200d b\r\n  c",
]


def split_tokenizer(pattern: str, texts: list[str]) -> Any:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet)))
    return tokenizer


@pytest.fixture(scope="module")
def at_spaces() -> Any:
    """A byte-level BPE with the pattern of Llama 3 and its like."""
    word = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return split_tokenizer(word, [*sentences(NOUNS, 30), *NASTY])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab1.,'\n _é\u00a0\u3000漢\u0301\u200b"), max_size=60), min_size=1, max_size=4))
def test_fast_ids_are_the_tokenizers_own(at_spaces: Any, byte_tokenizer: Tokenizer, texts: list[str]) -> None:
    pieces = learn_pieces([*NASTY, *sentences(NOUNS, 30)] * 3)
    for slow, fast in ((at_spaces, encoder(at_spaces)), (pieces, Merges(pieces))):
        for ours, theirs in zip(fast([*texts, *NASTY, *texts]), encoded(slow, [*texts, *NASTY, *texts]), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_only_tokenizers_that_cut_at_spaces_are_cut(at_spaces: Any, byte_tokenizer: Tokenizer) -> None:
    assert cuts_at_spaces(at_spaces)
    phrases = split_tokenizer(r"[.\n]+", ["of the cat in the garden of the river"] * 9)
    assert not cuts_at_spaces(phrases)  # entries of several words
    assert not cuts_at_spaces(split_tokenizer(r"\S+\s*", ["a b"]))  # a word takes the space behind it
    changed = tokenizers.Tokenizer.from_str(at_spaces.to_str())
    changed.add_special_tokens([tokenizers.AddedToken("<mask>", rstrip=True)])
    assert not cuts_at_spaces(changed)
    np.testing.assert_array_equal(encoder(phrases)(NASTY)[0], encoded(phrases, NASTY)[0])


def test_texts_are_counted_whole_whatever_a_tokenizer_cuts_and_pads(byte_tokenizer: Tokenizer) -> None:
    cutting = copy.deepcopy(byte_tokenizer)
    cutting.backend_tokenizer.enable_truncation(8)
    cutting.backend_tokenizer.enable_padding(length=8)
    plain, cut = (
        select(mixed_pool(80), TARGET, each, windows=2, seq_len=64).rows for each in (byte_tokenizer, cutting)
    )
    assert cut == plain
    assert cutting.backend_tokenizer.truncation is not None


def test_stretches_are_forgotten_in_constant_memory(at_spaces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calib.data.encode._KEPT", 50)
    fast = Stretches(at_spaces)
    for text in sentences(NOUNS, 60, 9):
        np.testing.assert_array_equal(fast([text])[0], encoded(at_spaces, [text])[0])
        assert len(fast._hashes) <= 51


@pytest.mark.slow
def test_hashes_do_not_change_from_process_to_process() -> None:
    code = "from tests.test_select import digest; print(digest())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == digest()


def digest() -> str:
    texts = sentences(NOUNS, 20)
    counts = Features(("word", "pieces"), pieces=learn_pieces(texts)).count(texts)
    return hashlib.sha256(b"".join(a.tobytes() for a in (counts.buckets, counts.sketches, counts.hashes))).hexdigest()


def test_the_temperature_gives_the_effective_size_asked_for() -> None:
    scores, mass = np.random.default_rng(0).normal(size=2000), np.random.default_rng(1).integers(1, 9, 2000)
    for wanted in (20.0, 400.0, 5000.0):
        tau, size = temperature(scores, mass, wanted)
        weights = np.exp(tau * scores)
        assert size == pytest.approx(wanted, rel=1e-6)
        assert (mass * weights).sum() ** 2 / (mass * weights**2).sum() == pytest.approx(wanted, rel=1e-6)
    assert temperature(scores, mass, 1e9)[0] == 0.0  # more than there is: no weights
    assert temperature(np.zeros(5), np.ones(5), 2.0)[1] == pytest.approx(5.0)  # nothing tells them apart
    assert effective_size(scores, np.ones(2000), 0.0) == pytest.approx(2000)


def test_draws_follow_the_weights_without_replacement() -> None:
    """Chi-square over ordered pairs of 4 texts: p(i) p(j | not i) of a draw without replacement."""
    weights, trials = np.array([0.1, 0.2, 0.3, 0.4]), 6000
    hashes = np.arange(4, dtype=np.uint64) * np.uint64(1 << 60) + np.uint64(12345)
    counts: Counter[tuple[int, int]] = Counter()
    for seed in range(trials):
        order = np.argsort(-(np.log(weights) + gumbel(hashes, seed)))
        counts[int(order[0]), int(order[1])] += 1
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = [trials * weights[i] * weights[j] / (1 - weights[i]) for i, j in pairs]
    assert stats.chisquare([counts[pair] for pair in pairs], expected).pvalue > 1e-3
    noise = gumbel(np.random.default_rng(0).integers(0, 2**63, 4000).astype(np.uint64), 7)
    assert stats.kstest(noise, stats.gumbel_r.cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(noise, gumbel(np.arange(4000, dtype=np.uint64), 7))[0, 1]) < 0.1


def records_of(scores: list[float], sketches: np.ndarray | None = None) -> np.ndarray:
    records = np.zeros(len(scores), _RECORD)
    records["score"], records["tokens"], records["mass"] = scores, 1, 1
    records["hash"] = np.random.default_rng(0).integers(0, 2**63, len(scores))
    records["sketch"] = np.random.default_rng(1).integers(0, 256, (len(scores), 16)) if sketches is None else sketches
    return records


def test_shares_are_drawn_as_asked_and_never_twice() -> None:
    draw = _Draw(records_of([5.0] * 30 + [0.0] * 70), seed=0, total=20)
    draw.tau = 100.0
    draw.take("importance", 15)
    draw.take("uniform", 20)
    assert Counter(draw.shares.values()) == {"importance": 15, "uniform": 5}
    assert all(index < 30 for index, share in draw.shares.items() if share == "importance")
    assert len(set(draw.evenly())) == 20


def test_repeats_lose_their_mass_in_every_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_CHUNK", 8)  # two records fill no partition
    records = records_of([0.0] * 200)
    records["hash"][100:150] = records["hash"][:50]
    assert _drop_repeats(records) == 50
    assert records["mass"][:100].all()
    assert not records["mass"][100:150].any()


def test_near_duplicates_are_left_out() -> None:
    base = sentences(NOUNS, 1, 3, 120)[0]
    changed = base.replace(base.split()[60], "changed", 1)
    other = sentences(NOUNS, 1, 4, 120)[0]
    pool = [base, changed, other, *sentences(THINGS, 30, 5)]
    with pytest.warns(UserWarning, match="gives 32 of 40 texts"):
        assert sum("changed" in text or text == base for text in _chosen(pool, [base] * 2, 40, seq_len=256)) == 1
    first, second, third = Features(("word",)).count([base, changed, other]).sketches
    assert (first == second).mean() >= 0.75
    assert (first == third).mean() < 0.5


def _chosen(pool: Any, target: Any, windows: int = 4, **options: Any) -> list[str]:
    given: dict[str, Any] = {"windows": windows, "seq_len": 16, "pack": False, "uniform": 0.0, **options}
    return select(pool, target, **given).texts


def mixed_pool(count: int = 120) -> list[dict[str, str]]:
    rows = [{"text": text, "label": "nouns"} for text in sentences(NOUNS, count // 4, 1)]
    rows += [{"text": text, "label": "things"} for text in sentences(THINGS, 3 * count // 4, 2)]
    random.Random(0).shuffle(rows)
    return rows


def test_the_choice_is_pure_and_reported(byte_tokenizer: Tokenizer) -> None:
    chosen = select(mixed_pool(400), sentences(NOUNS, 30), byte_tokenizer, windows=8, seq_len=128, uniform=0.0)
    share = chosen.report["labels"]["given data: nouns"]
    assert 0.2 < share["pool"] < 0.27
    assert share["importance"] > 0.95
    assert chosen.report["kl_target_chosen"] < chosen.report["kl_target_even"]
    tokens = sum(len(byte_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in chosen.texts)
    assert 8 * 128 <= tokens == chosen.report["chosen"]["tokens"]
    assert calibration_data(chosen.texts, byte_tokenizer, 8, 128).rows == 8
    json.dumps(chosen.report)


def test_the_uniform_share_keeps_the_rest_of_the_pool() -> None:
    chosen = select(mixed_pool(400), sentences(NOUNS, 30), windows=40, seq_len=16, pack=False, uniform=0.5)
    by_share = {
        share: Counter(row["label"] for row in chosen.rows if row["share"] == share)
        for share in ("importance", "uniform")
    }
    assert by_share["importance"].total() == by_share["uniform"].total() == 20
    assert by_share["importance"]["given data: nouns"] >= 19
    assert by_share["uniform"]["given data: things"] >= 10


def test_all_may_be_drawn_evenly() -> None:
    chosen = select(mixed_pool(400), sentences(NOUNS, 30), windows=40, seq_len=16, pack=False, uniform=1.0)
    assert {row["share"] for row in chosen.rows} == {"uniform"}
    assert len(chosen.rows) == 40


def test_a_pool_that_changes_between_passes_is_noticed() -> None:
    class Restless(list[str]):
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return (text.replace(" ", f"{self.passes} ") for text in super().__iter__())

    with pytest.raises(DataError, match="changed while it was read"):
        select(Restless(sentences(NOUNS, 40)), TARGET, windows=4, seq_len=16)


def test_processes_batches_and_order_do_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, target = mixed_pool(200), sentences(NOUNS, 20)
    one = _chosen(pool, target, 16)
    monkeypatch.setattr(MODULE, "_BATCH", 3000)
    assert _chosen(pool, target, 16, processes=2) == one
    assert sorted(_chosen(pool[::-1], target, 16)) == sorted(one)
    assert _chosen(pool, target, 16, seed=1) != one


def test_a_pool_that_repeats_itself_gives_each_text_once() -> None:
    pool = sentences(NOUNS, 3) * 50
    with pytest.warns(UserWarning, match="gives 3 of 8 texts without repeating itself"):
        chosen = select(pool, sentences(NOUNS, 3), windows=8, seq_len=64, pack=False)
    assert sorted(chosen.texts) == sorted(set(pool))
    assert chosen.report["pool"]["repeated"] == 147


def test_pieces_are_cut_evenly_at_white_space() -> None:
    text = " ".join(f"word{index}" for index in range(500))
    parts = list(cut(text, 100))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 100
    assert min(map(len, parts)) > 50
    assert all(part.endswith(" ") for part in parts[:-1])
    assert next(cut("x" * 1001, 100)) == "x" * 77  # 13 equal parts: nowhere to cut
    assert list(cut("short", 100)) == ["short"]


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab \n"), max_size=300), st.integers(8, 60))
def test_cut_loses_nothing(text: str, size: int) -> None:
    parts = list(cut(text, size))
    assert "".join(parts) == text
    assert all(len(part) <= size for part in parts)


def test_pools_of_every_kind_give_the_same_pieces(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = ["a first, with a comma", "a second"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.csv").write_text('text\n"a first, with a comma"\na second\n')
    (tmp_path / "c.tsv").write_text("text\n" + "\n".join(texts) + "\n")
    (tmp_path / "d.json").write_text(json.dumps([{"text": text} for text in texts]))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "e.parquet")
    files = sorted(tmp_path.iterdir())
    for source in (*files, texts, [{"text": text} for text in texts]):
        assert [piece.text for piece in Pool(source, 100).pieces()] == texts
    assert len(list(Pool(tmp_path, 100).pieces())) == len(list(Pool(files, 100).pieces())) == 10
    labels = {piece.label for piece in Pool([str(file) for file in files], 100).pieces()}
    assert labels == {file.name for file in files}


def test_hub_pools_are_streamed_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[bool] = []

    def load(name: str, configuration: str | None, *, split: str, streaming: bool) -> Any:
        asked.append(streaming)
        return iter([{"text": text} for text in sentences(NOUNS, 40)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    chosen = select("some/pool", TARGET, windows=2, seq_len=64)
    assert asked == [True] * 3
    assert set(chosen.report["labels"]) == {"some/pool"}


def test_messages_go_through_the_chat_template(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    chatty = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer, chat_template=template)
    rows = [{"prompt": "no", "messages": [{"role": "user", "content": f"question {i}"}]} for i in range(40)]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (file, rows):
        data = calibration_data(source, chatty, samples=2, seq_len=32)
        assert "[user] question" in chatty.decode(data[0]["input_ids"].flatten())
        assert select(source, source, chatty, windows=2, seq_len=64).texts[0].startswith("[user] question")
        with pytest.raises(DataError, match="messages and the tokenizer has no chat template"):
            calibration_data(source, byte_tokenizer, samples=2, seq_len=16)
    with pytest.raises(DataError, match="chat template cannot take"):
        calibration_data([{"messages": ["hello"]}], chatty, samples=2, seq_len=16)


TARGET = sentences(NOUNS, 10)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the pool holds no text"),
        (b" \n \n", "the pool holds no text"),
        (b"\x00\x01\x02\n\x00", "skipped: 2 binary lines"),
        (b"caf\xe9\nna\xefve\n", "skipped: 2 lines not UTF-8"),
        (b"{]\n", "skipped: 1 lines not JSON"),
        (b'{"words": "x"}\n{"text": 3}\n', "skipped: 2 rows without text"),
    ],
)
def test_pools_without_text(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / ("a.jsonl" if b"{" in content else "a.txt")
    file.write_bytes(content)
    with pytest.raises(DataError, match=says):
        select(file, TARGET, windows=2, seq_len=16)


def test_bad_lines_of_a_pool_are_counted(tmp_path: Path) -> None:
    good = "".join(json.dumps({"text": text}) + "\n" for text in sentences(NOUNS, 40)).encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n\x00\x00\n{]\n{"text": "\\ud800 alone"}\n' + good)
    chosen = select(tmp_path / "a.jsonl", TARGET, windows=4, seq_len=16)
    assert chosen.report["pool"]["skipped"] == {"lines not UTF-8": 1, "binary lines": 1, "lines not JSON": 1}
    assert chosen.report["pool"]["pieces"] >= 41


def test_one_giant_line_is_cut_into_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "é".join(sentences(NOUNS, 300))
    (tmp_path / "giant.txt").write_text(line, encoding="utf-8")
    monkeypatch.setattr("calib.data.pool._LINE_PART", 1001)  # bytes: parts end within characters
    pieces = [piece.text for piece in Pool(tmp_path / "giant.txt", 200).pieces()]
    assert "".join(pieces).replace(" ", "") == line.replace(" ", "")
    assert max(map(len, pieces)) <= 200
    monkeypatch.setattr("calib.data.read.LONGEST_LINE", 500)
    monkeypatch.setattr("calib.data.read.text_lines.__defaults__", (500,))
    (tmp_path / "giant.jsonl").write_text(json.dumps({"text": line}) + "\n" + json.dumps({"text": "short"}) + "\n")
    pool = Pool(tmp_path / "giant.jsonl", 200)
    assert [piece.text for piece in pool.pieces()] == ["short"]
    assert pool.skipped == {"lines too long": 1}


@pytest.mark.parametrize(
    ("pool", "target", "options", "error", "says"),
    [
        (TARGET, ["tiny"], {}, DataError, r"the target holds \d+ tokens, fewer than one window of 16"),
        ("../nothing/here.jsonl", TARGET, {}, DataError, "there is no file"),
        (TARGET, Path("missing.txt"), {}, DataError, "there is no file missing.txt"),
        (iter(TARGET), TARGET, {}, DataError, "read more than once"),
        ({"text": "x"}, TARGET, {}, DataError, "cannot select from a dict"),
        (3, TARGET, {}, DataError, "cannot select from a int"),
        ([], TARGET, {}, DataError, "the pool holds no text"),
        ([1, 2], TARGET, {}, DataError, "2 rows without text"),
        (TARGET, TARGET, {"uniform": 1.5}, InputError, "a share of 1.5"),
        (TARGET, TARGET, {"windows": 0}, InputError, "0 windows"),
        (TARGET, TARGET, {"features": ["subword"]}, InputError, "need a tokenizer"),
        (TARGET, TARGET, {"features": ["letters"]}, InputError, "unknown features 'letters'"),
        (TARGET, TARGET, {"tokenizer": object()}, InputError, "object is a slow tokenizer"),
    ],
)
def test_bad_arguments(pool: Any, target: Any, options: Any, error: type[CalibError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        select(pool, target, **{"windows": 2, "seq_len": 16, **options})
    assert "\n" not in str(caught.value)


# ---- a model: data chosen for it, data it writes, channels it is driven in ----


@pytest.fixture(scope="module")
def tiny(byte_tokenizer: Tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = len(byte_tokenizer) + 6  # padded, as many models' tables are
    config = LlamaConfig(vocab_size=vocabulary, **sizes, max_position_embeddings=128, initializer_range=0.2)
    return LlamaForCausalLM(config).eval()


def test_a_model_writes_its_own_windows(tiny: LlamaForCausalLM, byte_tokenizer: Tokenizer) -> None:
    before = torch.get_rng_state()
    batches = generate_windows(tiny, byte_tokenizer, 6, 24, seed=3, top_k=200, batch_size=2)
    assert torch.equal(before, torch.get_rng_state())
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert rows.shape == (6, 24)
    assert not set(rows.unique().tolist()) & {0, 1, *range(len(byte_tokenizer), len(byte_tokenizer) + 6)}
    assert len(set(rows[3:, 0].tolist())) == 3  # single first tokens differ
    again, other = (generate_windows(tiny, byte_tokenizer, 6, 24, s, top_k=200, batch_size=2) for s in (3, 4))
    assert torch.equal(rows, torch.cat([batch["input_ids"] for batch in again]))
    assert not torch.equal(rows, torch.cat([batch["input_ids"] for batch in other]))


def test_sampling_follows_the_model(tiny: LlamaForCausalLM, byte_tokenizer: Tokenizer) -> None:
    _, batch = generate_windows(tiny, byte_tokenizer, 4, 12, top_k=1)
    for row in batch["input_ids"]:  # top 1 is greedy: each token is the likeliest ordinary one
        with torch.no_grad():
            logits = tiny(row[None]).logits[0, :-1]
        logits[:, [0, 1, *range(len(byte_tokenizer), logits.shape[1])]] = -torch.inf
        assert torch.equal(logits.argmax(-1), row[1:])


def test_quantize_takes_chosen_and_own_data(tiny: LlamaForCausalLM, byte_tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"method": "rtn", "samples": 4, "seq_len": 32, "tokenizer": byte_tokenizer}
    data = like(target=sentences(NOUNS, 10), pool=mixed_pool(), uniform=0.0)
    for source in (data, "self"):
        results = [calib.quantize(copy.deepcopy(tiny), data=source, progress=False, **options) for _ in range(2)]
        assert results[0].data.fingerprint == results[1].data.fingerprint
        assert (results[0].data.rows, results[0].data.tokens) == (4, 128)
    text = byte_tokenizer.decode(calibration_data(data, byte_tokenizer, 4, 32)[0]["input_ids"].flatten())
    assert "cat" in text or "river" in text or "violin" in text
    with pytest.raises(DataError, match="vocabulary has 50 entries"):
        calibration_data(data, byte_tokenizer, 4, 32, vocabulary=50)


def test_encoders_write_no_text() -> None:
    from tests.families import build

    model = build("bert")
    with pytest.raises(InputError, match="writes no text"):
        calib.quantize(model, method="rtn", data="self", progress=False)


def test_coverage_counts_the_channels_reached(tiny: LlamaForCausalLM) -> None:
    batch = {"input_ids": torch.arange(2, 66).view(2, 32), "attention_mask": torch.ones(2, 32, dtype=torch.int64)}
    assert coverage(tiny, [batch], [batch])["share"] == 1.0
    one = {key: value[:1] for key, value in batch.items()}
    found = coverage(tiny, [one], [batch])
    first = tiny.model.layers[0].input_layernorm(tiny.model.embed_tokens(batch["input_ids"])).abs()
    expected = (first[0].amax(0) >= 0.9 * first.amax((0, 1))).float().mean()
    assert found["linears"]["model.layers.0.self_attn.q_proj"] == pytest.approx(float(expected))
    assert 0 < found["share"] < 1
    masked = {"input_ids": batch["input_ids"], "attention_mask": torch.ones(2, 32, dtype=torch.int64)}
    masked["attention_mask"][1] = 0
    assert coverage(tiny, [masked], [one])["share"] == 1.0


# ---- the command line ----


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed_pool(200)))
    (tmp_path / "target.txt").write_text("\n".join(sentences(NOUNS, 20)))
    return ["--pool", str(tmp_path / "pool.jsonl"), "--target", str(tmp_path / "target.txt"), "--windows", "4"]


def test_command_writes_texts_report_and_figure(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "chosen.jsonl"
    reports = ["--report", str(tmp_path / "r.json"), "--report", str(tmp_path / "r.png")]
    command = ["data", "select", *files, "--seq-len", "64", "--out", str(out), *reports, "--json"]
    assert cli.run(command) == 0
    printed = capsys.readouterr().out
    assert "effective sample size" in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    summary = json.loads(printed.splitlines()[-1])
    assert len(rows) == summary["chosen"]["pieces"]
    assert {row["share"] for row in rows} == {"importance", "uniform"}
    assert json.loads((tmp_path / "r.json").read_text())["log_weights"]["chosen"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    first = out.read_bytes()
    assert cli.run([*command[:-1], "--quiet", "--processes", "2"]) == 0
    assert out.read_bytes() == first
    assert sorted(p.name for p in out.parent.iterdir()) == ["chosen.jsonl"]


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--pool", "typo.jsonl"], DataError.exit_code, "there is no file typo.jsonl"),
        (["--coverage"], InputError.exit_code, "needs a model"),
        (["--report", "r.doc"], InputError.exit_code, "unknown report '.doc'"),
        (["--seq-len", "100000"], DataError.exit_code, "fewer than one window"),
        (["--features", "words"], InputError.exit_code, "unknown features 'words'"),
    ],
)
def test_command_errors_are_one_line(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, says: str
) -> None:
    assert cli.run(["data", "select", *files, "--out", str(tmp_path / "c.jsonl"), "--quiet", *more]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert says in errors[0]
    assert not (tmp_path / "c.jsonl").exists()


def test_command_never_overwrites_its_source(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["data", "select", *files, "--out", files[1]]) == OutputError.exit_code
    assert "is what is chosen from" in capsys.readouterr().err
