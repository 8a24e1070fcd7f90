"""What people see of a run: report.json, report.html, calib inspect, and that the page stands alone."""

from __future__ import annotations

import base64
import html
import json
import math
import random
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import calib
from calib import cli
from calib.data import calibration_data
from calib.engine.error import sqnr
from calib.errors import InputError
from calib.evaluate.held import Held, held_rows, next_token_loss, single_rows
from calib.model import Resident, find_stacks
from calib.nn import ActivationQuantizer, QuantLinear
from calib.observers.picture import BINS, DEPTH, TOKENS, extremes, levels, outliers, picture
from calib.quantizers import AffineSpec
from calib.recipe import SCHEMES, Scheme
from calib.report import page
from calib.report.record import clean
from calib.report.svg import Panel, number, png, ticks
from tests.families import batches, build
from tests.small import save_llama

VOID = {"meta", "path", "rect", "circle", "image", "polyline", "br"}
HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
KEYS = {
    "schema", "kind", "created", "command", "model", "data", "seconds", "versions", "machine", "seed", "blocks",
    "sites", "pictures", "plan",
}  # fmt: skip
QUANTIZED = {
    "scheme", "methods", "recipe", "format", "prefix", "quality", "linears", "size", "speed", "peak_rss_mib", "auto",
    "verify", "sha256",
}  # fmt: skip


class Checked(HTMLParser):
    """Fails on tags that are not closed in order; keeps tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open, self.getpos())


def stands_alone(text: str) -> None:
    """Well formed, no script, nothing fetched."""
    checked = Checked(text)
    tags = {tag for tag, _ in checked.seen}
    assert not tags & {"script", "link", "iframe", "object", "img", "foreignobject"}
    for tag, attributes in checked.seen:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("href", "src", "action", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:image/png;base64,") or name not in attributes
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    text = re.sub(r"data:image/png;base64,[\w+/=]*", "", text)  # where any letters may stand
    assert "NaN" not in text and "nan" not in re.findall(r'="[^"]*\b(nan|inf)\b', text)


@pytest.fixture(scope="module")
def quantized() -> calib.Result:
    data = batches("llama", 6)
    return calib.quantize(build("llama"), "w4a8-static", "hadamard,os+", data, samples=12, progress=False)


def test_the_report_of_a_run_has_its_schema(quantized: calib.Result) -> None:
    report = quantized.report_json()
    assert set(report) == KEYS | QUANTIZED and report["schema"] == 1 and report["kind"] == "quantize"
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert [b["name"] for b in report["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert {e["name"] for e in report["linears"] if e["sqnr_db"] is None} == {"lm_head"}
    assert all(5 < e["sqnr_db"] < 60 for e in report["linears"] if e["sqnr_db"] is not None)
    for site in report["sites"]:
        assert {"name", "block", "site", "consumers", "outliers", "absmax_before", "absmax", "p99"} <= set(site)
        assert set(site["outliers"]) == {"kind", "ratio", "first_token", "median", "largest"}
    assert 0 < len(report["pictures"]) <= 6 and set(report["pictures"]) <= {s["name"] for s in report["sites"]}
    size = report["size"]
    assert size["quantized_bytes"] < size["float_bytes"] == sum(4 * p.numel() for p in build("llama").parameters())
    assert report["speed"]["float_seconds"] > 0 < report["speed"]["quantized_seconds"]
    quality = report["quality"]
    assert quality["rows"] == 4 and quality["held_out"], "12 of 24 rows calibrate, the 13th to 16th judge"
    assert quality["quantized"] == pytest.approx(quality["float"] * quality["ratio"])
    assert quality["ci95"][0] < quality["ratio"] < quality["ci95"][1] and 0 <= quality["top1"] <= 1


def test_the_page_stands_alone(quantized: calib.Result) -> None:
    text = quantized.report_html()
    stands_alone(text)
    assert "prefers-color-scheme" in text and "width=device-width" in text
    for title in ("Range of each channel", "Magnitude by channel and token", "Search of the threshold", "SQNR"):
        assert title in text


def test_text_that_is_not_ours_is_escaped(quantized: calib.Result) -> None:
    report = quantized.report_json()

    def spoiled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoiled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoiled(item) for item in value]
        return value.replace("model.layers.0", HOSTILE) if isinstance(value, str) else value

    named = ("linears", "sites", "blocks", "plan", "data", "model", "methods", "versions", "recipe")
    hostile = {**report, **{key: spoiled(report[key]) for key in named}}
    hostile["pictures"] = {spoiled(name): value for name, value in report["pictures"].items()}
    hostile["command"] = hostile["scheme"] = hostile["machine"] = hostile["format"] = HOSTILE
    hostile["data"] = {**report["data"], "source": HOSTILE, "fingerprint": HOSTILE}
    hostile["model"] = {"name": HOSTILE, "class": HOSTILE, "parameters": 1, "files": {HOSTILE: HOSTILE}}
    hostile["versions"] = {HOSTILE: HOSTILE}
    hostile["plan"] = {**report["plan"], "notes": [HOSTILE], "excluded": {HOSTILE: HOSTILE}}
    text = page(hostile)
    stands_alone(text)
    assert HOSTILE not in text and html.escape(HOSTILE) in text


def test_both_files_lie_beside_a_checkpoint(tmp_path: Path, quantized: calib.Result) -> None:
    out = quantized.save(tmp_path / "out", "calib", verified=False)
    report = json.loads((out / "report.json").read_text())
    files = [f for f in out.iterdir() if f.suffix == ".safetensors"]
    assert report["size"]["disk_bytes"] == sum(f.stat().st_size for f in files)
    assert set(report["sha256"]) == {f.name for f in files} and report["format"] == "calib"
    stands_alone((out / "report.html").read_text())
    assert "pictures" not in json.loads((out / "calib.json").read_text())["report"]


def test_no_report_where_none_is_wanted(tmp_path: Path) -> None:
    options = {"report": False, "verified": False, "progress": False}
    result = calib.quantize(build("bert"), "w8a8", "rtn", batches("bert", 2), tmp_path / "o", **options)
    assert not list((tmp_path / "o").glob("report.*")) and "quality" not in result.report
    with pytest.raises(InputError, match="without a report"):
        result.report_json()


@pytest.mark.parametrize("name", ["bert", "mixtral", "bart"])
def test_models_of_other_kinds_have_a_report(name: str) -> None:
    result = calib.quantize(build(name), "w8a8-static", "os+", batches(name, 3), progress=False)
    stands_alone(result.report_html())
    quality = result.report["quality"]
    assert quality["metric"].startswith("perplexity" if name == "mixtral" else "relative squared error")


def test_sqnr_by_hand() -> None:
    linear, rows = nn.Linear(32, 16), torch.randn(300, 32)
    spec = AffineSpec(4, symmetric=True, granularity="channel")
    module = QuantLinear.from_float(linear.weight.detach(), linear.bias.detach(), spec, ActivationQuantizer(None, 32))
    used = rows[::2]  # 300 rows are thinned to at most 256
    want, got = linear(used).detach().double(), module(used).double()
    expected = 10 * math.log10(float(want.square().sum() / (want - got).square().sum()))
    assert sqnr(module, linear, rows) == pytest.approx(expected, abs=1e-3)
    assert 10 < expected < 30


def test_a_picture_is_small_and_true() -> None:
    rows = torch.randn(TOKENS, 500)
    rows[0, 77] = 900.0
    lo, hi = rows.amin(0), rows.amax(0)
    found = picture(rows, lo, hi, (lo + hi) / 2)
    assert len(json.dumps(found)) < 8000
    level = torch.frombuffer(bytearray(base64.b64decode(found["map"])), dtype=torch.uint8).view(TOKENS, BINS)
    column = 77 * BINS // 500
    assert level[0, column] == 255 and int(level.max(1).values[1]) < 180
    assert found["hi"][column] == pytest.approx(900) and found["shift"][column] == pytest.approx(450, abs=3)
    assert min(found["lo"]) == pytest.approx(float(lo.min()), rel=1e-3)
    decoded = 900 * DEPTH ** (float(level[3, 5]) / 255 - 1)
    inside = torch.arange(500) * BINS // 500 == 5
    assert decoded == pytest.approx(float(rows[3, inside].abs().max()), rel=0.03)
    assert levels(torch.zeros(2, 3), 1.0) == base64.b64encode(bytes(6)).decode()
    assert extremes(torch.tensor([-2.0, 0.0]), torch.tensor([1.0, 5.0])) == {"lo": [-2.0, 0.0], "hi": [1.0, 5.0]}


def test_what_counts_as_an_outlier() -> None:
    ones = torch.ones(64)
    wide = torch.cat([torch.tensor([40.0]), torch.ones(63)])
    cases = [(1.0, ones, "none"), (16.0, ones, "first token"), (1.0, wide, "channels"), (700.0, wide, "both")]
    for first, rest, kind in cases:
        assert outliers(-rest, rest, first, rest)["kind"] == kind
    found = outliers(-wide, wide, 1.0, wide)
    assert found["ratio"] == 40 and found["largest"][0] == [0, -40.0, 40.0]


def test_rows_held_out_take_no_part_in_calibration(byte_tokenizer: Any) -> None:
    draw = random.Random(0)
    text = ["".join(draw.choices("abcdefghij klmnop", k=50)) for _ in range(400)]
    again = {"data": text, "tokenizer": byte_tokenizer, "samples": 16, "seq_len": 64, "seed": 1}
    tokens = calibration_data(text, byte_tokenizer, 32, 64, 0)
    rows, held = held_rows(tokens, again)
    assert held and 4 <= len(rows) < 16
    used = [ids.tolist() for batch in tokens for ids in batch["input_ids"]]
    assert not any(row["input_ids"][0].tolist() in used for row in rows)
    everything = calibration_data(text, byte_tokenizer, 10_000, 64, 0)
    rows, held = held_rows(everything, again)
    assert not held and len(rows) == 16, "where all is calibrated on, the last rows judge, and it is said"


def test_quality_of_a_model_against_itself() -> None:
    for name in ("llama", "bert"):
        rows = [row for batch in batches(name, 2) for row in single_rows(batch)]
        model = build(name)
        stacks = find_stacks(model, rows[0])
        found = Held(model, stacks, Resident(), rows, True).quality(model)
        assert found["quantized"] == found["float"]
        if name == "llama":
            assert found["ratio"] == 1 and found["top1"] == 1
            out = model(**rows[0]).logits
            loss = torch.nn.functional.cross_entropy(out[0, :-1], rows[0]["input_ids"][0, 1:])
            assert Held(model, stacks, Resident(), rows[:1], True).quality(model)["float"] == pytest.approx(
                math.exp(loss), rel=1e-5
            )


@pytest.mark.parametrize("prefix", ["none", (5,)])
def test_quality_is_that_of_the_model_as_it_is_used(prefix: Any, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "m")
    data = batches("llama", 6)
    rows = [row for batch in data for row in single_rows(batch)][12:16]
    found = []
    for out in (None, tmp_path / "out"):  # in memory, and streamed from its files
        options = {"samples": 12, "prefix": prefix, "verified": False, "progress": False}
        result = calib.quantize(tmp_path / "m", "w8a8-static", "rtn", data, out, **options)
        losses = [next_token_loss(result.model(**row).logits, row) for row in rows]
        quality = result.report["quality"]
        # a row behind a prefix may be summed in another order, and a code next to a boundary flips
        assert quality["quantized"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-3 if prefix != "none" else 1e-5)
        found.append((quality["float"], quality["ratio"], quality["top1"], *quality["ci95"]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_long_rows_are_judged_in_pieces() -> None:
    model = build("bloom")
    row = {"input_ids": torch.randint(3, 128, (1, 300)), "attention_mask": torch.ones(1, 300, dtype=torch.int64)}
    row["attention_mask"][0, 257:] = 0
    held = Held(model, find_stacks(model, row), Resident(), [row], True)
    assert [part["input_ids"].shape[1] for part in held.rows] == [128, 128], "one real token has no next one"
    assert held.quality(model)["tokens"] == 256


def test_figures_hold_what_they_are_given() -> None:
    image = base64.b64decode(png(bytes(range(6)), 3).partition(",")[2])
    assert struct.unpack(">II", image[16:24]) == (3, 2) and image[25] == 3
    start = image.index(b"IDAT") + 4
    size = struct.unpack(">I", image[start - 8 : start - 4])[0]
    assert zlib.decompress(image[start : start + size]) == b"\0\0\1\2\0\3\4\5"
    for low, high in ((0, 1), (-3561, 14), (0.001, 0.0013), (-1e-9, 1e9)):
        found = ticks(low, high, False, 4)
        assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high * 1.001
    assert ticks(0.02, 3000, True, 5) == [0.1, 1, 10, 100, 1000]
    shown = [number(v) for v in (0, 3, 0.00012, 1234.4, 56_000, 3.2e6, 1e-7, -45.678)]
    assert shown == ["0", "3", "0.00012", "1234", "56k", "3.2M", "1e-07", "-45.7"]
    panel = Panel((0, 0, 100, 100), (1, 100), (1, 100), xlog=True)
    assert panel.x(10) == 50 and panel.y(1) == 100 and panel.x(1e9) == 100, "what lies outside is drawn at the edge"
    assert clean({"a": [math.inf, 1.0, math.nan]}) == {"a": [None, 1.0, None]}


def test_inspect_finds_a_first_token_and_a_channel(byte_tokenizer: Any) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[5] = 60 * model.model.layers[1].input_layernorm.weight.abs().max()
    report = calib.inspect(model, batches("llama", 3), progress=False)
    assert set(report) == KEYS | {"sensitivity"} and report["kind"] == "inspect" and report["sensitivity"] is None
    sites = {s["name"]: s for s in report["sites"]}
    spoiled = sites["model.layers.1.self_attn.q_proj+k_proj+v_proj"]["outliers"]
    assert spoiled["kind"] == "channels" and spoiled["largest"][0][0] == 5
    assert sites["model.layers.0.self_attn.q_proj+k_proj+v_proj"]["outliers"]["kind"] == "none"
    assert sites["model.layers.0.self_attn.q_proj+k_proj+v_proj"]["fold"].startswith("input_layernorm: scale")
    assert next(iter(report["pictures"])) == "model.layers.1.self_attn.q_proj+k_proj+v_proj", "the strongest first"
    stands_alone(page(report))


def test_inspect_changes_nothing() -> None:
    model, before = build("opt"), build("opt").state_dict()
    calib.inspect(model, batches("opt", 2), sensitivity="w4a8", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_sensitivity_is_the_loss_that_one_linear_adds() -> None:
    model, data = build("llama"), batches("llama", 2)
    found = calib.inspect(model, data, sensitivity="w4a8", progress=False)["sensitivity"]
    assert len(found["linears"]) == 14 and len(found["blocks"]) == 2 and found["metric"] == "next-token loss"
    name = "model.layers.0.mlp.gate_proj"
    rows = [row for batch in data for row in single_rows(batch)]
    judge = Held(model, find_stacks(model, rows[0]), Resident(), rows, False)
    assert found["float_loss"] == pytest.approx(sum(judge.losses) / len(rows), rel=1e-6)
    linear = model.get_submodule(name)
    scheme = SCHEMES["w4a8"]
    inputs = ActivationQuantizer(scheme.inputs, linear.in_features)
    module = QuantLinear.from_float(linear.weight.detach(), None, scheme.weights, inputs)
    model.set_submodule(name, module)
    added = math.log(judge.quality(model)["ratio"])
    assert next(e["loss"] for e in found["linears"] if e["name"] == name) == pytest.approx(added, rel=1e-3, abs=1e-6)


def test_a_model_may_write_the_text_that_it_is_inspected_on(tmp_path: Path, byte_tokenizer: Any) -> None:
    folder = save_llama(tmp_path / "m", byte_tokenizer)  # from a folder its weights are streamed, and cannot generate
    report = calib.inspect(folder, "self", samples=2, seq_len=16, progress=False)
    assert report["sites"]


def test_proposed_formats_fit_the_size_and_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("llama").save_pretrained(tmp_path / "m")
    whole = sum(4 * p.numel() for p in build("llama").parameters())
    data = batches("llama", 2)
    report = calib.inspect(tmp_path / "m", data, sensitivity="w4a8", max_size=int(0.45 * whole), progress=False)
    advice = report["sensitivity"]["advice"]
    assert advice["bytes"] <= 0.45 * whole and len(set(advice["formats"].values())) > 1
    stands_alone(page(report))
    file = tmp_path / "mixed.json"
    file.write_text(json.dumps(advice["scheme"]))
    scheme = cli.RecipeOptions(scheme=str(file)).arguments("m")["scheme"]
    assert scheme == Scheme.model_validate(advice["scheme"])
    result = calib.quantize(tmp_path / "m", scheme, "rtn", data, progress=False)
    for name, entry in result.plan.entries.items():
        format = advice["formats"].get(name, "float")
        assert (entry.status == "excluded") == (format == "float"), name
    file.write_text('{"name": "x"}')
    assert cli.run(["plan", str(tmp_path / "m"), "--scheme", str(file)]) == 2
    assert "is no scheme: weights" in capsys.readouterr().err
    with pytest.raises(InputError, match="smallest formats"):
        calib.inspect(tmp_path / "m", data, sensitivity="w4a8", max_size=1000, progress=False)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ("--max-size 1MiB", 2, "add --sensitivity"),
        ("--html /proc/none/x.html", 6, "cannot write"),
        ("--data nowhere.txt", 4, "nowhere.txt"),
        ("--sensitivity --scheme w9", 2, "w9"),
    ],
)
def test_inspect_fails_in_one_line(
    options: str, code: int, says: str, tmp_path: Path, byte_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    build("llama").save_pretrained(tmp_path / "m")
    byte_tokenizer.save_pretrained(tmp_path / "m")
    assert cli.run(["inspect", str(tmp_path / "m"), "-q", *options.split()]) == code
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error


def test_inspect_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(__file__).resolve().parents[2] / "shared/models/stories260k"
    if not model.is_dir():
        pytest.skip("../shared is absent")
    html_file, scheme = tmp_path / "a/o.html", tmp_path / "s.json"
    options = f"--samples 4 --seq-len 64 --sensitivity --scheme w4a8 --html {html_file} --scheme-out {scheme} --json"
    assert cli.run(["inspect", str(model), *options.split()]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["kind"] == "inspect"
    assert "inputs: " in out and "added next-token loss" in out
    stands_alone(html_file.read_text())
    assert Scheme.model_validate_json(scheme.read_text()).name == "w4a8-mixed"
    assert cli.run(["inspect", "--help"]) == 0 and "Usage: calib" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is absent")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [375, 1100])
def test_a_browser_draws_it(quantized: calib.Result, tmp_path: Path, width: int, dark: bool) -> None:
    """In the theme's colours, and no wider than the window."""
    from PIL import Image

    text = quantized.report_html()
    (tmp_path / "report.html").write_text(text)
    style = f"border:0;width:{width}px;height:4000px"  # a window is at least 500 wide, a frame is not
    (tmp_path / "frame.html").write_text(f"<body style='margin:0'><iframe src='report.html' style='{style}'>")
    shot = tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = ["chromium", *options, *theme, "--window-size=1200,4000", f"--screenshot={shot}", "frame.html"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    image = Image.open(shot).convert("RGB").crop((0, 0, width, 4000))
    colours = {colour for _, colour in image.getcolors(1 << 24) or []}
    paper, before, after = ("0e1217", "f5904a", "62a5ff") if dark else ("ffffff", "c2540a", "1763d6")
    for colour in (paper, before, after):
        assert tuple(bytes.fromhex(colour)) in colours, colour
    edge = image.crop((width - 12, 0, width - 1, 4000)).getcolors(1 << 24) or []
    assert [colour for _, colour in edge] == [tuple(bytes.fromhex(paper))], "nothing runs into the margin"
