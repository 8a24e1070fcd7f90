"""Recipes drawn at random: what is written answers as what was computed, killed or not, or is refused by name."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import calib
from calib.engine.journal import Journal
from calib.errors import InputError
from calib.export.hf import set_mode
from tests.families import FAMILIES, batches, build, logits

SCHEMES = [
    "w8a8",
    "w8a8-static",
    "w6a6",
    "w6a6-static",
    "w4a8",
    "w4a8-static",
    "w4a4-static",
    "w4a16",
    "w3a16",
    "w3a8",
    "w2a16-fdb",
    "fp8",
    "fp8-static",
    "w2a8",
]
FIRST = ["os+", "os+", "os+", "smoothquant:0.6", "awq", "hadamard,os+", "rotate,os+", "rotate:16", "hadamard", ""]
ROUNDING = ["rtn", "gptq", "gptq", "gptaq"]
LEARNED = ("rounding", "clipping", "inputs", "scale", "shift")


class Killed(KeyboardInterrupt):
    pass


def drawn(r: random.Random) -> dict[str, Any]:
    """Arguments of calib.quantize, not all of them possible."""
    scheme = r.choice(SCHEMES)
    methods = [r.choice(FIRST), r.choice(ROUNDING), r.choice(["", "", "low_rank"])]
    formats: dict[str, Any] = {"weight_group": 16} if scheme[:2] in ("w2", "w3") or scheme == "w4a16" else {}
    sometimes: dict[str, Any] = {
        "weight_group": r.choice([0, 16, 32]),
        "weight_symmetric": r.random() < 0.5,
        "input_symmetric": r.random() < 0.5,
        "kv_bits": r.choice([8, 4]),
        "attention_bits": 8,
        "overrides": ((r"\.0\.", "w8a8"),),
    }
    formats |= {name: value for name, value in sometimes.items() if r.random() < 0.2}
    options: dict[str, Any] = {"prefix": r.choice(["none", "none", "auto", (7,), (7, 9)])}
    if methods[2]:
        options |= r.choice([{"keep": 0.7}, {"rank": 4}, {"rank": 4, "factors": "int8"}])
    if r.random() < 0.4:
        options |= {"refine": 6, "learn": tuple(r.sample(LEARNED, r.randint(1, 5)))}
    sometimes = {
        "float_rows": 0.02,
        "bias_correction": True,
        "inputs": "float",
        "shift": r.random() < 0.5,
        "objective": "output",
        "sites": r.choice([("norm",), ("norm", "vo"), ("norm", "vo", "updown", "fc")]),
        "dtype": torch.bfloat16,
    }
    options |= {name: value for name, value in sometimes.items() if r.random() < 0.2}
    return {"scheme": scheme, "method": ",".join(filter(None, methods)), "scheme_options": formats, **options}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
def test_a_random_recipe_is_kept_or_refused(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = random.Random(seed)
    while True:
        family, arguments = r.choice(list(FAMILIES)), drawn(r)
        common = {"data": batches(family, 6), "batch_size": 2, "progress": False, "report": False, "verified": False}
        build(family).save_pretrained(tmp_path / family)
        try:
            result = calib.quantize(tmp_path / family, out=tmp_path / "out", **arguments, **common)
            break
        except InputError:
            pass
    print(family, arguments)
    batch = batches(family, 1, seed=5)[0]
    packed, fake = (logits(set_mode(result.model, mode), batch).float() for mode in ("packed", "fake"))
    assert torch.isfinite(fake).all()
    if "dtype" not in arguments:  # the int4 kernel of bf16 models rounds
        assert float((packed - fake).abs().max()) <= 1e-4 * float(fake.abs().max())
    assert torch.equal(logits(calib.load(tmp_path / "out", mode="fake"), batch).float(), fake)

    write, written = Journal.write, []

    def killed(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        written.append(args[1])
        if len(written) == 1:
            raise Killed

    monkeypatch.setattr(Journal, "write", killed)
    with pytest.raises((Killed, calib.errors.Interrupted)):
        calib.quantize(tmp_path / family, out=tmp_path / "again", **arguments, **common)
    calib.quantize(tmp_path / family, out=tmp_path / "again", **arguments, **common)
    assert len(written) == len(set(written)), "no block is computed twice"
    first, second = tensors(tmp_path / "out"), tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key].float(), second[key].float())]
    assert not different
