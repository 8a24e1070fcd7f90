"""Low-bit schemes end to end: planned, run, written at the computed size, verified in a fresh process, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import calib
from calib.errors import InputError
from calib.nn import QuantLinear
from calib.quantizers import LevelSpec
from calib.recipe import LOW_BIT, Recipe, Scheme, scheme
from tests.families import batches, build, logits

NAMES = [name.format(acts) for name in LOW_BIT for acts in ("a16", "a8")]


def run(name: str | Scheme, method: str = "rtn", **options: object) -> calib.Result:
    chosen = scheme(name, weight_group=32) if isinstance(name, str) else name
    data = batches("llama", 2)
    return calib.quantize(build("llama"), chosen, method, data, samples=8, seq_len=24, progress=False, **options)


def saved(result: calib.Result, folder: Path) -> None:
    """On disk the quantized linears take what the plan says, within 1 %."""
    modules = {n: m for n, m in result.network.named_modules() if isinstance(m, QuantLinear)}
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        names = [k for k in file.keys() if k.rpartition(".")[0] in modules]  # noqa: SIM118
        tensors = [file.get_tensor(k) for k in names if not k.endswith(".bias")]
    planned = sum(result.plan.entries[n].bits * m.in_features * m.out_features for n, m in modules.items()) / 8
    assert sum(t.nbytes for t in tensors) == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("name", ["w2a16-fdb", pytest.param("w1.58a8", marks=pytest.mark.slow)])
def test_a_fresh_process_answers_with_the_same_bits(name: str, tmp_path: Path) -> None:
    result = run(name, "os+,gptq", bias_correction=True, out=tmp_path / "low", format="calib")
    assert result.report["verify"]["max_difference"] == 0
    saved(result, tmp_path / "low")
    again, ids = calib.load(tmp_path / "low"), batches("llama", 1)[0]
    assert torch.equal(logits(again, ids), logits(result.model, ids))
    assert all(m.bias is not None for m in again.modules() if isinstance(m, QuantLinear))


@pytest.mark.parametrize("name", NAMES)
def test_each_scheme_runs_and_is_written_at_its_size(name: str, tmp_path: Path) -> None:
    result = run(name)
    result.save(tmp_path / "low", verified=False)
    assert result.report["format"].startswith("calib: compressed-tensors cannot express weights on a")
    saved(result, tmp_path / "low")
    collapse = any("recovery training" in note for note in result.plan.notes)
    assert collapse == name.startswith(("w1a", "w1.58")), "below 2 bits the plan says what to expect"
    described = result.recipe.model_dump_json()
    assert Recipe.model_validate_json(described) == result.recipe


def test_compressed_tensors_takes_lsq_and_refuses_the_rest_by_name(tmp_path: Path) -> None:
    for name, kind in (("w2a16", "seq"), ("w1a16", "binary"), ("w2a16-fdb", "dual-binary")):
        with pytest.raises(InputError, match=f"weights on a {kind} grid"):
            run(name, format="compressed-tensors")
    lsq = LevelSpec(kind="lsq", levels=8, granularity="group", group_size=32)
    result = run(Scheme(name="lsq", weights=lsq))
    result.save(tmp_path / "stock", format="compressed-tensors", verified=False)
    again, ids = calib.load(tmp_path / "stock"), batches("llama", 1)[0]
    assert torch.allclose(logits(again, ids), logits(result.network, ids), atol=1e-5)


def test_first_and_last_block_may_stay_at_eight_bits() -> None:
    result = run(scheme("w2a16", weight_group=32, overrides=((r"layers\.1\.", "w8a8"),)))
    bits = {n: m.weight_spec.bits for n, m in result.network.named_modules() if isinstance(m, QuantLinear)}
    assert {b for n, b in bits.items() if "layers.1." in n} == {8} and {b for n, b in bits.items() if ".0." in n} == {2}


def test_bias_correction_lowers_the_output_error() -> None:
    ids = batches("llama", 1)[0]
    want = logits(build("llama"), ids)
    left = [(logits(run("w2a16", bias_correction=on).network, ids) - want).norm() for on in (False, True)]
    assert left[1] < left[0]


def test_options_that_a_grid_lacks_are_refused() -> None:
    with pytest.raises(InputError, match="the seq grid has no symmetric to change"):
        scheme("w2a16", weight_symmetric=False)
    with pytest.raises(InputError, match="no range rule 'percentile'"):
        scheme("w2a16", weight_range="percentile")
    assert scheme("w2a16", weight_range="minmax").weights.range == "published"
