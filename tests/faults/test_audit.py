"""Plan and result agree, for every family and scheme; and the audit sees what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import calib
from calib.audit import audit
from tests.families import FAMILIES, batches, build, logits

SCHEMES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "w8a8": ("w8a8", "os+", {}),
    "w8a8-static, all sites": ("w8a8-static", "os+", {"sites": ("norm", "vo", "updown", "fc", "fused")}),
    "w4a8, rounded": ("w4a8", "os+,gptq", {}),
    "w6a6-static, rotated": ("w6a6-static", "rotate,os+", {}),
    "w4a16, grouped": ("w4a16", "awq", {"scheme_options": {"weight_group": 32}}),
    "w2a16": ("w2a16", "rtn", {"scheme_options": {"weight_group": 32}}),
}
QUICK = {("llama", "w8a8-static, all sites"), ("gpt2", "w4a8, rounded"), ("mixtral", "w8a8")}


def cases() -> list[Any]:
    return [
        pytest.param(family, scheme, marks=() if (family, scheme) in QUICK else pytest.mark.slow)
        for family in FAMILIES
        for scheme in SCHEMES
    ]


def made(family: str, scheme: str) -> calib.Result:
    name, method, options = SCHEMES[scheme]
    return calib.quantize(build(family), name, method, batches(family), progress=False, report=False, **options)


@pytest.mark.parametrize("family, scheme", cases())
def test_result_is_as_planned(family: str, scheme: str, tmp_path: Path) -> None:
    result = made(family, scheme)
    assert audit(build(family), result) == []
    data = batches(family, 1)[0]
    want = logits(result.model, data)
    result.save(tmp_path / "out", "calib", verified=False)
    loaded = calib.load(tmp_path / "out", mode="fake")
    assert torch.allclose(logits(loaded, data), want, atol=1e-5 * float(want.abs().max()))
    result.network = loaded
    assert audit(build(family), result) == [], "and what is saved is"


def changed_norm(result: calib.Result) -> None:
    result.model.get_parameter("model.norm.weight").data[3] += 1


def put_back(result: calib.Result) -> None:
    result.model.set_submodule("model.layers.0.mlp.up_proj", nn.Linear(64, 96, bias=False))


def unreasoned(result: calib.Result) -> None:
    result.plan.entries["lm_head"].reason = ""


def unproven(result: calib.Result) -> None:
    next(record for record in result.report["sites"].values() if "proof" in record).pop("proof")


def single_code(result: calib.Result) -> None:
    module: Any = result.model.get_submodule("model.layers.1.mlp.down_proj")
    module.codes().zero_()


DAMAGE: dict[str, tuple[Callable[[calib.Result], None], str]] = {
    "norm": (changed_norm, "model.norm.weight is in no plan and was changed"),
    "linear": (put_back, "model.layers.0.mlp.up_proj is planned and was left as it was"),
    "reason": (unreasoned, "lm_head is excluded without a reason"),
    "proof": (unproven, "is transformed without a proof"),
    "codes": (single_code, "model.layers.1.mlp.down_proj holds a single code"),
}


def test_the_audit_sees_what_is_wrong() -> None:
    for damage, line in DAMAGE.values():
        result = made("llama", "w8a8")
        damage(result)
        found = audit(build("llama"), result)
        assert any(line in each for each in found), (line, found)


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    for options in ({"exclude": ("nose",)}, {"overrides": (("nose", "w4a8"),)}):
        with pytest.raises(calib.InputError, match="nose"):
            calib.quantize(build("llama"), "w8a8", "rtn", batches("llama"), progress=False, scheme_options=options)
