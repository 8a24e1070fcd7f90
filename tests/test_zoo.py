"""The model zoo: entries hold together, recipes by hub id build on their architecture, cards come from builds."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor
from transformers import PreTrainedModel

import calib
from calib import cli
from calib.errors import DataError, InputError, ModelError
from model_zoo import build as builder
from model_zoo import card as cards
from model_zoo import entry as zoo
from tests.families import COMMON, GROUPED
from tests.families import batches as family_batches
from tests.families import build as family_model
from tests.small import ENTRY, small_entry, small_model

MISTRAL: Callable[[], PreTrainedModel] = lambda: t.MistralForCausalLM(  # noqa: E731
    t.MistralConfig(**COMMON, **GROUPED, sliding_window=None)
)
HUB = [entry.name for entry in zoo.entries() if entry.source.hub is not None]
WANTED = {"bert", "opt", "bloom", "llama", "qwen3", "gemma2", "mistral", "mixtral", "bart", "whisper"}


def test_every_entry_holds_together() -> None:
    found = zoo.entries()
    assert len(found) >= 23 and {entry.architecture for entry in found} == WANTED
    for scheme in ("w8a8-static", "w8a8", "w6a6", "w4a16", "w4a8", "w2-fdb", "low-rank-0.7-w8a8"):
        assert f"smollm2-135m-{scheme}" in zoo.names()
    for model in ("minilm-l6", "minilm-l6-sst2"):
        assert {f"{model}-{scheme}" for scheme in ("w8a8-static", "w6a6", "w4a8")} <= set(zoo.names())
    for entry in found:
        assert entry.source.hub is None or entry.status == zoo.UNMEASURED
        if entry.test is not None:
            assert entry.test.data != entry.data, "what judges is not what calibrates"


GOOD = ENTRY
WRONG = {
    "no source": ("source: {hub: a/b}", "source: {}", "exactly one"),
    "two sources": ("{hub: a/b}", "{hub: a/b, folder: c, sha256: " + 64 * "a" + "}", "exactly one"),
    "no hash": ("{hub: a/b}", "{wheel: minilm-l6}", "sha256"),
    "another hash": ("{hub: a/b}", "{wheel: minilm-l6, sha256: " + 64 * "a" + "}", "not that of the wheel"),
    "unknown wheel": ("{hub: a/b}", "{wheel: nope, sha256: " + 64 * "a" + "}", "nope"),
    "unknown scheme": ("w8a8", "w9a9", "w9a9"),
    "unknown method": ("os+", "magic", "magic"),
    "auto": ("os+", "auto", "names its method"),
    "unknown field": ("data: wikitext", "data: wikitext\nflavour: mint", "flavour"),
    "unknown option": ("data: wikitext", "data: wikitext\noptions: {salt: 1}", "salt"),
    "yaml's on": ("data: wikitext", "data: wikitext\noptions: {prefix: on}", "prefix"),
    "no yaml": ("name: mine", "name: [mine", "YAML"),
    "no mapping": (GOOD, "- 1\n", "no fields"),
    "code": ("licence: Apache-2.0", "licence: !!python/object/apply:os.getcwd []", "YAML"),
    "another name": ("name: mine", "name: yours", "yours"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_is_refused_by_file_and_field(case: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    assert zoo.read(file).name == "mine"
    old, new, word = WRONG[case]
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        zoo.read(file)
    assert "mine.yaml" in str(caught.value) and word in str(caught.value) and caught.value.fix


def tiny(architecture: str) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """A random model of the architecture with a few batches of tokens."""
    if architecture != "mistral":
        return family_model(architecture), family_batches(architecture)
    torch.manual_seed(0)
    return MISTRAL().eval(), family_batches("llama")


@pytest.mark.parametrize("name", HUB)
def test_a_recipe_by_hub_id_builds_on_its_architecture(name: str) -> None:
    entry = zoo.load(name)
    model, batches = tiny(entry.architecture)
    assert model.config.model_type == entry.architecture
    options = {**entry.options, "samples": 8, "seq_len": 24, "progress": False, "report": False}
    # widths of 64 and 96 hold no block of the default size
    method = entry.method.replace("hadamard", "hadamard:16").replace("rotate", "rotate:16")
    group = {"weight_group": 16} if entry.formats().weights.granularity == "group" else {}
    result = calib.quantize(
        model, entry.scheme, method, batches, scheme_options={**entry.scheme_options, **group}, **options
    )
    with torch.no_grad():
        assert torch.isfinite(result.model(**batches[0]).logits).all()
    kept = {reason for e in result.plan.entries.values() if e.status == "excluded" and (reason := e.reason)}
    assert result.plan.summary()["quantized"] >= 8, kept


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> dict[str, str]:
    return small_model(tmp_path_factory.mktemp("small"), byte_tokenizer)


@pytest.fixture
def mine(small: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> zoo.Entry:
    """A zoo of one small entry, without cards."""
    for kind in ("ENTRIES", "CARDS"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(zoo, kind, tmp_path / kind)
    small_entry(tmp_path / "ENTRIES" / "mine.yaml", small)
    return zoo.load("mine")


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_from_entry_to_card_and_back(mine: zoo.Entry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "out", zoo.CARDS
    assert cli.run(["zoo", "build", "mine", "--out", str(out), "--seeds", "2", "--json", "--quiet"]) == 0
    figures = answer(capsys)
    assert figures["built"]["seeds"] == [0, 1] and figures["reproduced"] is None
    assert figures["rtn"]["scheme"] == "w8a8" and figures["float"]["perplexity"] > 1
    assert figures["built"]["values"][0]["perplexity"] == pytest.approx(figures["float"]["perplexity"], rel=0.1)
    assert figures["calibration"]["tokens"] == 4 * 32 and figures["size"]["disk_bytes"] > 0
    assert json.loads((out / "zoo.json").read_text()) == {k: v for k, v in figures.items() if k != "out"}

    assert cli.run(["zoo", "card", "mine", "--from", str(out), "--out", str(folder), "--json"]) == 0
    assert {Path(file).name for file in answer(capsys)["written"]} >= {"mine.md", "mine.json", "mine-map.svg"}
    text = (folder / "mine.md").read_text()
    assert f"{figures['rtn']['perplexity']:.4g}" in text and "Apache-2.0" in text and "calib.load" in text
    assert zoo.UNMEASURED not in text
    assert all((folder / name).is_file() for name in json.loads((folder / "mine.json").read_text())["pictures"])
    assert (folder / "mine-map.svg").read_text().startswith("<svg xmlns=")
    assert mine.status == "measured"

    # the same figures again, and a card of another recipe is not compared with
    assert cli.run(["zoo", "build", "mine", "--out", str(out), "--json", "-q"]) == 0
    again = answer(capsys)["reproduced"]
    assert again["within"] and again["perplexity"]["built"] == again["perplexity"]["card"]
    assert builder.reproduced(mine.model_copy(update={"seed": 5}), figures) is None
    assert cli.run(["zoo", "list", "--json"]) == 0
    row = answer(capsys)["entries"][0]
    assert row["metric"] == "perplexity" and row["built"] == again["perplexity"]["built"]

    assert (
        cli.run(
            [
                "zoo",
                "export",
                "mine",
                "--format",
                "float",
                "--weights-only",
                "--from",
                str(out),
                "--out",
                str(tmp_path / "f"),
                "--json",
            ]
        )
        == 0
    )
    assert answer(capsys)["verify"] is not None and (tmp_path / "f" / "model.safetensors").is_file()


def test_an_export_builds_what_it_needs(mine: zoo.Entry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.run(["zoo", "export", mine.name, "--format", "float", "--weights-only", "--out", str(tmp_path / "f"), "-q"])
        == 0
    )
    assert (tmp_path / "f").is_dir() and not (tmp_path / ".f.build").exists()
    assert cli.run(["zoo", "pull", mine.name, "--json"]) == 0
    assert Path(answer(capsys)["path"]).is_dir()


def test_a_stopped_export_is_built_over_and_a_failed_one_leaves_nothing(mine: zoo.Entry, tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / ".f.build").mkdir(parents=True)
    (place / ".f.build" / "half").write_text("written")
    export = ["zoo", "export", mine.name, "--out", str(place / "f"), "-q"]
    assert (
        cli.run([*export, "--format", "gptq"]) == 2
    )  # a format without grids for the inputs: refused before the build
    assert not list(place.iterdir())
    (place / ".f.build").mkdir()
    (place / ".f.build" / "half").write_text("written")
    assert cli.run([*export, "--format", "float", "--weights-only"]) == 0
    assert [p.name for p in place.iterdir()] == ["f"]


def test_cards_and_figures_are_written_whole(mine: zoo.Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half-way leaves the earlier file, and no part of the new one."""
    out, folder = tmp_path / "out", tmp_path / "cards"
    assert cli.run(["zoo", "build", "mine", "--out", str(out), "-q"]) == 0
    card = ["zoo", "card", "mine", "--from", str(out), "--out", str(folder), "-q"]
    assert cli.run(card) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write = Path.write_text

    def full(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        write(self, text[: len(text) // 2], *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert cli.run(card) == 6
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_data_and_other_models(mine: zoo.Entry, small: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data"):
        mine.resolve_data("../nowhere/none.txt")
    with pytest.raises(ModelError, match="--model"):
        mine.resolve_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match="sha256"):
        mine.resolve_model(str(tmp_path))
    assert mine.resolve_model(small["model"]) == small["model"]
    assert mine.model_copy(update={"data": "wikitext"}).resolve_data() == "wikitext"


def test_spread_and_what_is_outside_it(mine: zoo.Entry) -> None:
    assert builder.spread([10.0]) == pytest.approx((9.8, 10.2))
    assert builder.spread([9.0, 10.0, 11.0]) == pytest.approx((7.0, 13.0))
    figures = {"recipe": mine.fingerprint(), "built": {"values": [{"perplexity": 10.0, "ci95": None}]}}
    mine.card.write_text(json.dumps(figures))
    for value, within in ((10.1, True), (10.3, False)):
        found = builder.reproduced(mine, {"built": {"values": [{"perplexity": value, "ci95": None}]}})
        assert found is not None and found["within"] is within


FAILURES = {
    "unknown entry": ("zoo card mien", 2, "mine"),
    "build elsewhere": ("zoo card mine --from {tmp}", 2, "zoo build"),
    "card of nothing": ("zoo card mine --out {tmp}/c", 2, "--from"),
    "no test data": ("zoo build mine --out {tmp}/o --test none.txt", 4, "--test"),
    "no data": ("zoo build mine --out {tmp}/o --data ./none.txt", 4, "--data"),
    "unknown format": ("zoo export mine --format zip --out {tmp}/o", 2, "zip"),
    "damaged card": ("zoo card mine", 2, "not JSON"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line(case: str, mine: zoo.Entry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if case == "damaged card":
        mine.card.write_text("{")
    command, code, word = FAILURES[case]
    assert cli.run(command.format(tmp=tmp_path).split()) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0]


def test_an_unmeasured_card_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["zoo", "card", "opt-1.3b-w8a8-static"]) == 0
    assert f"**{zoo.UNMEASURED}**" in capsys.readouterr().out
    assert cli.run(["zoo", "build", "bert-base-w6a6-static", "--out", "nowhere"]) == 2
    assert "--no-measure" in capsys.readouterr().err
    assert cli.run(["zoo", "pull", "opt-1.3b-w8a8-static"]) == 3  # no network in tests
    assert "facebook/opt-1.3b" in capsys.readouterr().err


MEASURED = [entry.name for entry in zoo.entries() if entry.card.is_file()]


@pytest.mark.parametrize("name", MEASURED)
def test_committed_cards_are_what_their_figures_make(name: str) -> None:
    entry = zoo.load(name)
    figures = entry.figures
    assert figures is not None and figures["recipe"] == entry.fingerprint(), "the recipe changed: build it again"
    assert not figures["changed"]
    assert (zoo.CARDS / f"{name}.md").read_text(encoding="utf-8") == cards.markdown(entry, figures)
    for file in figures["pictures"]:
        assert (zoo.CARDS / file).is_file()
