"""method="auto": what is tried, what judges, what is taken, and what a stopped run remembers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import calib
from calib import auto
from calib.errors import InputError
from calib.recipe import SCHEMES, scheme
from tests.families import batches, build

RUN = {"progress": False, "scheme_options": None}


def test_every_scheme_has_candidates_that_its_formats_can_express() -> None:
    for name in SCHEMES:
        for stock in (False, True):
            found = auto.candidates(scheme(name), stock)
            assert found and len({c.method for c in found}) == len(found)
            if stock:
                assert not any(word in c.method for c in found for word in ("hadamard", "rotate"))
            weight_only = scheme(name).inputs is None
            assert all(("os+" in c.method or "smoothquant" in c.method) != weight_only for c in found)


def test_the_least_held_out_loss_wins_and_each_trial_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "level", lambda differences: bool(differences.mean() <= 0))
    result = calib.quantize(build("llama"), "w4a8-static", data=batches("llama", 6), progress=False)
    trials = result.report["auto"]
    best = min(trials, key=lambda t: t["loss"])
    assert [t["method"] for t in trials] == [c.method for c in auto.candidates(scheme("w4a8-static"))]
    assert ",".join(result.recipe.methods) == best["method"]
    assert any(note.startswith("auto: ") and best["method"] in note for note in result.plan.notes)


def deep() -> torch.nn.Module:
    config = build("llama").config
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_a_deep_model_is_tried_on_some_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "TRIAL_BLOCKS", 2)
    few = auto.fewer_blocks(scheme("w8a8"), deep())
    tried = [n for n in range(4) if not re.search(few.exclude[0], f"model.layers.{n}.mlp.down_proj")]
    assert tried == [0, 3]
    excluding = scheme("w8a8", exclude=("layers.1",))
    assert auto.fewer_blocks(excluding, deep()) is excluding
    assert auto.fewer_blocks(scheme("w8a8"), build("llama")).exclude == ()
    result = calib.quantize(deep(), "w8a8-static", data=batches("llama", 6), progress=False)
    assert all(trial["loss"] is not None for trial in result.report["auto"])
    assert len(result.plan.quantized()) == 4 * 7, "the run itself takes all"


def test_held_out_rows_take_no_part_in_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches("bert", 6, rows=2)
    held, taken = auto.split(data)
    rows = [row for batch in taken for row in batch["input_ids"]]
    assert len(held) == 4 and len(rows) == 8
    for one in held:
        assert not any(torch.equal(one["input_ids"][0], row) for row in rows)
    seen: list[torch.Tensor] = []

    def attempt(candidate: auto.Candidate, given: list[Any]) -> torch.nn.Module:
        seen.extend(row for batch in given for row in batch["input_ids"])
        return build("bert")

    _, trials = auto.choose(auto.candidates(scheme("w8a8")), data, build("bert"), attempt, progress=False)
    assert len(seen) == len(trials) * len(rows)
    assert all(trial.loss == 0.0 for trial in trials), "against itself an encoder has no error"


@pytest.mark.parametrize(("length", "held", "taken"), [(25, 150 // 3, 100), (256, 16, 32), (512, 8, 16), (2048, 8, 16)])
def test_short_rows_make_up_the_tokens_of_windows(length: int, held: int, taken: int) -> None:
    judging, rest = auto.split([{"input_ids": torch.zeros(150, length, dtype=torch.long)}])
    assert (len(judging), sum(len(batch["input_ids"]) for batch in rest)) == (held, taken)


@pytest.mark.parametrize(
    ("differences", "is_level"),
    [([0.1, -0.2, 0.3, -0.15], True), ([0.1, 0.11, 0.09, 0.1], False), ([0.0, 0.0], True), ([0.1], False)],
)
def test_a_candidate_no_worse_than_chance_is_level(differences: list[float], is_level: bool) -> None:
    assert auto.level(np.array(differences)) == is_level


def test_the_best_known_wins_where_the_rows_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [auto.Candidate("rotate", {}), auto.Candidate("hadamard", {}), auto.Candidate("os+", {})]
    given = iter(([3.0, 1.0, 2.0, 2.1], [1.0, 3.0, 2.0, 2.0], [9.0, 9.0, 9.0, 9.0]))
    monkeypatch.setattr(auto, "Judge", lambda *_: lambda _: next(given))
    data = batches("bert", 6, rows=2)
    best, trials = auto.choose(found, data, build("bert"), lambda *_: build("bert"), progress=False)
    assert best == found[0] and min(trials, key=lambda trial: trial.loss or 0.0).candidate == found[1]


def test_a_budget_ends_the_trials_and_none_takes_the_first() -> None:
    first = auto.candidates(scheme("w8a8-static"))[0]
    found = calib.quantize(build("llama"), data=batches("llama", 4), auto_seconds=0, progress=False)
    assert ",".join(found.recipe.methods) == first.method and found.report["auto"] == []
    assert any("untried" in note for note in found.plan.notes)


def test_a_candidate_that_the_model_refuses_is_named_and_left_out() -> None:
    def attempt(candidate: auto.Candidate, given: list[Any]) -> torch.nn.Module:
        if candidate.method == "b":
            return build("llama")
        raise InputError("does not fit", "try another")

    both = [auto.Candidate("a", {}), auto.Candidate("b", {})]
    best, trials = auto.choose(both, batches("llama", 4), build("llama"), attempt, progress=False)
    assert best.method == "b" and trials[0].loss is None and trials[0].why == "does not fit"


def test_a_stopped_run_goes_on_with_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    arguments: dict[str, Any] = {"data": batches("llama", 4), "out": tmp_path / "out", "progress": False}
    write = calib.engine.Journal.write

    def stop(self: Any, *given: Any, **more: Any) -> None:
        write(self, *given, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(calib.engine.Journal, "write", stop)
    with pytest.raises((KeyboardInterrupt, calib.CalibError)):
        calib.quantize(tmp_path / "model", "w8a8-static", verified=False, **arguments)
    monkeypatch.setattr(calib.engine.Journal, "write", write)
    kept = list(tmp_path.glob(".out.auto.json"))
    assert kept, "the choice lies beside the output"
    monkeypatch.setattr(auto, "choose", lambda *_, **__: pytest.fail("tried again"))
    result = calib.quantize(tmp_path / "model", "w8a8-static", verified=False, **arguments)
    assert any("as chosen before" in note for note in result.plan.notes)
    assert any(note.startswith("resumed: 1") for note in result.plan.notes)
    assert not list(tmp_path.glob(".out.auto.json")), "nothing is left beside a finished output"


def test_a_loss_that_is_not_finite_never_wins_and_one_window_judges_nothing() -> None:
    def attempt(candidate: auto.Candidate, given: list[Any]) -> torch.nn.Module:
        model = build("llama")
        if candidate.method == "a":
            model.lm_head.weight.fill_(torch.nan)  # type: ignore[union-attr,operator]
        return model

    both = [auto.Candidate("a", {}), auto.Candidate("b", {})]
    best, trials = auto.choose(both, batches("llama", 4), build("llama"), attempt, progress=False)
    assert best.method == "b" and trials[0].loss is None and "not finite" in trials[0].why
    best, trials = auto.choose(both, batches("llama", 1, rows=1), build("llama"), attempt, progress=False)
    assert best.method == "a" and trials == []


def test_what_the_caller_leaves_open_is_the_candidates_to_say() -> None:
    first = auto.candidates(scheme("w4a4"))[0]
    open_ = {"prefix": "auto", "refine": None, "batch_size": None, "samples": 4}  # as the command line passes them
    assert first.options_with(open_) == {**open_, **first.options} and first.options["prefix"] == "on"
    asked = {"prefix": "none", "refine": 0, "batch_size": 8}
    assert first.options_with(asked) == asked
    cost = calib.cost(build("llama"), "w4a4", progress=False, seq_len=32, **open_)
    assert (cost.recipe.prefix, cost.recipe.refine, cost.recipe.batch_size) == ("on", 40, 2)
