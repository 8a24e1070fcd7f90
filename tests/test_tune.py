"""Recovery training: stand-ins on every grid, the one call and command, killed and resumed, on two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import calib
from calib import cli
from calib.data import generate_windows
from calib.errors import CalibError, InputError
from calib.evaluate import perplexity
from calib.nn import ActivationQuantizer, LowRankLinear, QuantLinear
from calib.quantizers import AffineSpec, AnyWeight, DualBinarySpec, LevelSpec, straight
from calib.recipe import Scheme
from calib.tune import fit, latent_weights
from calib.tuning import LOSSES, PRESETS, Training, TunedLinear, objective, tune_recipe
from calib.tuning.loop import Tuning
from calib.tuning.loop import tune as train
from tests.families import batches, build, logits

ROOT = Path(__file__).resolve().parents[1]
DATA = batches("llama", 6)
TOKEN = AffineSpec(8, symmetric=False, granularity="token", dynamic=True)
STATIC = AffineSpec(4, symmetric=False, granularity="tensor")
TERNARY = AffineSpec(2, symmetric=True, granularity="tensor")
GROUP: dict[str, Any] = {"granularity": "group", "group_size": 16}
GRIDS: dict[str, tuple[AnyWeight, AffineSpec | None]] = {
    "affine": (AffineSpec(4), STATIC),
    "affine, asymmetric groups": (AffineSpec(3, False, "group", 16), TOKEN),
    "seq 3": (LevelSpec(kind="seq", levels=3, **GROUP), None),
    "seq 4": (LevelSpec(kind="seq", levels=4), TERNARY),
    "lsq 8": (LevelSpec(kind="lsq", levels=8, **GROUP), TOKEN),
    "binary": (LevelSpec(kind="binary", levels=2, **GROUP), None),
    "tbt": (LevelSpec(kind="tbt", levels=3, range="published"), TERNARY),
    "twn": (LevelSpec(kind="twn", levels=3, range="published"), None),
    "two planes": (DualBinarySpec(**GROUP), None),
    "binary, one-bit inputs": (LevelSpec(kind="binary", levels=2), AffineSpec(1, granularity="tensor", range="mse")),
}
# Signs times signs sum to exactly 0 often, and whose sign that is depends on the order of a sum: no whole models.
WHOLE = [name for name in GRIDS if name != "binary, one-bit inputs"]


def quantized(name: str, family: str = "llama", method: str = "rtn", **options: Any) -> calib.Result:
    weights, inputs = GRIDS[name]
    scheme = Scheme(name="x", weights=weights, inputs=inputs)
    options = {"prefix": "none", "format": "calib", **options}
    return calib.quantize(build(family), scheme, method, batches(family, 4), progress=False, **options)


@pytest.mark.parametrize("trainable", ["scales", "all"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_stand_in_begins_where_the_codes_are_learns_and_leaves_nothing(name: str, trainable: Any) -> None:
    result, teacher = quantized(name), build("llama")
    model = result.network
    floats, note = latent_weights(model, teacher, result._manifest())
    assert len(floats) == 14 and not note
    before, keys = logits(model, DATA[0]), {k: t.dtype for k, t in model.state_dict().items()}
    training = Training(model, (trainable,), floats)
    assert torch.allclose(logits(model, DATA[0]), before, atol=1e-5)
    training.settle()
    assert torch.equal(logits(model, DATA[0]), before)
    recipe = tune_recipe(None, "kd", trainable=(trainable,), steps=12, lr=1e-3)
    losses, trained = fit(model, teacher, DATA[:1], recipe, floats)
    assert min(losses[-3:]) < (0.97 if trainable == "all" else 0.995) * losses[0]
    assert trained > (70_000 if trainable == "all" else 10)
    assert {k: t.dtype for k, t in model.state_dict().items()} == keys
    assert not any(p.requires_grad for p in model.parameters())
    assert all(isinstance(m, QuantLinear) for n, m in model.named_modules() if n.endswith("_proj"))


@pytest.mark.parametrize("name", GRIDS)
def test_what_a_pass_sees_is_what_is_packed(name: str) -> None:
    """After steps of training, the weight of the stand-in is the one its codes and scales decode to, to the bit."""
    model = quantized(name).network
    training = Training(model, ("all",), {})
    for linear in training.linears.values():
        for p in linear.parameters(recurse=False):
            p.data.add_(torch.randn_like(p) * 0.02)
        linear.project()
    seen = {n: (linear.weight().detach(), linear._input(torch.ones(3, linear.module.in_features)).detach())
            for n, linear in training.linears.items()}  # fmt: skip
    training.settle()
    for n, (weight, x) in seen.items():
        module = model.get_submodule(n)
        assert isinstance(module, QuantLinear)
        assert torch.equal(weight, module.dequantize())
        assert torch.equal(x, module.input.on_grid(torch.ones(3, module.in_features)))


WEIGHT = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))


def linear_of(spec: AnyWeight, inputs: AffineSpec | None = None, **quantizer: Any) -> QuantLinear:
    given = ActivationQuantizer(inputs, 32, **quantizer)
    return QuantLinear.from_float(WEIGHT, torch.randn(6), spec, given)


@pytest.mark.parametrize("name", GRIDS)
def test_scales_of_held_codes_have_their_true_gradient(name: str) -> None:
    spec = GRIDS[name][0]
    linear = TunedLinear(linear_of(spec), ("scales",))
    assert linear.factor is not None and linear.latent is None and linear.bias is None
    up = torch.randn(6, 32)
    (got,) = torch.autograd.grad(linear.weight(), linear.factor, up)
    if isinstance(spec, DualBinarySpec):
        moved = [linear.factor.detach().clone() for _ in range(2)]
        want = torch.zeros_like(got)
        for plane in range(2):  # linear in each plane's factor: the slope is the difference
            moved = linear.factor.detach().clone()
            moved[..., plane] = 0
            gone = spec.decode(linear.module.codes(), linear.start * moved)
            change = (linear.weight().detach() - gone) * up
            want[..., plane] = change.unflatten(-1, (-1, 16)).sum(-1)
    else:
        view = (linear.weight().detach() * up).unflatten(-1, (-1, spec.group_size or 32))
        want = view.sum(-1, keepdim=True).reshape(got.shape)
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", GRIDS)
def test_latent_weights_have_the_published_gradients(name: str) -> None:
    spec = GRIDS[name][0]
    linear = TunedLinear(linear_of(spec), ("all",), WEIGHT)
    assert linear.latent is not None and torch.equal(linear.latent, WEIGHT)
    up = torch.randn(6, 32)
    (got,) = torch.autograd.grad(linear.weight(), linear.latent, up)
    w = linear.latent.detach().unflatten(-1, (-1, spec.group_size)) if spec.group_size else linear.latent.detach()
    scale = linear.start
    if isinstance(spec, DualBinarySpec):
        want = ((scale[..., :1] - scale[..., 1:]).abs() * up.view_as(w)).view_as(got)
    else:
        if isinstance(spec, AffineSpec):
            low, high = spec.qmin - linear.zero.float(), spec.qmax - linear.zero.float()
        elif spec.kind == "seq":
            high = torch.tensor(0.99 * (1.5 if spec.levels == 3 else spec.levels))
            low = -high
        elif spec.kind in ("lsq", "binary"):
            low, high = (torch.tensor(float(v)) for v in ((-4, 3) if spec.kind == "lsq" else (-1, 1)))
        else:
            low, high = torch.tensor(-torch.inf), torch.tensor(torch.inf)
        inside = (w / scale >= low) & (w / scale <= high)
        assert name in ("tbt", "twn") or not bool(inside.all()), "some weights are clipped"
        want = (inside * up.view_as(w)).view_as(got)
    assert torch.allclose(got, want, rtol=1e-5)


def test_gradients_of_affine_grids_match_a_reference() -> None:
    x, up = torch.randn(5, 8, dtype=torch.float64) * 3, torch.randn(5, 8, dtype=torch.float64)
    a = torch.rand(5, 1, dtype=torch.float64) * 0.5 + 0.1
    zero = torch.randint(-3, 4, (5, 1))
    x.requires_grad_(), a.requires_grad_()
    spec = AffineSpec(4, symmetric=False)
    straight.affine(x, a, zero, spec).backward(up)
    assert x.grad is not None and a.grad is not None
    for i in range(5):
        slope = 0.0
        for j in range(8):
            q, z = float(x[i, j].detach() / a[i, 0].detach()), int(zero[i, 0])
            low, high = -8 - z, 7 - z
            inside = low <= q <= high
            assert float(x.grad[i, j]) == (float(up[i, j]) if inside else 0.0)
            slope += float(up[i, j]) * ((round(q) - q) if inside else (low if q < low else high))
        assert float(a.grad[i, 0]) == pytest.approx(slope / (40 * 7) ** 0.5, rel=1e-9)


def test_elastic_inputs_fit_better_than_fixed_ones() -> None:
    """A static ternary input grid with a poor scale, learned by the output's error; the weight is held."""
    module = linear_of(AffineSpec(8), TERNARY)
    module.input.scale = torch.tensor([4.0])
    x = torch.randn(64, 32)
    linear = TunedLinear(module, ("scales",))
    assert linear.input_factor is not None
    target = x @ module.dequantize().T + module.bias

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return (linear(x) - target).square().mean()

    found = train([({"f": linear.input_factor}, 100.0)], loss, [{}], Tuning(60, lr=1e-3), after_step=linear.project)
    assert found[-1] < 0.9 * found[0]
    scale = linear.settle().input.scale
    assert scale is not None and 0.5 < float(scale) < 3.5
    assert float((module.set_mode("float")(x) - target).square().mean()) == pytest.approx(found[-1], rel=0.05)
    watching = linear_of(AffineSpec(8), TERNARY, float_rows=True)
    assert TunedLinear(watching, ("scales",)).input_factor is None, "its rows would all leave the range, to be exact"


def test_scales_of_two_planes_stay_in_order() -> None:
    linear = TunedLinear(linear_of(DualBinarySpec(**GROUP)), ("all",))
    assert linear.factor is not None
    linear.factor.data.copy_(torch.randn_like(linear.factor) * 3)
    linear.project()
    a1, a2 = linear._scale().detach().half().float().unbind(-1)
    sign = a1.sign()
    assert bool(((sign * a2 < 0) & (sign * (a1 + a2) > 0)).all())
    module = linear.settle()
    assert torch.equal(module.codes(), module.weight_spec.encode(linear.latent, module.weight_scale))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "scheme", "options"),
    [
        ("llama", "w4a8-static", {"method": "hadamard,os+", "prefix": (1,), "float_rows": 0.01}),
        ("llama", "w4a8", {"method": "rtn", "scheme_options": {"attention_bits": 8, "kv_bits": 4}}),
        ("llama", "w3a16", {"method": "gptq,low_rank", "rank": 4, "scheme_options": {"weight_group": 32}}),
        ("gpt2", "w4a8", {"method": "smoothquant"}),
        ("mixtral", "w4a8", {"method": "rtn"}),
        ("bart", "w4a8", {"method": "rtn"}),
    ],
)
def test_every_kind_of_model_trains_and_survives_its_checkpoint(
    family: str, scheme: str, options: dict[str, Any], tmp_path: Path
) -> None:
    data = batches(family, 4)
    result = calib.quantize(build(family), scheme, data=data, progress=False, **{"prefix": "none", **options})
    trainable = ("scales", "norms", "factors")
    asked = {"loss": "kd", "trainable": trainable, "steps": 6, "lr": 1e-3, "progress": False}
    tuned = calib.tune(result, build(family), data[:1], tmp_path / "out", verified=False, **asked)  # type: ignore[arg-type]
    assert tuned.report["loss"][-1] < tuned.report["loss"][0]
    again = calib.load(tmp_path / "out", mode="fake")
    assert torch.equal(logits(again, data[0]), logits(tuned.model, data[0]))
    made = json.loads((tmp_path / "out" / "calib.json").read_text())
    assert made["recipe"]["scheme"]["name"] == scheme and made["tuning"]["steps"] == 6


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_on_an_encoder_with_labels_and_its_reference(loss: str) -> None:
    result, teacher = quantized("seq 4", "bert"), build("bert")
    data = [{**batch, "labels": torch.tensor([0, 1, 1, 0])} for batch in batches("bert", 4)]
    data[0]["attention_mask"][1, 10:] = 0
    with torch.no_grad():
        first = float(objective(result.network, teacher, LOSSES[loss])(data[0]))
        if loss == "ce":
            got = result.network(**{k: v for k, v in data[0].items() if k != "labels"}).logits
            assert first == pytest.approx(float(nn.functional.cross_entropy(got, data[0]["labels"])))
        if loss == "kd":
            p, q = (m(data[0]["input_ids"], data[0]["attention_mask"]).logits.softmax(-1).double()
                    for m in (teacher, result.network))  # fmt: skip
            assert first == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    floats, _ = latent_weights(result.network, teacher, result._manifest())
    losses, _ = fit(
        result.network, teacher, data, tune_recipe(None, loss, trainable=("all",), steps=20, lr=1e-3), floats
    )
    assert sum(losses[-4:]) < sum(losses[:4])


def test_a_classifier_learns_from_a_table_of_labels(tmp_path: Path, byte_tokenizer: Any) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(byte_tokenizer), **sizes, initializer_range=0.2, max_position_embeddings=64)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "float")
    byte_tokenizer.save_pretrained(tmp_path / "float")
    rows = [f"{word} {i}\t{label}" for i in range(12) for word, label in (("good", 1), ("bad", 0))]
    (tmp_path / "data.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    given = {"samples": 24, "seq_len": 32, "batch_size": 8, "progress": False}
    result = calib.quantize(tmp_path / "float", "w4a4", "rtn", tmp_path / "data.tsv", **given)
    with pytest.raises(CalibError, match="labels"):
        calib.tune(result, tmp_path / "float", ["good", "bad"], preset="ackd", **given)
    tuned = calib.tune(
        result, tmp_path / "float", tmp_path / "data.tsv", preset="ackd", loss="ce", steps=30, lr=5e-3, **given
    )
    assert set(tuned.data[0]) == {"input_ids", "attention_mask", "labels"} and len(tuned.data) == 3
    losses = tuned.report["loss"]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6]), "the labels belong to their sentences"
    given["seed"] = 1
    again = calib.tune(result, tmp_path / "float", tmp_path / "data.tsv", preset="ackd", steps=2, **given)
    assert again.data.fingerprint != tuned.data.fingerprint and len(again.report["loss"]) == 2


def test_tbt_terms_reach_every_attention_of_an_encoder_decoder() -> None:
    student, teacher, batch = build("bart", 1), build("bart"), batches("bart")[0]
    heard, said = torch.ones_like(batch["input_ids"]), torch.ones_like(batch["input_ids"])
    heard[0, 5:], said[1, 9:] = 0, 0
    batch |= {"attention_mask": heard, "decoder_attention_mask": said}  # of one shape: each counts for its own side
    terms = LOSSES["tbt"].model_copy(update={"logits": 0.0, "hidden": 0.0})
    with torch.no_grad():
        found = float(objective(student, teacher, terms)(batch))
        a, b = (m(**batch, output_attentions=True, use_cache=False) for m in (student, teacher))
    want = sum(
        float((x - y).square().mean((1, 3))[mask.bool()].mean())
        for name, mask in (("encoder_attentions", heard), ("decoder_attentions", said), ("cross_attentions", said))
        for x, y in zip(a[name], b[name], strict=True)
    )
    assert found == pytest.approx(want, rel=1e-5)


def test_an_encoder_decoder_learns_on_one_bit_inputs(tmp_path: Path) -> None:
    """TBT's W1A1: signs of weights and inputs; what was learned is what the checkpoint computes."""
    weights, inputs = GRIDS["binary, one-bit inputs"]
    data, teacher = batches("bart", 4), build("bart")
    scheme = Scheme(name="w1a1", weights=weights, inputs=inputs)
    result = calib.quantize(build("bart"), scheme, "rtn", data, progress=False, format="calib")
    tuned = calib.tune(result, teacher, data, tmp_path / "out", preset="tbt", steps=12, lr=1e-3, progress=False,
                       verified=False)  # fmt: skip
    assert sum(tuned.report["loss"][-4:]) < 0.95 * sum(tuned.report["loss"][:4])
    again = calib.load(tmp_path / "out")
    learned = [m for m in tuned.model.modules() if isinstance(m, QuantLinear)]
    for ours, theirs in zip(learned, (m for m in again.modules() if isinstance(m, QuantLinear)), strict=True):
        x = torch.randn(5, ours.in_features)
        assert theirs.input.spec == inputs and torch.equal(theirs.input.on_grid(x), ours.input.on_grid(x))
        assert torch.equal(theirs.dequantize(), ours.dequantize())
        assert torch.allclose(theirs.set_mode("packed")(x), ours.set_mode("fake")(x), atol=1e-5)


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def fitted(trainable: Any = "all", **options: Any) -> tuple[list[float], nn.Module]:
    model, data = quantized("seq 3").network, options.pop("data", DATA)
    recipe = tune_recipe(None, "ce", trainable=(trainable,), steps=4, lr=1e-3, **options)
    return fit(model, None, data, recipe, {})[0], model


def test_recomputed_activations_change_nothing_and_accumulated_batches_are_one() -> None:
    plain, model = fitted()
    again, other = fitted(checkpointing=True)
    assert plain == again and same(model, other)
    halves = [{k: v[i : i + 2] for k, v in batch.items()} for batch in DATA[:1] for i in (0, 2)]
    whole, joined = fitted("scales", data=DATA[:1])[0], fitted("scales", data=halves, accumulate=2)[0]
    assert joined == pytest.approx(whole, abs=1e-4)
    assert fitted(precision="bf16")[0] == pytest.approx(plain, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"loss": "kd"}, "teacher"),
        ({"loss": "magic"}, "unknown loss"),
        ({"preset": "magic"}, "unknown preset"),
        ({"loss": "ce", "trainable": ("factors",)}, "no factors"),
        ({"loss": "ce", "trainable": ()}, "nothing to train"),
        ({"loss": "ce", "trainable": ("magic",)}, "trainable"),
        ({"loss": "ce", "steps": 0}, "steps"),
        ({"loss": "ce", "lr": -1.0}, "lr"),
        ({"loss": "ce", "magic": 1}, "magic"),
    ],
)
def test_what_cannot_be_trained_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        calib.tune(quantized("seq 4"), data=DATA, progress=False, **arguments)


def test_prefix_and_recomputation_do_not_mix_and_transformed_weights_are_named() -> None:
    data = batches("llama", 4)
    result = calib.quantize(build("llama"), "w8a8-static", "os+", data, prefix=(1,), progress=False)
    with pytest.raises(InputError, match="prefix"):
        calib.tune(result, data=data, loss="ce", checkpointing=True, steps=2, progress=False)
    result = calib.quantize(build("llama"), "w8a8-static", "os+", data, prefix="none", progress=False)
    tuned = calib.tune(result, build("llama"), data, preset="paretoq", steps=2, progress=False)
    assert "transformed" in tuned.report["notes"][0]


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_model_behind_a_prefix_learns_from_a_teacher_without_one(loss: str) -> None:
    """Attentions are compared on the text's own keys."""
    data = batches("llama", 4)
    result = calib.quantize(build("llama"), "w4a8", "rtn", data, prefix=(1, 7), progress=False)
    tuned = calib.tune(result, build("llama"), data, loss=loss, steps=6, lr=1e-2, trainable=("scales",), progress=False)
    assert all(torch.isfinite(tuned.model(**batch).logits).all() for batch in data)


def test_presets_are_the_published_recipes() -> None:
    assert PRESETS["paretoq"].loss == LOSSES["ce"] and PRESETS["paretoq"].lr == 2e-5
    assert PRESETS["tbt"].loss.attention == 1 and PRESETS["tbt"].warmup == 0.05
    assert tune_recipe("db-llm", gamma=0.0).loss.gamma == 0 and PRESETS["db-llm"].trainable == ("scales",)
    assert tune_recipe("ackd", "kd", lr=1e-2).model_dump(include={"loss": {"contrast"}, "lr": True}) == {
        "loss": {"contrast": 0.0}, "lr": 1e-2
    }  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> tuple[Path, Path, Path]:
    """A float model, the same quantized, and text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("tune")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(byte_tokenizer), **sizes, max_position_embeddings=128, initializer_range=0.2)
    model: PreTrainedModel = LlamaForCausalLM(config)
    model.save_pretrained(root / "float")
    byte_tokenizer.save_pretrained(root / "float")
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and then it rests. " * 60)
    calib.quantize(
        root / "float", "w2a16", "rtn", root / "text.txt", root / "low", samples=4, seq_len=32, progress=False,
        scheme_options={"weight_group": 32}, verified=False,
    )  # fmt: skip
    return root / "float", root / "low", root / "text.txt"


def command(folders: tuple[Path, Path, Path], out: Path, *more: str, steps: int = 8) -> list[str]:
    model, low, text = map(str, folders)
    drawn = ["--samples", "16", "--seq-len", "32", "--batch-size", "2", "--lr", "1e-3"]
    return ["tune", low, "--teacher", model, "--data", text, "--out", str(out), "--steps", str(steps), *drawn, *more]


def test_the_command(folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.run(
            command(folders, tmp_path / "out", "--loss", "dad", "--trainable", "scales,norms", "--no-verify", "--json")
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    answer = json.loads(lines[-1])
    assert len(answer["loss"]) == 8 and answer["out"] == str(tmp_path / "out")
    assert any(line.startswith("loss ") for line in lines)
    assert not list(tmp_path.glob(".out*")), "nothing of the training is left"
    tuned, start = (calib.load(path) for path in (tmp_path / "out", folders[1]))
    assert tuned.state_dict().keys() == start.state_dict().keys()
    ids = {"input_ids": torch.arange(40)[None] + 3}
    assert not torch.equal(logits(tuned, ids), logits(start, ids))
    assert cli.run(["tune", str(tmp_path / "out"), "--loss", "ce", "--steps", "2", "--out", str(tmp_path / "two"), "-q",
                    "--samples", "2", "--seq-len", "32", "--no-verify"]) == 0, "a tuned model can be tuned"  # fmt: skip


def test_the_teacher_writes_the_text(folders: tuple[Path, Path, Path]) -> None:
    model, low, _ = folders
    drawn = {"samples": 4, "seq_len": 16, "steps": 1, "progress": False}
    teacher = calib.load(model)
    tuned = calib.tune(low, teacher, "self", **drawn)  # type: ignore[arg-type]
    wanted = generate_windows(teacher, calib.load_tokenizer(model), 4, 16, 0)
    assert torch.equal(torch.cat([b["input_ids"] for b in tuned.data]), torch.cat([b["input_ids"] for b in wanted]))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--preset", "magic"], "preset"),
        (["--loss", "magic"], "loss"),
        (["--trainable", "magic"], "trainable"),
        (["--precision", "fp8"], "precision"),
        (["--seq-len", "4096"], "limit of 128"),
    ],
)
def test_the_command_says_what_is_wrong(
    more: list[str], says: str, folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(command(folders, tmp_path / "out", *more)) == InputError.exit_code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "out").exists()


def test_only_what_calib_quantized_can_be_tuned(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for wrong, says in ((folders[0], "no quantized model"), (tmp_path / "absent", "no folder")):
        with pytest.raises(CalibError, match=says):
            calib.tune(wrong, data=folders[2], loss="ce", out=tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="quantized already"):
        calib.tune(folders[1], folders[1], folders[2], progress=False)


def test_a_stopped_run_goes_on_to_the_same_bits(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, low, text = folders
    options: dict[str, Any] = {"steps": 9, "every": 2, "samples": 8, "seq_len": 32, "batch_size": 2, "lr": 1e-3}
    options |= {"trainable": ("all",), "progress": False, "verified": False}
    whole = calib.tune(low, model, text, tmp_path / "whole", **options)
    steps = iter(range(5))
    with monkeypatch.context() as patch:
        patch.setattr(Training, "project", lambda self: next(steps))
        with pytest.raises(StopIteration):
            calib.tune(low, model, text, tmp_path / "out", **options)
    assert len(list(tmp_path.glob(".out.tuning/*/state.safetensors"))) == 1
    again = calib.tune(low, model, text, tmp_path / "out", **options)
    assert again.report["loss"] == whole.report["loss"] and same(again.model, whole.model)
    assert not list(tmp_path.glob(".out*"))


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_a_fresh_process_measures_what_the_tuned_model_does(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, low, text = folders
    options = {"preset": "paretoq", "steps": 12, "lr": 1e-3, "samples": 16, "seq_len": 32, "batch_size": 2}
    tuned = calib.tune(str(low), str(model), str(text), tmp_path / "out", progress=False, **options)  # type: ignore[arg-type]
    here, start = (
        perplexity(m, tuned.tokenizer, text, windows=8, seq_len=32).value for m in (tuned.model, calib.load(low))
    )
    ask = ["eval", str(tmp_path / "out"), "--data", str(text), "--windows", "8", "--seq-len", "32", "--json", "-q"]
    made = subprocess.run([sys.executable, "-m", "calib", *ask], env=ENVIRONMENT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    assert json.loads(made.stdout.splitlines()[-1])["value"] == pytest.approx(here, rel=1e-6)
    assert here < 0.97 * start, "training changed the figure"


@pytest.mark.slow
def test_killed_and_called_again_it_ends_in_the_same_bits(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    arguments = ["--every", "3", "--trainable", "all", "--threads", "1", "-q"]
    torch.set_num_threads(1)
    assert cli.run(command(folders, tmp_path / "whole", *arguments, steps=60)) == 0
    run = command(folders, tmp_path / "out", *arguments, steps=60)
    process = subprocess.Popen([sys.executable, "-m", "calib", *run], env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.tuning/*/state.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists(), "killed before it was done"
    assert cli.run(run) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_twice_the_batches(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--trainable", "scales,norms", "--json", "--threads", "1", "--no-verify", "-q"]
    assert cli.run(command(folders, tmp_path / "one", *more, "--accumulate", "2")) == 0
    one = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "calib"]
    made = subprocess.run(
        [*run, *command(folders, tmp_path / "two", *more)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]
    two = json.loads(made.stdout.splitlines()[-1])["loss"]
    assert two == pytest.approx(one, rel=1e-4)
    assert calib.load(tmp_path / "two") is not None


def test_float_factors_are_trained_by_name() -> None:
    model = calib.quantize(build("llama"), "none", "low_rank", DATA, keep=0.5, progress=False).network
    training = Training(model, ("factors",), {})
    names = {name.rpartition(".")[0] for group, _ in training.groups for name in group}
    wanted = {n for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert {name.rpartition(".")[0] for name in names} == wanted
