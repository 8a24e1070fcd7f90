"""Streaming, journal and several processes: every way of running gives the same bits."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import calib
from calib.engine import HiddenStates, Journal
from calib.engine.run import share_of
from calib.errors import InputError, ModelError, OutputError
from model_zoo.sources import resolve
from model_zoo.stream import NotStreamable, open_streamed
from tests import families

WHOLE = {"gpt_neox", "mixtral"}  # transformers renames or merges what their files hold
SETTINGS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "compressed-tensors": ("llama", "w8a8", "os+", {}),
    "rotated and rounded": ("llama", "w8a8-static", "hadamard,os+,gptq", {}),
    "paired, learned, behind a prefix": (
        "llama",
        "w4a8-static",
        "rotate,os+,gptaq",
        {"refine": 4, "prefix": (7,)},
    ),
    "half precision, paired, learned": (
        "llama",
        "w4a8-static",
        "rotate,os+,gptaq",
        {"refine": 4, "prefix": (7,), "dtype": torch.bfloat16},
    ),
    "half precision, float inputs": ("gpt2", "w8a8-static", "os+", {"inputs": "float", "dtype": torch.float16}),
    "float inputs": ("qwen3", "w8a8-static", "os+", {"inputs": "float"}),
    "prefix": ("llama", "w8a8-static", "os+", {"prefix": (1,)}),
    "two stacks": ("bart", "w6a6-static", "os+", {}),
    "experts, loaded whole": ("mixtral", "w8a8-static", "os+", {}),
    "transposed, packed": ("gpt2", "w4a16", "rtn", {}),
    "key-value cache": ("llama", "w8a8", "os+", {"scheme_options": {"kv_bits": 8}}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def get(family: str) -> Path:
        if not (root / family).is_dir():
            families.build(family).save_pretrained(root / family)
        return root / family

    return get


def quantize(model: Path, family: str, scheme: str, method: str, out: Path | None, **options: Any) -> calib.Result:
    return calib.quantize(
        model, scheme, method, data=families.batches(family), out=out, progress=False, verified=False, **options
    )


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same(a: Path, b: Path) -> None:
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys()
    assert not [name for name in x if not torch.equal(x[name], y[name])]
    x_config, y_config = (json.loads((f / "config.json").read_text()) for f in (a, b))
    assert x_config["quantization_config"] == y_config["quantization_config"]


class Killed(BaseException):
    pass


def killed_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next runs die right after the journal has taken so many blocks."""
    write, seen = Journal.write, []

    def dying(self: Journal, *args: Any) -> None:
        write(self, *args)
        seen.append(args)
        if len(seen) == blocks:
            raise Killed

    monkeypatch.setattr(Journal, "write", dying)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_streamed_model_is_the_whole_one(family: str, models: Callable[[str], Path]) -> None:
    found = resolve(models(family), progress=False)
    if family in WHOLE:
        with pytest.raises(NotStreamable, match="is stored"):
            open_streamed(found, progress=False)
        return
    model, store, _ = open_streamed(found, progress=False)
    batch = families.batches(family)[0]
    whole = families.build(family)
    with torch.no_grad():
        got, want = model(**batch), whole(**batch)
    assert torch.equal(got[0], want[0])
    assert all(p.device.type == "meta" for p in model.parameters())
    with store.keeping():
        model(**batch)
        assert not all(p.device.type == "meta" for p in model.parameters())
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("setting", SETTINGS)
def test_streamed_killed_and_resumed_is_as_if_never_stopped(
    setting: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, scheme, method, options = SETTINGS[setting]
    model = models(family)
    whole = quantize(model, family, scheme, method, None, **options)
    whole.save(tmp_path / "whole", verified=False)
    with monkeypatch.context() as patch:
        killed_after(1, patch)
        with pytest.raises(Killed):
            quantize(model, family, scheme, method, tmp_path / "out", **options)
    assert (tmp_path / ".out.partial").is_dir() and not (tmp_path / "out").exists()
    result = quantize(model, family, scheme, method, tmp_path / "out", **options)
    assert any(note.startswith("resumed: 1 of") for note in result.plan.notes)
    assert_same(tmp_path / "whole", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
    assert not list((tmp_path / "out").glob("*.part"))
    assert result.report["sites"] == json.loads(json.dumps(whole.report["sites"]))
    assert {n: e.status for n, e in result.plan.entries.items()} == {n: e.status for n, e in whole.plan.entries.items()}
    ids = families.batches(family)[0]
    with torch.no_grad():
        assert torch.equal(result.model(**ids)[0], whole.model(**ids)[0])


def test_every_tensor_comes_and_goes_with_its_unit(models: Callable[[str], Path]) -> None:
    model, store, _ = open_streamed(resolve(models("llama"), progress=False), progress=False)
    block = model.get_submodule("model.layers.0")
    with store.hold("model.layers.0"), store.hold("model.layers.0"):
        assert all(p.device.type == "cpu" for p in block.parameters())
        assert all(p.device.type == "meta" for p in model.get_submodule("model.layers.1").parameters())
    assert all(p.device.type == "meta" for p in model.parameters())
    assert model.model.rotary_emb.inv_freq.device.type == "cpu"


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    whole = families.build("llama")
    whole.config.tie_word_embeddings = True
    whole.tie_weights()
    whole.save_pretrained(tmp_path / "tied")
    model, store, _ = open_streamed(resolve(tmp_path / "tied", progress=False), progress=False)
    with store.hold("lm_head"), store.hold("model.embed_tokens"):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    batch = families.batches("llama")
    result = calib.quantize(tmp_path / "tied", "w8a8", "os+", batch, tmp_path / "out", progress=False)
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    assert result.report["verify"]["max_difference"] == 0.0


def test_shards_and_half_precision_stream(tmp_path: Path) -> None:
    whole = families.build("llama").to(torch.bfloat16)
    whole.save_pretrained(tmp_path / "one")
    whole.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    for name in ("one", "many"):
        quantize(tmp_path / name, "llama", "w8a8-static", "os+", tmp_path / f"{name}-out")
    assert_same(tmp_path / "one-out", tmp_path / "many-out")


# what went wrong between two runs


def begun(models: Callable[[str], Path], out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        killed_after(1, patch)
        with pytest.raises(Killed):
            quantize(models("llama"), "llama", "w8a8-static", "os+", out)
    return out.parent / f".{out.name}.partial"


def test_another_run_is_refused_by_what_differs(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    begun(models, out, monkeypatch)
    with pytest.raises(InputError, match=r"another recipe seed .*--overwrite"):
        quantize(models("llama"), "llama", "w8a8-static", "os+", out, seed=3)
    with pytest.raises(InputError, match="another data"):
        calib.quantize(models("llama"), "w8a8-static", "os+", families.batches("llama")[:1], out, progress=False)
    with pytest.raises(InputError, match="another model"):
        quantize(models("qwen3"), "llama", "w8a8-static", "os+", out)
    monkeypatch.setattr("calib.__version__", "99")
    with pytest.raises(InputError, match="another versions calib"):
        quantize(models("llama"), "llama", "w8a8-static", "os+", out)
    monkeypatch.undo()
    quantize(models("llama"), "llama", "w8a8-static", "os+", out, seed=3, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_damage_is_named(models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    folder = begun(models, out, monkeypatch)
    shard = next((folder / "model").glob("*.safetensors"))
    good, lines = shard.read_bytes(), (folder / "journal.jsonl").read_bytes()

    def again() -> calib.Result:
        return quantize(models("llama"), "llama", "w8a8-static", "os+", out)

    shard.write_bytes(good[:-1] + b"\x07")
    with pytest.raises(OutputError, match=f"{shard.name} is not the file that was written"):
        again()
    shard.unlink()
    with pytest.raises(OutputError, match=f"{shard.name} is missing"):
        again()
    shard.write_bytes(good)
    (folder / "journal.jsonl").write_bytes(lines.replace(b'"block"', b'"blurb"'))
    with pytest.raises(OutputError, match=r"line 2 of .*journal.jsonl is damaged"):
        again()
    (folder / "journal.jsonl").write_bytes(lines + b'{"block": "model.lay')  # killed while writing a line
    assert any("resumed: 1 of 2" in note for note in again().plan.notes)


def test_two_runs_at_once_are_refused(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(models, tmp_path / "out", monkeypatch)
    fingerprint = json.loads((folder / "journal.jsonl").read_bytes().splitlines()[0])
    first = Journal(folder, fingerprint)
    with pytest.raises(OutputError, match="another process is writing"):
        quantize(models("llama"), "llama", "w8a8-static", "os+", tmp_path / "out")
    first.close(remove=False)


def test_an_index_that_names_absent_files(tmp_path: Path) -> None:
    families.build("llama").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    victim = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    victim.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=victim.name):
        quantize(tmp_path / "model", "llama", "w8a8", "rtn", tmp_path / "out")
    victim.write_bytes((tmp_path / "elsewhere").read_bytes()[:50])
    with pytest.raises(ModelError, match=f"{victim.name} is truncated"):
        quantize(tmp_path / "model", "llama", "w8a8", "rtn", tmp_path / "out")


def test_a_tensor_of_another_shape_is_not_streamed(tmp_path: Path) -> None:
    families.build("llama").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    changed = load_file(file)
    changed["model.norm.weight"] = torch.ones(3)
    save_file(changed, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        quantize(tmp_path / "model", "llama", "w8a8", "rtn", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_spill_and_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    states = HiddenStates(budget=3 * 40 * torch.empty((), dtype=dtype).element_size(), folder=tmp_path)
    given = [torch.randn(2, n, 2).to(dtype) for n in (10, 5, 20, 1, 7)]
    for tensor in given:
        states.append(tensor)
    assert states.on_disk > 0 and list(tmp_path.iterdir()) == []  # the file has no name: nothing to clean up
    assert len(states) == 5 and all(torch.equal(a, b) for a, b in zip(states, given, strict=True))
    states[2], states[0] = given[2] + 1, given[0] - 1
    assert torch.equal(states[2], given[2] + 1) and torch.equal(states[3], given[3])
    assert torch.equal(states[0], given[0] - 1)


def test_hidden_states_are_whole_where_the_system_moves_a_part_at_a_time(tmp_path: Path) -> None:
    """As it does past 2 GiB, and as a disk about to be full does."""

    class Slow(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:7])

        def readinto(self, buffer: Any) -> int:
            return super().readinto(buffer[:5])

    states = HiddenStates(0, tmp_path)
    states._file = Slow(tmp_path / "spilled", "w+")  # type: ignore[assignment]
    given = [torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    for tensor in given:
        states.append(tensor)
    states[1] = given[1] = -given[1]
    assert all(torch.equal(a, b) for a, b in zip(states, given, strict=True))
    with (tmp_path / "spilled").open("r+b") as file:
        file.truncate(4 * 60 * 3 + 11)
    with pytest.raises(OSError, match="lacks 229 of 240 bytes"):
        states[3]


def test_a_budget_changes_no_bit(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(models("llama"), "llama", "w8a8-static", "os+", tmp_path / "kept", inputs="float")
    monkeypatch.setattr("calib.engine.run.Engine._hidden", lambda self: HiddenStates(0, tmp_path))
    quantize(models("llama"), "llama", "w8a8-static", "os+", tmp_path / "spilled", inputs="float")
    assert_same(tmp_path / "kept", tmp_path / "spilled")


def test_too_little_memory_is_refused_by_the_flag(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--max-memory .* is too small.*give --max-memory"):
        quantize(models("llama"), "llama", "w8a8-static", "os+", tmp_path / "out", max_memory=10 << 20)
    with pytest.raises(InputError, match="this model was loaded whole"):
        quantize(models("mixtral"), "mixtral", "w8a8-static", "os+", tmp_path / "out", max_memory=1 << 40)
    assert list(tmp_path.iterdir()) == []
    quantize(models("llama"), "llama", "w8a8-static", "os+", tmp_path / "out", max_memory=8 << 30)
    assert (tmp_path / "out").is_dir()


def test_a_share_depends_on_no_one_else() -> None:
    batches = [{"input_ids": torch.full((4, 128), i)} for i in range(13)]
    whole = share_of(batches, 0, 1)
    assert whole.probes == 4 and whole.first[whole.probes] == 2048
    for world in (2, 3):
        shares = [share_of(batches, rank, world) for rank in range(world)]
        assert {share.probes for share in shares} == {whole.probes}
        assert shares[0].first[: whole.probes] == whole.first[: whole.probes]
        together = sorted((f, b["input_ids"].shape) for s in shares for f, b in zip(s.first, s.batches, strict=True))
        assert together == [(f, b["input_ids"].shape) for f, b in zip(whole.first, whole.batches, strict=True)]
        tokens = [sum(b["input_ids"].numel() for b in share.batches) for share in shares]
        assert max(tokens) - min(tokens) <= 512
    with pytest.raises(InputError, match="cannot be shared by 3 processes"):
        share_of(batches[:5], 0, 3)


# processes

COMMAND = ["--scheme", "w8a8-static", "--method", "os+", "--samples", "8", "--seq-len", "32", "--batch-size", "2"]


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


FORKS = """
import json, os, sys
from calib import cli
print(cli.run(json.loads(sys.argv[1])), flush=True)
for line in sys.stdin:
    if not (pid := os.fork()):
        os._exit(cli.run(json.loads(line)))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""  # a process for each job, without the imports, which take longer than the job


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_kill_9_at_any_time(shared: Path, tmp_path: Path) -> None:
    """20 kills at random times, also inside writes; what comes out is what comes out undisturbed."""
    model = shared / "models" / "stories260k"
    base = ["quantize", str(model), "--no-verify", "-q", *COMMAND, "--threads", "1", "--out"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pipes["env"] = environment() | {"TOKENIZERS_PARALLELISM": "false"}
    first = json.dumps([*base, str(tmp_path / "plain")])
    with subprocess.Popen([sys.executable, "-c", FORKS, first], **pipes) as forks:
        assert forks.stdin is not None and forks.stdout is not None
        assert forks.stdout.readline() == "0\n"

        def run(out: Path, seconds: float | None = None) -> int:
            """Exit code of the job, killed after some seconds."""
            print(json.dumps([*base, str(out)]), file=forks.stdin, flush=True)
            pid = int(forks.stdout.readline())  # type: ignore[union-attr]
            if seconds is not None:
                time.sleep(seconds)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return int(forks.stdout.readline())  # type: ignore[union-attr]

        begin = time.monotonic()
        assert run(tmp_path / "again") == 0
        whole = time.monotonic() - begin
        assert_same(tmp_path / "plain", tmp_path / "again")
        generator, kills, finished = torch.Generator().manual_seed(0), 0, 0
        while kills < 20:
            kills += run(tmp_path / "out", whole * 1.1 * float(torch.rand((), generator=generator))) == -signal.SIGKILL
            if (tmp_path / "out").exists():
                finished += 1
                assert_same(tmp_path / "plain", tmp_path / "out")
                for file in [*(tmp_path / "out").rglob("*")]:
                    if file.is_file():
                        file.unlink()
                (tmp_path / "out").rename(tmp_path / f"done-{finished}")
        assert run(tmp_path / "out") == 0
    assert_same(tmp_path / "plain", tmp_path / "out")
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_two_processes_are_one(shared: Path, tmp_path: Path) -> None:
    model = shared / "models" / "stories260k"
    more = ["--samples", "48", "--seq-len", "128", "--batch-size", "4"]
    arguments = ["quantize", str(model), "--no-verify", "-q", *COMMAND, *more, "--threads", "1"]
    one = [sys.executable, "-m", "calib", *arguments, "--out", str(tmp_path / "one")]
    two = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "calib"]
    for command in (one, [sys.executable, *two, *arguments, "--out", str(tmp_path / "two")]):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "one", tmp_path / "two")
    short = [*arguments, "--samples", "2", "--out", str(tmp_path / "short")]
    done = subprocess.run(
        [sys.executable, *two, *short], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "cannot be shared by 2 processes; lower --batch-size" in done.stderr
