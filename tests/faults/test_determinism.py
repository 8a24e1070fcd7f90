"""The same seed gives the same bits: run to run, in any order of the data where the method allows, on any threads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import calib
from calib import cli, prepare
from calib.errors import VerifyError
from calib.files import sha256
from tests.families import batches, build


def saved(data: list[dict[str, Tensor]], scheme: str, method: str, **options: Any) -> dict[str, Tensor]:
    """Every tensor of a quantized llama."""
    result = calib.quantize(
        build("llama"), scheme, method, data, prefix="none", progress=False, report=False, **options
    )
    return result.model.state_dict()


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("scheme", "method", "options"),
    [
        ("w8a8-static", "os+", {}),
        ("w4a8", "rotate,os+,gptq", {}),
        ("w4a8-static", "hadamard,os+,gptaq", {"refine": 4}),
        ("w3a16", "awq", {"scheme_options": {"weight_group": 16}}),
    ],
)
def test_run_to_run(scheme: str, method: str, options: dict[str, Any]) -> None:
    first, second = (saved(batches("llama"), scheme, method, **options) for _ in range(2))
    assert differing(first, second) == []


def test_the_order_of_the_data_does_not_move_extremes() -> None:
    rows = batches("llama", count=6, rows=1)
    turned = [rows[i] for i in (4, 2, 0, 5, 1, 3)]
    first, second = (saved(data, "w8a8-static", "rtn", inputs="float") for data in (rows, turned))
    assert differing(first, second) == []


def test_the_number_of_threads_moves_nothing_beyond_rounding() -> None:
    """A product split over threads may add in another order: scales agree to fp32, codes but for ties."""
    found = []
    for count in (1, 2):
        with threads(count):
            found.append(saved(batches("llama"), "w8a8-static", "os+"))
    for name in differing(*found):
        a, b = (each[name] for each in found)
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < 1e-3, name


def test_a_manifest_says_what_it_was_made_of_and_verify_recomputes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a checkpoint, of one tuned from it and of one converted from it."""
    for name in ("float", "other"):
        build("llama").save_pretrained(tmp_path / name)
    sharpened = load_file(tmp_path / "other" / "model.safetensors")
    sharpened["model.norm.weight"] *= 2
    save_file(sharpened, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    out = {name: tmp_path / name for name in ("made", "tuned", "stock")}
    common: dict[str, Any] = {"progress": False, "report": False}
    calib.quantize(str(tmp_path / "float"), "w8a8", "rtn", batches("llama"), out["made"], **common)
    calib.tune(
        out["made"], str(tmp_path / "float"), batches("llama"), out["tuned"], steps=1, progress=False, verified=False
    )
    calib.convert(out["made"], "compressed-tensors", out["stock"], verified=False)
    said = {name: json.loads((folder / "calib.json").read_text()) for name, folder in out.items()}
    for name, manifest in said.items():
        assert {"model", "data", "recipe", "code"} <= set(manifest["made_of"]), name
        assert manifest["model"]["model.safetensors"] == sha256(tmp_path / "float" / "model.safetensors")
        prepare.check_source(out[name], tmp_path / "float")
        assert cli.run(["verify", str(out[name]), "--model", str(tmp_path / "other"), "-q"]) == 7
        assert "model.safetensors differs" in capsys.readouterr().err
    assert cli.run(["verify", str(out["made"]), "--model", str(tmp_path / "float"), "-q"]) == 0
    assert said["made"]["made_of"]["data"] == said["stock"]["made_of"]["data"]
    assert {"tuning", "tuning_data"} <= set(said["tuned"]["made_of"])
    for key, change in (("recipe", {"seed": 5}), ("data", {"tokens": 1}), ("model", {"config.json": "0"})):
        wrong = {**said["made"], key: {**said["made"][key], **change}}
        (out["made"] / "calib.json").write_text(json.dumps(wrong))
        with pytest.raises(VerifyError, match=f"says of the {key} is not what was written"):
            calib.verify(out["made"])
