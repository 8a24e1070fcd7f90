"""lm-eval's tasks, from files of our own: the figure is what the model's likelihoods say, and tasks are data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calib import cli
from calib.errors import DataError, InputError
from calib.evaluate import bootstrap95, harness, paired
from calib.evaluate.harness import read_task

QUESTIONS = [
    {"question": f"{a} and {b}", "choices": [f"{a + b}", f"{a + b + 1}", "no"], "answer": (a * b) % 3}
    for a in range(4)
    for b in range(5)
]
TASK = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {test: sums.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} make"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    (tmp_path / "task.yaml").write_text(TASK)
    return tmp_path / "task.yaml"


def small(seed: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=128, **sizes)).eval()


def right(model: LlamaForCausalLM, tokenizer, question: dict) -> float:  # type: ignore[no-untyped-def,type-arg]
    scores = []
    for choice in question["choices"]:
        prompt = tokenizer(question["question"] + " make")["input_ids"]
        whole = tokenizer(question["question"] + " make " + choice)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        scores.append(sum(float(logp[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
    return float(scores.index(max(scores)) == question["answer"])


@pytest.mark.slow
def test_a_local_task_gives_what_the_likelihoods_say(task: Path, byte_tokenizer) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("lm_eval")
    a, b = small(0, len(byte_tokenizer)), small(1, len(byte_tokenizer))
    found, other = harness(a, byte_tokenizer, task), harness(b, byte_tokenizer, task)
    assert found.outputs is not None
    assert found.outputs.tolist() == [right(a, byte_tokenizer, q) for q in QUESTIONS]
    assert found.metric == "acc" and found.n == 20 and found.value == pytest.approx(float(found.outputs.mean()))
    assert any(key.startswith("acc_norm") for key in found.detail) and bootstrap95(found) is not None
    assert paired(found, other)["test"] == "permutation of items"
    assert harness(a, byte_tokenizer, task, limit=7).outputs.tolist() == found.outputs.tolist()[:7]  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_command_pairs_two_models(task: Path, byte_tokenizer, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("lm_eval")
    for seed in (0, 1):
        small(seed, len(byte_tokenizer)).save_pretrained(tmp_path / f"m{seed}")
        byte_tokenizer.save_pretrained(tmp_path / f"m{seed}")
    arguments = ["eval", str(tmp_path / "m0"), "--task", "harness", "--data", str(task), "--json", "-q"]
    capsys.readouterr()  # transformers' own bars
    assert cli.run([*arguments, "--against", str(tmp_path / "m1")]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out.splitlines()[-1])
    assert "it/s" not in printed.err, "quiet"
    assert answer["task"] == "harness" and answer["n"] == 20 and "paired" in answer and answer["ci95"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TASK + "\nprocess_docs: !function code.run\n", "no task of plain YAML"),
        (TASK + "\ninclude: other.yaml\n", "whole in one file"),
        ("- a list", "no task"),
        (TASK.replace("sums.jsonl", "absent.jsonl"), "absent.jsonl"),
    ],
)
def test_a_task_is_data(task: Path, text: str, says: str) -> None:
    task.write_text(text)
    with pytest.raises(DataError, match=says):
        read_task(task)


def test_without_the_package_one_line_says_so(
    task: Path, byte_tokenizer, monkeypatch: pytest.MonkeyPatch  # type: ignore[no-untyped-def]
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="not installed"):
        harness(small(0, len(byte_tokenizer)), byte_tokenizer, task)
