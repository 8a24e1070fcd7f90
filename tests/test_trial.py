"""Ways of choosing ranks, tried on the whole model: what a trial says is what truncating everything does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import calib
from calib.engine.survey import Survey, survey
from calib.engine.trial import Frames
from calib.methods import LowRank
from calib.model import Resident, make_plan
from calib.recipe import recipe, scheme
from calib.solvers import bases
from tests.families import batches, build, logits

KEEP = 0.5


def test_a_frame_gives_the_best_rank_within_what_bf16_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(24, 40, generator=generator), torch.randn(64, 40, generator=generator)
    found = bases(weight, rows.T @ rows / 64)
    frames = Frames([])
    frames.add("w", found.up, 40)
    b, a = found.factors(9)
    torch.testing.assert_close(frames.truncated("w", weight, 9), (b @ a).float(), rtol=0.02, atol=0.02)
    assert frames.kept[0].shape == (24, (24 * 40 - 1) // 64)


def tried(name: str) -> tuple[nn.Module, Survey, dict[str, dict[str, int | None]]]:
    """The model after a trial of two rank choices, what the survey found, and the choices."""
    model, data = build(name), batches(name)
    chosen = recipe(scheme("none"), "low_rank", keep=KEEP)
    plan = make_plan(model, chosen, data[0])
    names = plan.quantized()
    ways: dict[str, dict[str, int | None]] = {
        "half": {n: max(1, min(plan.entries[n].shape) // 4) for n in names},
        "first only": {n: 1 if i == 0 else None for i, n in enumerate(names)},
    }
    with torch.no_grad():
        found = survey(model, plan, LowRank(chosen), data, Resident(), list, 0, lambda _: ways)
    return model, found, ways


@pytest.mark.parametrize("name", ["llama", "opt", pytest.param("bloom", marks=pytest.mark.slow)])
def test_distances_are_those_of_a_truncated_copy(name: str) -> None:
    model, found, ways = tried(name)
    before, data = build(name), batches(name)
    for key, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    grams: dict[str, torch.Tensor] = {}

    def add(path: str, rows: torch.Tensor) -> None:
        grams[path] = grams.get(path, torch.zeros(())) + rows.T @ rows

    handles = [
        before.get_submodule(p).register_forward_pre_hook(lambda _, args, p=p: add(p, args[0].double().flatten(0, -2)))
        for p in ways["half"]
    ]
    for batch in data:
        logits(before, batch)
    for handle in handles:
        handle.remove()
    for way, ranks in ways.items():
        copied = copy.deepcopy(before)
        for path, rank in ranks.items():
            if rank is not None:
                weight = copied.get_submodule(path).weight
                assert isinstance(weight, nn.Parameter)
                b, a = bases(weight.detach(), grams[path]).factors(rank)
                weight.data = (b @ a).float()
        moved = total = 0.0
        for batch in data:
            want, got = (logits(m, batch).log_softmax(-1) for m in (before, copied))
            moved += float(F.kl_div(got, want, reduction="sum", log_target=True))
            total += want.shape[:-1].numel()
        assert found.trial[way] == pytest.approx(moved / total, rel=0.03)
    assert 0 < found.trial["first only"] < found.trial["half"]


def test_a_model_without_logits_is_judged_by_its_output() -> None:
    _, found, _ = tried("bert")
    assert 0 < found.trial["first only"] < found.trial["half"] < 4


def test_auto_takes_what_moves_the_answers_least_and_says_so() -> None:
    def ranks(select: str) -> tuple[dict[str, int | None], list[str]]:
        result = calib.quantize(
            build("llama"), "none", "low_rank", batches("llama"), keep=KEEP, select=select, progress=False
        )
        return {name: entry.rank for name, entry in result.plan.entries.items()}, result.plan.notes

    found, notes = ranks("auto")
    (note,) = [note for note in notes if note.startswith("ranks are")]
    best, told = note.split()[2], note.partition("(")[2].rstrip(")").split(", ")
    values = {way: float(value) for way, value in (part.split(": ") for part in told)}
    assert values[best] == min(values.values()) and values.keys() == {"0.0", "0.5", "0.75", "1.0"}
    for select, way in (("global", "0.0"), ("uniform", "1.0")):
        explicit, notes = ranks(select)
        assert (explicit == found) == (way == best)
        assert not any(note.startswith("ranks are") for note in notes)
