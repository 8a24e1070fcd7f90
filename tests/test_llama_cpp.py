"""GGUF files in llama.cpp itself: its logits are those of the simulated model, but for the inputs that it rounds.

Skipped without llama-cpp-python, which PyPI has as source: ``pip install llama-cpp-python`` builds it in some minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import calib
from calib.export.verify import reference_of
from tests.families import batches, build
from tests.test_formats import AS_RELEASED

llama_cpp = pytest.importorskip("llama_cpp")

KINDS = {"Q8_0": (8, True), "Q4_0": (4, True), "Q4_1": (4, False)}
FAMILIES = {name: lambda name=name: build(name) for name in ("llama", "bloom", "phi3")} | AS_RELEASED  # type: ignore[misc]


def answer(file: Path, ids: Tensor) -> Tensor:
    """Logits [T, V] of llama.cpp."""
    model = llama_cpp.Llama(str(file), n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False)
    try:
        model.eval(ids.tolist())
        return torch.from_numpy(np.array(model.scores[: len(ids)]))
    finally:
        model.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_answers_like_the_simulated_model(kind: str, family: str, tmp_path: Path) -> None:
    bits, symmetric = KINDS[kind]
    torch.manual_seed(0)
    scheme: dict[str, Any] = {"weight_bits": bits, "weight_group": 32, "weight_symmetric": symmetric}
    data = batches("llama")
    result = calib.quantize(
        FAMILIES[family](), "w4a16", "rtn", data, samples=8, seq_len=24, progress=False, scheme_options=scheme
    )
    result.save(tmp_path / "out", "gguf", verified=False)
    ids = data[0]["input_ids"][0]
    want = reference_of(result.model, {"input_ids": ids[None]}, "gguf")[0]
    got = answer(tmp_path / "out" / "model.gguf", ids)
    assert float((got - want).abs().max()) <= 3e-2 * float(want.max() - want.min())
