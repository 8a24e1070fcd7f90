"""Per-linear weight formats: the first rule that matches counts, in plan, search, rounding, checkpoint; each must."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import calib
from calib.errors import InputError
from calib.nn import QuantLinear
from calib.quantizers import AffineSpec
from calib.recipe import Override, Scheme, scheme
from tests.families import batches, build

EIGHT = AffineSpec(8)
FOUR = AffineSpec(4, granularity="group", group_size=8, range="mse")


def run(overrides: tuple, method: str = "os+,gptq", name: str = "w4a16", **options: object) -> calib.Result:
    chosen = scheme(name, weight_group=8 if name == "w4a16" else None, overrides=overrides)
    return calib.quantize(
        build("llama"), chosen, method, batches("llama", 2), samples=4, seq_len=16, progress=False, **options
    )


@pytest.mark.parametrize("name", ["w4a16", "w4a8-static"])
def test_each_linear_has_the_format_of_the_first_rule_that_matches(name: str) -> None:
    result = run((("q_proj|layers\\.0.*down", EIGHT), ("layers\\.0", AffineSpec(6))), name=name)
    chosen = result.recipe.scheme
    modules = {n: m for n, m in result.network.named_modules() if isinstance(m, QuantLinear)}
    assert modules.keys() == set(result.plan.quantized())
    for path, module in modules.items():
        assert module.weight_spec == chosen.weights_of(path)
        assert result.plan.entries[path].bits >= module.weight_spec.bits
    bits = {path.split("model.layers.")[1]: m.weight_spec.bits for path, m in modules.items()}
    assert bits["0.self_attn.q_proj"] == bits["1.self_attn.q_proj"] == bits["0.mlp.down_proj"] == 8
    assert bits["0.self_attn.k_proj"] == 6 and bits["1.self_attn.k_proj"] == bits["1.mlp.down_proj"] == 4


def test_mixed_formats_are_written_and_read_back(tmp_path: Path) -> None:
    result = run((("layers\\.0", "w8a8"),), out=tmp_path / "mixed", format="calib")
    assert result.report["verify"]["max_difference"] == 0
    again = calib.load(tmp_path / "mixed")
    bits = {m.weight_spec.bits for n, m in again.named_modules() if isinstance(m, QuantLinear) and "layers.0" in n}
    assert bits == {8}


def test_overriding_with_the_same_format_changes_nothing() -> None:
    ids = batches("llama", 1)[0]
    with torch.no_grad():
        plain, same = (run(o).network(**ids).logits for o in ((), (("mlp", FOUR), ("q_proj", FOUR))))
    assert torch.equal(plain, same)


def test_a_rule_that_changes_nothing_is_refused_by_name() -> None:
    for rules in ((("nose", EIGHT),), ((".", EIGHT), ("q_proj", FOUR))):
        with pytest.raises(InputError, match=f"override rule '{rules[-1][0]}' changes no"):
            run(rules)
    with pytest.raises(InputError, match="not a regular expression"):
        scheme("w4a16", overrides=(("(", EIGHT),))


def test_a_scheme_with_overrides_survives_json() -> None:
    one = scheme("w4a16", overrides=(Override(rule="q", weights=EIGHT), ("k", "w6a6")))
    assert Scheme.model_validate_json(one.model_dump_json()) == one
