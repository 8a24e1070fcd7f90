"""Calibration data: sources, windows, rows, fingerprints, and one-line errors."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from calib.data import (
    TokenData,
    builtin_documents,
    calibration_data,
    read_documents,
    read_labelled,
    read_pairs,
    read_text,
    sequence_limit,
)
from calib.data import hub as hub_module
from calib.errors import CalibError, DataError, InputError

Tokenizer = PreTrainedTokenizerFast


def _text(data: TokenData, tokenizer: Tokenizer) -> str:
    return "".join(tokenizer.decode(row) for batch in data for row in batch["input_ids"])


def test_builtin_text_needs_no_network_and_is_varied(byte_tokenizer: Tokenizer) -> None:
    data = calibration_data(None, byte_tokenizer, samples=128, seq_len=512)
    assert data.rows == 128
    assert data.tokens == 128 * 512
    assert all(bool(batch["attention_mask"].all()) for batch in data)
    rows = {tuple(row.tolist()) for batch in data for row in batch["input_ids"]}
    assert len(rows) == 128


def test_builtin_sentences_are_the_same_each_time(byte_tokenizer: Tokenizer) -> None:
    first, again = (calibration_data(None, byte_tokenizer, samples=16, pack=False) for _ in range(2))
    assert first.rows == 16
    assert first.fingerprint == again.fingerprint
    sentences = builtin_documents(paragraphs=True)
    assert len(sentences) > 1000
    assert not any("\n" in sentence for sentence in sentences)


def test_windows_are_drawn_evenly_and_by_seed(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{index:07d} " for index in range(2000)) + ".")  # 1,000 windows of 16
    first, again, other = (
        calibration_data(file, byte_tokenizer, samples=50, seq_len=16, seed=seed) for seed in (0, 0, 1)
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint
    numbers = [int(_text(first, byte_tokenizer)[at : at + 7]) for at in range(0, 800, 16)]
    assert all(number // 40 == index for index, number in enumerate(numbers))  # one from each fiftieth


def test_windows_never_repeat(byte_tokenizer: Tokenizer) -> None:
    text = "".join(f"{index:03d}." for index in range(14))
    for seed in range(50):  # 14 windows, 10 stretches of 1.4
        data = calibration_data([text], byte_tokenizer, samples=10, seq_len=4, seed=seed)
        assert len({tuple(row.tolist()) for batch in data for row in batch["input_ids"]}) == 10


def test_windows_of_a_long_text_are_exact_pieces_of_it(byte_tokenizer: Tokenizer) -> None:
    text = " ".join(str(index) for index in range(50_000))
    data = calibration_data([text], byte_tokenizer, samples=4, seq_len=64)
    assert data.tokens == 256
    places = [text.find(byte_tokenizer.decode(row)) for batch in data for row in batch["input_ids"]]
    assert min(places) >= 0
    assert places == sorted(places)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(2, 40), st.integers(1, 9), st.integers(0, 5))
def test_windows_have_the_shape_asked_for(samples: int, seq_len: int, batch_size: int, seed: int) -> None:
    tokenizer = _words_tokenizer()
    text = " ".join(["word"] * 900)
    data = calibration_data([text], tokenizer, samples, seq_len, seed, batch_size=batch_size)
    assert data.rows == samples
    assert data.tokens == samples * seq_len
    assert [len(batch["input_ids"]) for batch in data][:-1] == [batch_size] * (len(data) - 1)
    assert all(batch["input_ids"].dtype == torch.int64 for batch in data)
    alone = calibration_data([text], tokenizer, samples, seq_len, seed, batch_size=1)
    assert data.fingerprint == alone.fingerprint


def _words_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers

    fast = Fast(models.WordLevel({"word": 0, "?": 1}, "?"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast)


def test_rows_are_padded_masked_and_in_order(byte_tokenizer: Tokenizer) -> None:
    sentences = ["one", " ", "three is long", "x" * 100]
    data = calibration_data(sentences, byte_tokenizer, samples=3, seq_len=20, pack=False, batch_size=2)
    ids, mask = data[0]["input_ids"], data[0]["attention_mask"]
    assert ids.shape == mask.shape == (2, 14)
    assert mask.sum(dim=1).tolist() == [4, 14]  # <s> in front
    assert byte_tokenizer.decode(ids[0][1:4]) == "one"
    assert bool((ids[mask == 0] == byte_tokenizer.pad_token_id).all())
    assert data[1]["input_ids"].shape == (1, 20)  # truncated
    assert data.tokens == 4 + 14 + 20


def test_rows_are_a_seeded_sample_in_given_order(byte_tokenizer: Tokenizer) -> None:
    sentences = [f"sentence {index:04d}" for index in range(300)]
    data = calibration_data(sentences, byte_tokenizer, samples=40, seq_len=32, pack=False, seed=3)
    texts = [byte_tokenizer.decode(row[1:]) for batch in data for row in batch["input_ids"]]
    assert texts == sorted(set(texts))
    assert len(texts) == 40
    other = calibration_data(sentences, byte_tokenizer, samples=40, seq_len=32, pack=False, seed=4)
    assert other.fingerprint != data.fingerprint


def test_fewer_rows_than_asked_is_said(byte_tokenizer: Tokenizer) -> None:
    with pytest.warns(UserWarning, match="gives 2 of 5 rows"):
        data = calibration_data(["ab" * 20], byte_tokenizer, samples=5, seq_len=16)
    assert data.rows == 2


def test_token_dicts_pass_as_they_are() -> None:
    items: list[Any] = [
        {"input_ids": torch.tensor([1, 2, 3])},
        {"input_ids": [[4, 5], [6, 7]], "attention_mask": [[1, 1], [1, 0]], "labels": 1},
        {"input_ids": torch.tensor([[8, 9]], dtype=torch.int32), "token_type_ids": torch.tensor([[0, 1]])},
    ]
    data = calibration_data(items, None, samples=100)
    assert [tuple(batch["input_ids"].shape) for batch in data] == [(1, 3), (2, 2), (1, 2)]
    assert (data.rows, data.tokens) == (4, 8)
    assert set(data[2]) == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(batch["input_ids"].dtype == torch.int64 for batch in data)
    capped = calibration_data(iter(items), None, samples=2)
    assert [tuple(batch["input_ids"].shape) for batch in capped] == [(1, 3), (1, 2)]


def test_endless_iterables_end(byte_tokenizer: Tokenizer) -> None:
    data = calibration_data((f"text {i} " for i in itertools.count()), byte_tokenizer, samples=4, seq_len=32)
    assert data.rows == 4
    dicts: Iterator[dict[str, torch.Tensor]] = ({"input_ids": torch.ones(1, 4).long()} for _ in itertools.count())
    assert calibration_data(dicts, None, samples=4).rows == 4


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([], "no text"),
        ([""], "no text"),
        ([1, 2], "neither text nor tokens"),
        ([{"words": "x"}], "neither text nor tokens"),
        ([{"input_ids": torch.ones(2)}], "float"),
        ([{"input_ids": torch.empty(0).long()}], "torch.int64"),
        ([{"input_ids": [-100, 1]}], "negative"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "attention_mask is"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "without a real token"),
        ([{"input_ids": [[1], [1, 2]]}], "no tensor"),
        ([{"input_ids": [1]}, "text"], "no input_ids"),
        (["text", {"input_ids": [1]}], "mixes"),
        ([{"input_ids": list(range(600))}], "limit of 512"),
        ({"input_ids": [1]}, "cannot calibrate with a dict"),
        (3, "cannot calibrate with a int"),
    ],
)
def test_bad_iterables(byte_tokenizer: Tokenizer, items: Any, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        calibration_data(items, byte_tokenizer)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_files_of_every_kind_give_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = ["a first, with a comma", 'a "quoted" second']
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    (tmp_path / "b.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "c.tsv").write_text("sentence\tlabel\n" + "".join(f"{text}\t1\n" for text in texts))
    (tmp_path / "d.csv").write_text('label,text\n1,"a first, with a comma"\n1,"a ""quoted"" second"\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": [1, 2]}), tmp_path / "e.parquet")
    (tmp_path / "f.txt").write_text("\n".join(texts))
    (tmp_path / "ignored.md").write_text("no")
    for name in ("a.jsonl", "b.json", "c.tsv", "d.csv", "e.parquet"):
        assert read_documents(tmp_path / name) == texts, name
    assert read_documents(tmp_path / "f.txt") == ["\n".join(texts)]
    assert read_documents(tmp_path / "f.txt", lines=True) == texts
    assert len(read_documents(tmp_path)) == 11
    assert read_documents(tmp_path / "d.csv", column="label") == ["1", "1"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n ", "is empty"),
        ("a.txt", b"ab\0cd", "is binary"),
        ("a.txt", b"caf\xe9 ol\xe9", "not UTF-8"),
        ("a.jsonl", b"{]", "not valid JSON"),
        ("a.jsonl", b"3", "is no object"),
        ("a.jsonl", b'{"words": "x"}', "no text column"),
        ("a.jsonl", b'{"text": 3}', "is no text"),
        ("a.jsonl", b'{"text": ""}', "holds no text"),
        ("a.tsv", b"sentence\tlabel\nonly\n", "1 columns, its header 2"),
        ("a.tsv", b"words\tlabel\nonly\t1\n", "no text column"),
        ("a.parquet", b"PAR1", "as parquet"),
    ],
)
def test_bad_files_are_named(byte_tokenizer: Tokenizer, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        calibration_data(str(file), byte_tokenizer)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_short_and_folders(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        calibration_data("../nothing/here.txt", byte_tokenizer)
    with pytest.raises(DataError, match="holds no"):
        calibration_data(tmp_path, byte_tokenizer)
    (tmp_path / "short.txt").write_text("tiny")
    with pytest.raises(DataError, match=r"short.txt holds 4 tokens, fewer than one window of 512"):
        calibration_data(tmp_path / "short.txt", byte_tokenizer)
    with pytest.raises(DataError, match="no tokenizer"):
        calibration_data(["text"], None)


@pytest.mark.parametrize(("samples", "seq_len"), [(0, 8), (-1, 8), (4, 1), (4, 513)])
def test_lengths_that_do_not_fit(byte_tokenizer: Tokenizer, samples: int, seq_len: int) -> None:
    with pytest.raises(InputError):
        calibration_data(["text"], byte_tokenizer, samples, seq_len)


def test_limit_comes_from_the_model_then_the_tokenizer(byte_tokenizer: Tokenizer) -> None:
    assert sequence_limit(SimpleNamespace(max_position_embeddings=64), byte_tokenizer) == 64
    assert sequence_limit(SimpleNamespace(max_position_embeddings=514), byte_tokenizer) == 512  # RoBERTa
    assert sequence_limit(SimpleNamespace(), byte_tokenizer) == 512
    assert sequence_limit(SimpleNamespace(), None) is None
    with pytest.raises(InputError, match="limit of 64"):
        calibration_data(["text"], byte_tokenizer, limit=64)


def test_hub_data_streams_only_what_is_needed(byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, configuration: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        asked.append((name, configuration, split, streaming))
        return ({"text": f"paragraph {index}\n"} for index in itertools.count())

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert calibration_data("wikitext", byte_tokenizer, samples=4, seq_len=64).rows == 4
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train", True)]
    with pytest.raises(DataError, match="has no 'words'"):
        hub_module.hub_documents("some/set", chars=10, column="words")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("cannot\nreach")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="no file 'wikitext'") as caught:
        calibration_data("wikitext", byte_tokenizer)
    assert "\n" not in str(caught.value)


def test_labelled_and_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('sentence\tlabel\na "b \t1\nc\t0\n')
    assert read_labelled(tmp_path / "a.tsv") == (['a "b', "c"], [1, 0])
    (tmp_path / "p.tsv").write_text("g\tf\ty\t1\t2.5\tone\ttwo\tlicence\n")
    assert read_pairs(tmp_path / "p.tsv") == (["one"], ["two"], [2.5])
    assert read_documents(tmp_path / "p.tsv") == ["one", "two"]
    for content, reader in (
        ("sentence\tlabel\na\tb\n", read_labelled),
        ("sentence\tlabel\n", read_labelled),
        ("sentence\na\n", read_labelled),
        ("one\ttwo\n", read_pairs),
    ):
        (tmp_path / "bad.tsv").write_text(content)
        with pytest.raises(DataError, match=r"bad\.tsv"):
            reader(tmp_path / "bad.tsv")
    with pytest.raises(CalibError, match="is a folder"):
        read_text(tmp_path)


def test_shared_files(shared: Path, byte_tokenizer: Tokenizer) -> None:
    sentences, labels = read_labelled(shared / "data/sst2/test.tsv")
    assert len(sentences) == 872
    assert set(labels) == {0, 1}
    first, second, scores = read_pairs(shared / "data/stsb/sts-test.tsv")
    assert len(first) == len(second) == len(scores) == 1379
    assert 0 <= min(scores) <= max(scores) <= 5
    data = calibration_data(shared / "data/sst2/train.tsv", byte_tokenizer, pack=False)
    assert data.rows == 128
    for name in ("gsm8k/test.jsonl", "mbpp/mbpp.jsonl", "wikitext-2/valid.txt"):
        assert calibration_data(shared / "data" / name, byte_tokenizer, samples=16).rows == 16
