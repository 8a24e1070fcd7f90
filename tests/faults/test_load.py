"""Many at once: threads and forks load, run and generate the same; nothing grows."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import calib
from calib.nn import ActivationQuantizer, QuantLinear
from calib.quantizers import AffineSpec
from tests.families import batches, build
from tests.faults import soak

IDS = torch.arange(3, 27).reshape(2, 12)
SCHEMES = ("w8a8-static", "w8a8", "w4a8", "w4a16")


@pytest.fixture(scope="module", params=SCHEMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"scheme_options": {"weight_group": 16}} if request.param == "w4a16" else {}
    result = calib.quantize(
        build("llama"), request.param, "os+" if "a8" in request.param else "rtn", batches("llama"),
        prefix=(7,) if request.param == "w8a8-static" else "none", progress=False, report=False, **options,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("load") / "out"
    result.save(out, verified=False)
    return out


def answers(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    return logits, tokens


def same(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_eight_threads_load_and_run_the_same(folder: Path) -> None:
    want, gate = answers(calib.load(folder)), threading.Barrier(8)

    def work(_: int) -> bool:
        gate.wait()
        model = calib.load(folder)
        return all(same(answers(model), want) for _ in range(3))

    patched = (PreTrainedModel.tie_weights, PreTrainedModel.init_weights, torch.nn.init.normal_)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert patched == (PreTrainedModel.tie_weights, PreTrainedModel.init_weights, torch.nn.init.normal_)


def test_eight_threads_share_one_model(folder: Path) -> None:
    shared = calib.load(folder)
    want, gate = answers(calib.load(folder)), threading.Barrier(8)

    def work(_: int) -> bool:
        gate.wait()  # kernels are chosen at the first forward: by all at once
        return all(same(answers(shared), want) for _ in range(3))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_threads_that_join_layers_at_once_get_their_own_results() -> None:
    torch.manual_seed(0)
    rows = [torch.randn(n, 64) for n in (1, 5, 1, 7, 2, 1) * 3]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # a thread may be left between any two steps of another
    try:
        for seed in range(40):
            layers = [static_linear(seed, 32 + 16 * n) for n in range(3)]
            want = [[layer.set_mode("fake")(x) for layer in layers] for x in rows]
            for layer in layers:
                layer.set_mode("packed")
            gate = threading.Barrier(4)

            def work(k: int, layers: list[QuantLinear] = layers, gate: threading.Barrier = gate) -> list[list[Tensor]]:
                gate.wait()
                return [[layer(x) for layer in layers] for x in (rows[k:] + rows[:k])]

            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                for k, found in enumerate(pool.map(work, range(4))):
                    turned = want[k:] + want[:k]
                    assert all(same(tuple(a), tuple(b)) for a, b in zip(found, turned, strict=True))  # type: ignore[arg-type]
    finally:
        sys.setswitchinterval(interval)


def static_linear(seed: int, out: int) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed + out)
    quantizer = ActivationQuantizer(AffineSpec(8, False, "tensor"), 64)
    quantizer.scale, quantizer.zero_point = torch.tensor([0.03]), torch.tensor([3], dtype=torch.int32)
    weight = torch.randn(out, 64, generator=generator)
    return QuantLinear.from_float(weight, torch.randn(out, generator=generator), AffineSpec(8), quantizer)


def _in_child(folder: Path, model: torch.nn.Module, want: tuple[Tensor, Tensor], out: object) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    out.put(same(answers(model), want) and same(answers(calib.load(folder)), want))  # type: ignore[attr-defined]


def test_forked_processes_run_the_parents_model(folder: Path) -> None:
    model = calib.load(folder)
    want = answers(model)
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    children = [context.Process(target=_in_child, args=(folder, model, want, out)) for _ in range(3)]
    for child in children:
        child.start()
    found = [out.get(timeout=120) for _ in children]
    for child in children:
        child.join(30)
    assert found == [True] * 3 and all(child.exitcode == 0 for child in children)
    assert same(answers(model), want)


def slope(text: str) -> float:
    found = re.search(r"slope of the second half: (-?[\d.]+) ", text)
    assert found
    return float(found[1])


def test_quantizing_over_and_over_keeps_nothing() -> None:
    assert slope(soak.soak(soak.round_trip, 1500, None)) < 512  # a kept [48, 64] weight is 12 KiB a cycle


@pytest.mark.slow
def test_whole_jobs_keep_no_handle() -> None:
    text = soak.soak(soak.whole_job, 40, None)
    files = re.search(r"open files (\d+) then (\d+), threads (\d+) then (\d+)", text)
    assert files and int(files[2]) <= int(files[1]) + 1 and int(files[4]) <= int(files[3]) + 1, text
