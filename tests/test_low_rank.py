"""Low-rank bases through the one call: truncated, compensated, rounded, saved, reloaded, resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import calib
from calib.engine import Engine
from calib.errors import InputError, NumericsError
from calib.nn import LowRankLinear, QuantLinear, SideBranch, changed_linears
from calib.transforms import relative_error
from tests.families import batches, build, logits

OTHERS = ("opt", "bert", "gpt2", "mixtral", "bart")


def error(model: torch.nn.Module, name: str = "llama") -> float:
    """Of the logits on the calibration data, relative."""
    want, got = (torch.cat([logits(m, b) for b in batches(name)]) for m in (build(name), model))
    return float((got - want).norm() / want.norm())


def truncated(name: str = "llama", method: str = "low_rank", scheme: str = "none", **options: object) -> calib.Result:
    return calib.quantize(build(name), scheme, method, batches(name), progress=False, **options)  # type: ignore[arg-type]


def parameters(model: torch.nn.Module) -> int:
    """Of the changed linears, biases apart."""
    return sum(p.numel() for m in changed_linears(model).values() for p in m.parameters() if p.dim() == 2)


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_keeping_nearly_all_changes_nearly_nothing_and_less_changes_more(family: str) -> None:
    half, most = truncated(family, keep=0.5), truncated(family, keep=0.95)
    assert 0 < error(most.model, family) < error(half.model, family)
    for result, keep in ((half, 0.5), (most, 0.95)):
        entries = [e for e in result.plan.entries.values() if e.rank is not None or "dense" in e.reason]
        whole = sum(e.shape[0] * e.shape[1] for e in entries)
        kept = sum(e.rank * sum(e.shape) if e.rank else e.shape[0] * e.shape[1] for e in entries)
        assert keep - 0.06 < kept / whole <= keep
        assert all(e.rank * sum(e.shape) < e.shape[0] * e.shape[1] for e in entries if e.rank)
        assert {e.name for e in entries if e.rank} == changed_linears(result.model).keys()


def test_everything_kept_is_the_model() -> None:
    result = truncated(keep=1.0)
    assert not changed_linears(result.model)
    assert torch.equal(logits(result.model, batches("llama")[0]), logits(build("llama"), batches("llama")[0]))


@pytest.mark.slow
def test_variants_and_selection_differ_and_whitened_is_best() -> None:
    found = {v: error(truncated(method=f"low_rank:{v}", keep=0.6, select="uniform").model) for v in ("svd", "whitened")}
    for variant in ("asvd", "rms", "svd-llm", "fwsvd"):
        found[variant] = error(truncated(method=f"low_rank:{variant}", keep=0.6).model)
    assert found["svd-llm"] == pytest.approx(found["whitened"], rel=0.02)
    assert found["whitened"] < min(found["svd"], found["asvd"], found["rms"], found["fwsvd"])
    assert len({round(value, 6) for name, value in found.items() if name != "svd-llm"}) == 5
    assert error(truncated(keep=0.6).model) != pytest.approx(found["whitened"], rel=1e-3)


@pytest.mark.parametrize(
    "family, scheme, method",
    [
        ("opt", "none", "low_rank"),
        ("gpt2", "w8a8-static", "os+,low_rank"),
        ("llama", "w4a8", "os+,gptq,low_rank"),
        pytest.param("mixtral", "w8a8-static", "os+,low_rank", marks=pytest.mark.slow),
        pytest.param("bert", "w4a8", "os+,gptq,low_rank", marks=pytest.mark.slow),
    ],
)
def test_truncated_is_saved_and_reloaded(family: str, scheme: str, method: str, tmp_path: Path) -> None:
    result = truncated(family, method, scheme, keep=0.6)
    kinds = {type(m) for m in changed_linears(result.model).values()}
    assert LowRankLinear in kinds
    inner = [m for m in result.model.modules() if isinstance(m, QuantLinear)]
    assert bool(inner) == (scheme != "none")
    data = batches(family)[0]
    want = logits(result.model, data)
    result.save(tmp_path / "out", "calib", verified=False)
    for mode in ("fake", "packed"):
        again = calib.load(tmp_path / "out", mode=mode)  # type: ignore[arg-type]
        got = logits(again, data)
        assert relative_error(got, want) <= (1e-5 if mode == "fake" else 2e-2)
        assert {n: m.rank for n, m in changed_linears(again).items() if isinstance(m, LowRankLinear)} == {
            e.name: e.rank for e in result.plan.entries.values() if e.rank
        }


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_dense_form_loads_in_plain_transformers(family: str, tmp_path: Path) -> None:
    result = truncated(family, keep=0.6)
    want = logits(result.model, batches(family)[0])
    result.save(tmp_path / "out", "float", verified=False)
    plain = type(build(family)).from_pretrained(tmp_path / "out")
    assert not changed_linears(plain)
    assert relative_error(logits(plain, batches(family)[0]), want) <= 1e-4


def test_what_has_no_dense_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="float cannot express"):
        truncated(scheme="w8a8", method="low_rank", keep=0.5, format="float")


@pytest.mark.parametrize(
    "scheme, factors", [("w4a8", "float"), ("w8a8-static", "int8"), ("w4a16", "int8"), ("w4a16", "float")]
)
def test_compensated_is_the_same_bits_fake_packed_and_reloaded(scheme: str, factors: str, tmp_path: Path) -> None:
    options = {"weight_group": 32} if scheme == "w4a16" else {}
    result = truncated(scheme=scheme, method="os+,low_rank", rank=8, factors=factors, scheme_options=options)
    sides = [m for m in result.model.modules() if isinstance(m, SideBranch)]
    assert len(sides) == 14 and {s.rank for s in sides} == {8}
    data = batches("llama")[0]
    want = logits(result.model, data)
    result.save(tmp_path / "out", "calib", verified=False)
    assert torch.equal(logits(calib.load(tmp_path / "out", mode="fake"), data), want)
    packed = calib.load(tmp_path / "out")
    for name, module in changed_linears(packed).items():  # on one input: the modes' own sums are equal to the last bit
        x = torch.randn(5, module.in_features)
        assert isinstance(module, QuantLinear)
        y = module(x)
        assert relative_error(module.set_mode("fake")(x), y) <= 1e-6, name
        module.set_mode("packed")


def test_factors_in_int8_keep_fp32_scales_in_a_half_precision_model(tmp_path: Path) -> None:
    """transformers makes modules under a default dtype of bfloat16."""
    result = truncated(scheme="w8a8", method="rtn,low_rank", rank=4, factors="int8", dtype=torch.bfloat16)
    result.save(tmp_path / "out", "calib", verified=False)
    data, loaded = batches("llama")[0], calib.load(tmp_path / "out", mode="fake")
    assert torch.equal(logits(loaded, data), logits(result.model, data))
    assert {s.up_scale.dtype for s in loaded.modules() if isinstance(s, SideBranch)} == {torch.float32}


@pytest.mark.slow
def test_compensation_orders_as_published_and_comes_after_fold_and_rounding() -> None:
    def weight_error(method: str, **options: object) -> float:
        """Output error of the first block's linears, on their own calibration inputs."""
        result = truncated(scheme="w4a16", method=method, scheme_options={"weight_group": 32}, **options)
        return error(result.model)

    plain = weight_error("rtn")
    found = {v: weight_error(f"low_rank:{v}", rank=12) for v in ("lqer", "l2qer", "qera-approx", "qera", "loftq")}
    assert found["qera"] < found["lqer"] < plain
    assert found["loftq"] < plain
    assert weight_error("os+,gptq,low_rank", rank=12) < weight_error("os+,gptq")
    eight = weight_error("low_rank", rank=12, factors="int8")
    assert eight == pytest.approx(found["qera"], rel=0.05) and eight != found["qera"]


def folder_of(tmp_path: Path, name: str = "llama") -> Path:
    build(name).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_streamed_is_resident_and_killed_is_paused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The survey is journaled too: a run that goes on does not look at the float model again."""
    model, data = folder_of(tmp_path), batches("llama")
    want = calib.quantize(model, "none", "low_rank", data, keep=0.6, progress=False).model
    stop = Engine._take
    calls = []

    def dies(self: Engine, name: str, record: object) -> None:
        calls.append(name)
        stop(self, name, record)  # type: ignore[arg-type]
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_take", dies)
        with pytest.raises(KeyboardInterrupt):
            calib.quantize(model, "none", "low_rank", data, tmp_path / "out", keep=0.6, progress=False, verified=False)
    with pytest.raises(InputError, match="recipe keep"):
        calib.quantize(model, "none", "low_rank", data, tmp_path / "out", keep=0.5, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("calib.engine.run.survey", None)
        result = calib.quantize(
            model, "none", "low_rank", data, tmp_path / "out", keep=0.6, progress=False, verified=False
        )
    assert any("resumed" in note for note in result.plan.notes)
    got = calib.load(tmp_path / "out")
    assert changed_linears(got).keys() == changed_linears(want).keys()
    for batch in data:
        assert torch.equal(logits(got, batch), logits(want, batch))


@pytest.mark.slow
def test_dense_streamed(tmp_path: Path) -> None:
    model, data = folder_of(tmp_path), batches("llama")
    result = calib.quantize(model, "none", "low_rank", data, tmp_path / "out", keep=0.6, progress=False, format="float")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    want = calib.quantize(model, "none", "low_rank", data, keep=0.6, progress=False).model
    assert relative_error(logits(plain, data[0]), logits(want, data[0])) <= 1e-4
    assert result.report["verify"]["max_difference"] < 1e-4


def test_max_size_is_the_size_of_the_checkpoint(tmp_path: Path) -> None:
    model = folder_of(tmp_path)
    whole = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    limit = int(0.8 * whole)
    calib.quantize(
        model, "none", "low_rank", batches("llama"), tmp_path / "out", max_size=limit, progress=False, verified=False
    )
    size = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert 0.9 * limit < size <= limit + 2**14  # headers apart
    with pytest.raises(InputError, match="what is not truncated"):
        truncated(max_size=1000)


def test_groups_divide_the_ranks_of_rounded_factors() -> None:
    result = truncated(scheme="w4a16", keep=0.9, select="uniform", scheme_options={"weight_group": 8})
    ranks = [e.rank for e in result.plan.entries.values() if e.rank]
    assert ranks and all(rank % 8 == 0 for rank in ranks)


def test_cost_is_not_predicted() -> None:
    with pytest.raises(InputError, match="not predicted"):
        calib.cost(build("llama"), "none", "low_rank", keep=0.5)
    plan = calib.plan(build("llama"), "none", "low_rank", batches("llama"), keep=0.5, progress=False)
    assert plan.table().splitlines()[-1].startswith("14 factored, ")


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"keep": 0.5, "method": "os+"}, "low_rank"),
        ({"keep": 0.5, "max_size": 10}, "give one"),
        ({"keep": 0.5, "rank": 3}, "give one"),
        ({"scheme": "none"}, "rounds nothing"),
        ({"scheme": "none", "method": "os+,low_rank", "keep": 0.5}, "rounds nothing"),
        ({"scheme": "w8a8", "method": "low_rank:svd"}, "compensates"),
        ({"method": "low_rank:qera", "keep": 0.5}, "truncates"),
        ({"method": "low_rank:svd", "keep": 0.5, "select": "global"}, "uniform"),
        ({"scheme": "w4a8", "method": "gptq,low_rank:loftq"}, "loftq"),
        ({"scheme": "w8a8", "keep": 0.5, "format": "compressed-tensors"}, "no low-rank factors"),
        ({"scheme": "w8a8-static", "keep": 0.5, "prefix": (1,)}, "without a prefix"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        truncated(**arguments)  # type: ignore[arg-type]


def test_one_short_window_and_nan(tmp_path: Path) -> None:
    """Three tokens for 64 channels: a Gram matrix of rank 3, and nothing that is not finite; NaN is named."""
    few = [{"input_ids": torch.tensor([[5, 6, 7]])}]
    for scheme, options in (("none", {"keep": 0.3}), ("w4a8", {"rank": 8})):
        result = calib.quantize(build("llama"), scheme, "low_rank", few, progress=False, **options)  # type: ignore[arg-type]
        tensors: dict[str, Tensor] = result.model.state_dict()
        assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())
        assert torch.isfinite(logits(result.model, few[0])).all()
    model = build("llama")
    nan = lambda _, args, out: out.masked_fill(args[0][..., None] == 9, float("nan"))  # noqa: E731
    model.model.embed_tokens.register_forward_hook(nan)
    with pytest.raises(NumericsError, match=r"model\.layers\.0\S* holds? NaN or inf"):
        calib.quantize(
            model, "none", "low_rank", [*few, {"input_ids": few[0]["input_ids"] + 4}], keep=0.3, progress=False
        )
