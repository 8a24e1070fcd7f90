"""A model that hears sound: features in, through the one call to a reload, and the data it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import calib
from calib.audit import audit
from calib.data import calibration_data
from calib.engine.run import share_of
from calib.errors import DataError
from calib.model import positions
from tests import families


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    (found,) = families.batches("whisper", count=1, rows=6, length=12)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, batch: dict[str, Tensor]) -> Path:
    path = tmp_path_factory.mktemp("speech")
    families.build("whisper").save_pretrained(path / "model")
    save_file(batch, path / "features.safetensors")
    return path


@pytest.mark.parametrize(("scheme", "method"), [("w8a8-static", "os+"), ("w4a8", "rotate:16,os+,gptq")])
def test_from_a_folder_to_a_reload(folder: Path, batch: dict[str, Tensor], scheme: str, method: str) -> None:
    out, given = folder / scheme, {"samples": 6, "batch_size": 2, "progress": False}
    result = calib.quantize(folder / "model", scheme, method, folder / "features.safetensors", out, **given)
    model = families.build("whisper")
    assert audit(model, result) == []
    encoder = [name for name in result.plan.quantized() if ".encoder.layers" in name]
    decoder = [name for name in result.plan.quantized() if ".decoder.layers" in name]
    assert len(encoder) == 2 * 6 and len(decoder) == 2 * 10
    again = calib.load(out)
    with torch.no_grad():
        wanted, found = model(**batch).logits, again(**batch).logits
        assert torch.allclose(found, result.model(**batch).logits, atol=1e-3 * float(wanted.abs().max()))
    assert float((found - wanted).square().sum() / wanted.square().sum()) < (1e-3 if scheme == "w8a8-static" else 0.05)
    assert calib.verify(out).top1 > 0.99


def test_its_plan_comes_from_the_config_alone(folder: Path) -> None:
    cost = calib.cost(folder / "model/config.json", method="os+", samples=6, seq_len=12, batch_size=2, progress=False)
    assert len(cost.plan.quantized()) == 2 * 6 + 2 * 10


def test_its_data_is_counted_by_the_decoder_and_numbered_by_the_longest(batch: dict[str, Tensor]) -> None:
    data = calibration_data([batch], None, samples=4)
    assert (data.rows, data.tokens) == (4, 48)
    assert positions(data[0]) == 4 * 100
    other = {**batch, "input_features": batch["input_features"] + 1}
    assert calibration_data([other], None, samples=4).fingerprint != data.fingerprint
    share = share_of([data[0], data[0]], 0, 1)
    assert share.first == sorted(set(share.first)) and share.first[-1] - share.first[-2] >= 4 * 50


WRONG = {
    "no transcript": ({"input_features": torch.zeros(2, 16, 100)}, "decoder_input_ids"),
    "one row too many": (
        {"input_features": torch.zeros(2, 16, 100), "decoder_input_ids": torch.ones(3, 4).long()},
        "[3, 4]",
    ),
    "not finite": (
        {"input_features": torch.full((1, 16, 100), torch.inf), "decoder_input_ids": torch.ones(1, 4).long()},
        "inf",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_data_is_refused_by_name(case: str) -> None:
    item, word = WRONG[case]
    with pytest.raises(DataError) as caught:
        calibration_data([item], None)
    assert word in str(caught.value) and caught.value.fix


def test_text_calibrates_no_ear(folder: Path) -> None:
    with pytest.raises(DataError, match="hears sound"):
        calib.quantize(folder / "model", progress=False)


def test_a_token_file_of_uneven_rows_or_none_is_refused(tmp_path: Path) -> None:
    uneven = {"input_ids": torch.ones(3, 4).long(), "attention_mask": torch.ones(2, 4).long()}
    save_file(uneven, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"no tensors")
    for name in ("a", "b", "c"):
        with pytest.raises(DataError, match=f"{name}.safetensors"):
            calibration_data(tmp_path / f"{name}.safetensors", None)
    save_file({"input_ids": torch.arange(20).view(5, 4)}, tmp_path / "d.safetensors")
    data = calibration_data(tmp_path / "d.safetensors", None, samples=4, batch_size=3)
    assert [len(batch["input_ids"]) for batch in data] == [3, 1]
