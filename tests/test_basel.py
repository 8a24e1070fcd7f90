"""The training loop, the modules it trains, and Basel through the one call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import calib
from calib.errors import InputError, NumericsError
from calib.methods.basel import decompose, finetune, select
from calib.nn import BasisLinear, LowRankLinear, changed_linears
from calib.tuning import Tuning, next_token_loss, tune
from tests.families import batches, build, logits

DATA = batches("llama", count=6)


class Stop(Exception):
    pass


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(next_token_loss(model)(batch)) for batch in DATA) / len(DATA)


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "mlp" in name}


def test_training_learns_and_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, model = build("llama"), build("llama")
    before = loss_of(whole)
    tuning = Tuning(12, lr=1e-2, every=5)
    losses = tune([(factors(whole), 1.0)], next_token_loss(whole), DATA, tuning)
    assert loss_of(whole) < before - 0.1
    assert not any(p.requires_grad for p in whole.parameters())

    def stop(step: int) -> None:
        if step == 7:
            raise Stop

    with pytest.raises(Stop):
        tune([(factors(model), 1.0)], next_token_loss(model), DATA, tuning, before_step=stop, file=tmp_path / "s")
    again = build("llama")
    assert tune([(factors(again), 1.0)], next_token_loss(again), DATA, tuning, file=tmp_path / "s") == losses
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    with pytest.raises(InputError, match="other settings"):
        tune([(factors(again), 1.0)], next_token_loss(again), DATA, Tuning(13), file=tmp_path / "s")
    (tmp_path / "s").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="damaged"):
        tune([(factors(again), 1.0)], next_token_loss(again), DATA, tuning, file=tmp_path / "s")


def test_a_loss_that_is_not_finite_is_named() -> None:
    model = build("llama")
    with pytest.raises(NumericsError, match="step 0"):
        tune([(factors(model), 1.0)], lambda batch: next_token_loss(model)(batch) * float("nan"), DATA, Tuning(2))


def test_bases_before_training_are_the_linear_bias_included() -> None:
    """The reference implementation drops biases; OPT has them."""
    model = build("opt")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    for found in (decompose(model, names, batches("opt")), decompose(model, names, None)):
        for name in names:
            linear, x = model.get_submodule(name), torch.randn(5, model.get_submodule(name).in_features)
            size = found[name].energy.sqrt()
            layer = BasisLinear(
                found[name].up, found[name].down / size[:, None], size, linear.bias, 4, 0, torch.float32
            )
            assert torch.allclose(layer(x), linear(x), atol=1e-3)
            assert torch.allclose(layer.merged(), linear.weight, atol=1e-3)


def test_masks_only_lose_bases_and_ranks_fit_the_budget() -> None:
    torch.manual_seed(0)
    layers = {}
    for name in "ab":
        u, s, vt = torch.linalg.svd(torch.randn(24, 16), full_matrices=False)
        layers[name] = BasisLinear(u, vt, s, None, 2, 0, torch.float32)
    lost = torch.zeros(2, 16, dtype=torch.bool)
    for keep in (0.9, 0.6, 0.45):
        ranks = select(layers, [1.0, 1.0], keep * 2 * 24 * 16)
        assert sum(24 * 16 if r is None else r * 40 for r in ranks) <= keep * 2 * 24 * 16
        now = torch.stack([layer.mask == 0 for layer in layers.values()])
        assert bool((now | ~lost).all()), "a masked basis came back"
        lost = now
        for layer, rank in zip(layers.values(), ranks, strict=True):
            layer.t.data.uniform_(0.5, 2)
            if rank is not None:
                layer.new_up.data.normal_()
                b, a = layer.factors()
                assert b.shape[1] == len(a) == rank
                assert torch.allclose(b @ a, layer.merged(), atol=1e-4)
    assert lost.any()


@pytest.mark.parametrize("method", ["basel", "basel:svd"])
def test_basel_through_the_one_call(method: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    options = {"keep": 0.5, "steps": 24, "lr": 3e-3, "new_bases": 2, "progress": False}
    plain = calib.quantize(build("llama"), "none", "low_rank", DATA, keep=0.5, progress=False)
    result = calib.quantize(tmp_path / "model", "none", method, DATA, tmp_path / "out", verified=False, **options)  # type: ignore[arg-type]
    assert loss_of(result.model) < loss_of(plain.model)
    again = calib.load(tmp_path / "out")
    assert torch.equal(logits(again, DATA[0]), logits(result.model, DATA[0]))
    entries = [e for e in result.plan.entries.values() if e.rank is not None or "dense" in e.reason]
    kept = sum(e.rank * sum(e.shape) if e.rank else e.shape[0] * e.shape[1] for e in entries)
    assert kept <= 0.5 * sum(e.shape[0] * e.shape[1] for e in entries)
    assert {e.name for e in entries if e.rank} == changed_linears(again).keys()
    assert not list(tmp_path.glob(".out*"))
    assert len(result.report["importance_loss"]) + len(result.report["factor_loss"]) == 24


def test_killed_between_its_stages_it_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    options = {"keep": 0.5, "steps": 8, "progress": False, "verified": False}
    whole = calib.quantize(tmp_path / "model", "none", "basel", DATA, **options)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr("calib.methods.basel.finetune", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            calib.quantize(tmp_path / "model", "none", "basel", DATA, tmp_path / "out", **options)  # type: ignore[arg-type]
    state = list(tmp_path.glob(".out.tuning/*/importance.safetensors"))
    assert len(state) == 1
    again = calib.quantize(tmp_path / "model", "none", "basel", DATA, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert again.report["importance_loss"] == whole.report["importance_loss"]
    assert torch.equal(logits(again.model, DATA[0]), logits(whole.model, DATA[0]))
    assert not (tmp_path / ".out.tuning").exists()


def test_the_baseline_is_tuned_by_the_same_loop() -> None:
    plain = calib.quantize(build("llama"), "none", "low_rank:svd-llm", DATA, keep=0.5, progress=False).model
    before = loss_of(plain)
    names = [n for n, m in changed_linears(plain).items() if isinstance(m, LowRankLinear)]
    assert len(finetune(plain, names, DATA, Tuning(12, lr=3e-3))) == 12
    assert loss_of(plain) < before


@pytest.mark.parametrize(
    "scheme, method, options, says",
    [
        ("w8a8", "basel", {"keep": 0.5}, "float model"),
        ("none", "basel", {}, "rounds nothing|down to a size"),
        ("none", "basel:magic", {"keep": 0.5}, "basel:magic"),
        ("none", "low_rank", {"keep": 0.5, "steps": 4}, "steps is of basel"),
        ("none", "basel", {"keep": 0.5, "steps": 1}, "steps"),
    ],
)
def test_what_basel_cannot_do_is_refused(scheme: str, method: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        calib.quantize(build("llama"), scheme, method, DATA, progress=False, **options)  # type: ignore[arg-type]
