"""A folder full of bad inputs, for commands that run inside it: each is named for what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch import Tensor

import calib
from calib.export.verify import answer, store_reference
from model_zoo.entry import load

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while. "
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
WEIGHTS, INDEX, DOWN = "model.safetensors", "model.safetensors.index.json", "model.layers.1.mlp.down_proj.weight"
Change = Callable[[Path], object]


def packed_header(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: list[Any] | None = None, offsets: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [1], "data_offsets": offsets or [0, 4]}


HUGE = 10 * 2**40  # bytes that a header claims
DEEP = '{"a":' * 100_000  # JSON that no parser follows


def in_json(file: str, **values: Any) -> Change:
    """Set values of a JSON file; None removes."""

    def change(folder: Path) -> None:
        held = json.loads((folder / file).read_text())
        held = {k: v for k, v in (held | values).items() if v is not None}
        (folder / file).write_text(json.dumps(held))

    return change


def in_weights(change: Callable[[dict[str, Tensor]], object]) -> Change:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return changed


def in_quantization(change: Callable[[dict[str, Any]], object]) -> Change:
    def changed(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return changed


def content(file: str, value: str | bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(value.encode() if isinstance(value, str) else value)


def piped(file: str) -> Change:
    """A named pipe that nobody writes to, in the place of a file: opening it waits for ever."""
    return lambda folder: ((folder / file).unlink(), os.mkfifo(folder / file))


def sharded(*names: Any) -> Change:
    """An index in the place of the single file, with every tensor in one of these shards."""

    def change(folder: Path) -> None:
        keys = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder / "part.safetensors")
        places = {key: names[i % len(names)] for i, key in enumerate(keys)}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return change


def filled(name: str, value: float) -> Change:
    return in_weights(lambda tensors: tensors[name].view(-1)[7:8].fill_(value))


MODELS: dict[str, Change] = {  # each a copy of the folder llama, changed
    "no-config": lambda f: (f / "config.json").unlink(),
    "config-a-list": content("config.json", "[]"),
    "config-not-json": content("config.json", "{nope"),
    "config-not-utf8": content("config.json", b"\xff\xfe{}"),
    "config-of-nothing-known": in_json("config.json", model_type="telepathy", architectures=["TelepathyForCausalLM"]),
    "config-without-type": in_json("config.json", model_type=None),
    "config-of-another-task": in_json("config.json", architectures=["LlamaForTelepathy"]),
    "config-negative-size": in_json("config.json", hidden_size=-32),
    "config-size-a-word": in_json("config.json", hidden_size="big"),
    "config-heads": in_json("config.json", num_attention_heads=5),
    "config-other-width": in_json("config.json", intermediate_size=48),
    "code-of-its-own": in_json(
        "config.json", model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    ),
    "quantized-by-another": in_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    "quantized-by-nobody": in_json("config.json", quantization_config={"bits": 4}),
    "only-pickle": lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
    "empty-weights": content(WEIGHTS, b""),
    "cut-weights": lambda f: content(WEIGHTS, (f / WEIGHTS).read_bytes()[:5000])(f),
    "header-not-json": content(WEIGHTS, packed_header(b"{nope}  ")),
    "header-of-10-tb": content(WEIGHTS, packed_header({DOWN: entry("F32", [HUGE // 4], [0, HUGE])})),
    "header-longer-than-file": content(WEIGHTS, struct.pack("<Q", HUGE) + b"{}"),
    "odd-dtype": content(WEIGHTS, packed_header({DOWN: entry("F8_E5M2", [4])}, b"1234")),
    "missing-tensor": in_weights(lambda d: d.pop(DOWN)),
    "other-shape": in_weights(lambda d: d.update({DOWN: d[DOWN][:5].clone()})),
    "integer-tensor": in_weights(lambda d: d.update({DOWN: d[DOWN].int()})),
    "nan": filled(DOWN, float("nan")),
    "inf": filled("model.embed_tokens.weight", float("inf")),
    "index-not-json": lambda f: (sharded("part.safetensors")(f), content(INDEX, "{nope")(f)),
    "index-a-list": lambda f: (sharded("part.safetensors")(f), content(INDEX, "[]")(f)),
    "index-of-numbers": sharded(7),
    "index-of-absent-shards": sharded("part.safetensors", "gone.safetensors"),
    "index-going-up": sharded("../llama/model.safetensors"),
    "index-absolute": sharded("/etc/hostname"),
    "index-of-pickle": lambda f: (sharded("part.bin")(f), (f / "part.safetensors").rename(f / "part.bin")),
    "no-tokenizer": lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
    "tokenizer-cut": lambda f: content("tokenizer.json", (f / "tokenizer.json").read_bytes()[:100])(f),
    "config-deep": content("config.json", DEEP),
    "index-deep": lambda f: (sharded("part.safetensors")(f), content(INDEX, DEEP)(f)),
    "tokenizer-deep": content("tokenizer.json", DEEP),
    "generation-deep": content("generation_config.json", DEEP),
    "config-a-pipe": piped("config.json"),
    "weights-a-pipe": piped(WEIGHTS),
    "tokenizer-a-pipe": piped("tokenizer.json"),
    "overflow": in_weights(lambda d: [d[f"model.layers.1.mlp.{p}_proj.weight"].fill_(1e25) for p in ("up", "gate")]),
}


def groups(**values: Any) -> Change:
    return in_quantization(lambda q: q["groups"][0].update(values))


CHECKPOINTS: dict[str, Change] = {  # each a copy of the folder small, which calib wrote
    "newer-format": in_quantization(lambda q: q.update(format_version=99)),
    "unknown-key": in_quantization(lambda q: q.update(surprise=1)),
    "groups-a-word": in_quantization(lambda q: q.update(groups="all")),
    "group-without-weights": in_quantization(lambda q: q["groups"][0].pop("weights")),
    "group-of-99-bits": groups(weights={"bits": 99}),
    "group-of-odd-field": groups(weights={"bits": 8, "colour": "red"}),
    "group-of-unknown-grid": groups(weights={"kind": "fractal"}),
    "group-without-targets": in_quantization(lambda q: q["groups"][0].pop("targets")),
    "group-of-nothing": groups(targets=["model.layers.7.nose"]),
    "group-of-a-norm": groups(targets=["model.norm"]),
    "prefix-a-word": in_quantization(lambda q: q.update(prefix="none")),
    "rewrites-a-word": in_quantization(lambda q: q.update(rewrites="none")),
    "lacks-codes": in_weights(lambda d: d.pop(next(k for k in d if "layers.1" in k))),
    "too-many-tensors": in_weights(lambda d: d.update({"extra": torch.zeros(2)})),
    "scale-of-other-shape": in_weights(
        lambda d: d.update({k: d[k][:3].clone() for k in [next(k for k in d if k.endswith("weight_scale"))]})
    ),
    "other-bytes": filled("model.norm.weight", 3.0),
    "cut-checkpoint": lambda f: content(WEIGHTS, (f / WEIGHTS).read_bytes()[:5000])(f),
    "manifest-not-json": content("calib.json", "{nope"),
    "manifest-a-list": content("calib.json", "[]"),
    "manifest-going-up": in_json("calib.json", sha256={"../llama/config.json": "0"}),
    "never-verified": lambda f: shutil.rmtree(f / "verify"),
    "reference-cut": content("verify/reference.safetensors", b"12345678"),
    "reference-of-nothing": lambda f: save_file({"x": torch.zeros(1)}, f / "verify" / "reference.safetensors"),
    "checkpoint-config-deep": content("config.json", DEEP),
    "manifest-deep": content("calib.json", DEEP),
    "manifest-a-pipe": piped("calib.json"),
    "mended-by-hand": lambda f: (f / "config.json").unlink(),
}
FILES: dict[str, str | bytes] = {
    "text.txt": TEXT * 20,
    "empty.txt": "",
    "blank.txt": "\n \n",
    "short.txt": "Hello.",
    "binary.bin": bytes(range(256)) * 8,
    "latin1.txt": "déjà vu ".encode("latin-1") * 99,
    "no-text.jsonl": '{"id": 1}\n',
    "nope.jsonl": "{nope\n",
    "numbers.json": "[1, 2]",
    "deep.json": "[" * 100_000,
    "nope.parquet": b"PAR1 no",
    "ragged.csv": "text,label\na,b,c\n",
    "labels.tsv": "sentence\tlabel\ngood\tfine\n",
    "unlabelled.tsv": "sentence\tmark\ngood\t1\n",
    "labels-7.tsv": "sentence\tlabel\ngood\t7\nbad\t0\n",
    "header.tsv": "sentence\tlabel\n",
    "chat.jsonl": '{"messages": [{"role": "user", "content": "Hello"}]}\n',
    "pairs.tsv": "a\tb\n",
    "scheme-nope.json": "{nope",
    "scheme-list.json": "[]",
    "scheme-deep.json": DEEP,
    "config-deep.json": DEEP,
    "scheme-99.json": '{"name": "x", "weights": {"bits": 99}}',
    "scheme-grid.json": '{"name": "x", "weights": {"kind": "fractal"}}',
    "scheme-key.json": '{"name": "x", "weights": {"bits": 8}, "colour": 1}',
    "scheme-rule.json": '{"name": "x", "weights": {"bits": 8}, "exclude": ["("]}',
    "scheme-group.json": '{"name": "x", "weights": {"bits": 4, "granularity": "group"}}',
    "scheme-bytes.json": b"\xff\xfe",
    "config-list.json": "[]",
    "config-type.json": '{"model_type": "telepathy"}',
    "config-heads.json": '{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 0}',
    "broken.gguf": b"GGUF" + b"\xff" * 64,
}
ZOO = "minilm-l6-w8a8-static"
BUILDS: dict[str, dict[str, Any]] = {  # folders of these files, as calib zoo build writes them
    "build-not-json": {"zoo.json": "{nope"},
    "build-deep": {"zoo.json": DEEP},
    "build-a-list": {"zoo.json": []},
    "build-of-nothing": {"zoo.json": {}},
    "build-of-another": {"zoo.json": {"name": "another", "recipe": "0"}},
    "build-of-old": {"zoo.json": {"name": ZOO, "recipe": "0"}},
    "build-unmeasured": {"zoo.json": {"name": ZOO, "recipe": load(ZOO).fingerprint()}},
    "build-hollow": {"zoo.json": {"name": ZOO, "recipe": load(ZOO).fingerprint(), "built": {}}},
}
BUILDS["build-report-deep"] = {**BUILDS["build-hollow"], "report.json": DEEP}
BUILDS["build-report-a-list"] = {**BUILDS["build-hollow"], "report.json": []}
RUN = ["quantize", "llama", "--quiet", "--method", "rtn", "--prefix", "none", "--no-verify", "--no-report"]
DRAW = ["--data", "text.txt", "--samples", "4", "--seq-len", "32", "--batch-size", "2", "--auto-seconds", "0"]


def _last_line(change: Callable[[dict[str, Any]], object]) -> Change:
    def changed(folder: Path) -> None:
        lines = (folder / "journal.jsonl").read_text().splitlines()
        record = json.loads(lines[-1])
        change(record)
        (folder / "journal.jsonl").write_text("\n".join([*lines[:-1], json.dumps(record)]) + "\n")

    return changed


JOURNALS: dict[str, Change] = {  # each a copy of what a killed run left, for the output folder of that name
    "damaged-line": lambda f: content("journal.jsonl", (f / "journal.jsonl").read_text() + "{nope}\n")(f),
    "line-a-list": lambda f: content("journal.jsonl", (f / "journal.jsonl").read_text() + "[]\n")(f),
    "head-a-list": content("journal.jsonl", "[]\n"),
    "shard-gone": lambda f: [p.unlink() for p in f.glob("model/*.safetensors")],
    "shard-of-other-bytes": lambda f: [
        p.write_bytes(p.read_bytes()[:-1] + b"x") for p in f.glob("model/*.safetensors")
    ],
    "shard-going-up": _last_line(lambda r: r["shard"].update(file="../llama/model.safetensors")),
    "line-of-another-block": _last_line(lambda r: r.update(block="model.layers.9")),
    "line-without-structure": _last_line(lambda r: r.pop("structure")),
    "structure-of-99-bits": _last_line(
        lambda r: next(iter(r["structure"]["linears"].values())).update(weights={"bits": 99})
    ),
    "another-run": lambda f: None,
}


def fill(box: Path, tokenizer: Any, *, broken: bool = True) -> None:
    """Make all of it, or only what is whole."""
    t.logging.disable_progress_bar()
    vocabulary, sizes = len(tokenizer), {**SIZES, "num_labels": 2}
    gpt2 = t.GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=1, n_head=2, n_positions=128)
    made = {
        "llama": t.LlamaForCausalLM(t.LlamaConfig(vocab_size=vocabulary, **SIZES)),
        "bert": t.BertForSequenceClassification(t.BertConfig(vocab_size=vocabulary, **sizes)),
        "gpt2": t.GPT2LMHeadModel(gpt2),
        "small-vocabulary": t.LlamaForCausalLM(t.LlamaConfig(vocab_size=40, **SIZES)),
        "wider": t.LlamaForCausalLM(t.LlamaConfig(vocab_size=vocabulary, **{**SIZES, "hidden_size": 64})),
        "without-layers": t.LlamaForCausalLM(t.LlamaConfig(vocab_size=vocabulary, **{**SIZES, "num_hidden_layers": 0})),
    }
    for name, model in made.items():
        model.eval().save_pretrained(box / name)
        tokenizer.save_pretrained(box / name)
    ids = [{"input_ids": torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))}] * 2
    for name, form in (("small", "calib"), ("stock", "compressed-tensors")):
        result = calib.quantize(
            made["llama"] if form == "calib" else box / "llama", "w8a8", "rtn", ids, progress=False, report=False
        )
        result.tokenizer = tokenizer
        result.save(box / name, form, verified=False)  # type: ignore[arg-type]
        inputs = {"input_ids": ids[0]["input_ids"]}
        store_reference(box / name, answer(result.model, inputs), inputs)
    content("text.txt", FILES["text.txt"])(box)
    if not broken:
        return
    for source, changes in (("llama", MODELS), ("small", CHECKPOINTS)):
        for name, change in changes.items():
            shutil.copytree(box / source, box / name)
            change(box / name)
    for name, text in FILES.items():
        content(name, text)(box)
    for name, files in BUILDS.items():
        (box / name).mkdir()
        for file, value in files.items():
            content(file, value if isinstance(value, str) else json.dumps(value))(box / name)
    for name in ("pipe", "pipe.txt", "pipe.json", "pipe.gguf"):
        os.mkfifo(box / name)
    (box / "thesis").mkdir()
    content("thesis/chapter.md", "mine")(box)
    (box / "no-text").mkdir()
    content("no-text/image.png", b"\x89PNG")(box)


def journals(box: Path, killed: Path) -> None:
    """Spread the partial output of a killed run."""
    for name, change in JOURNALS.items():
        folder = box / f".{name}.partial"
        shutil.copytree(killed, folder)
        change(folder)
