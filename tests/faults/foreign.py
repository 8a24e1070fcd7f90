"""Damaged GGUF and ONNX files, read as calib reads them, each in a process of its own.

``python -m tests.faults.foreign --draws 1000`` prints how the readings ended. transformers and onnxruntime read these
formats for calib, which therefore does it in a child process (conversion, verification): a crash there is one line of
error here. What must not be is a hang, or memory taken on a file's word; both are counted apart.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor

import calib
from calib.errors import CalibError
from calib.export.verify_worker import onnxruntime_answer
from model_zoo.sources import ResolvedModel, load_model
from tests.families import batches

SECONDS, ROOM = 30, 1 << 30  # of one reading: processor time, and address space beyond what the process has


def written(place: Path) -> dict[str, Path]:
    """A GGUF and an ONNX file of tiny models."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model, data = transformers.LlamaForCausalLM(config).eval(), [{"input_ids": torch.arange(3, 19).reshape(2, 8)}]
    options = {"progress": False, "report": False, "scheme_options": {"weight_group": 32}}
    calib.quantize(model, "w4a16", "rtn", data, format="gguf", **options).save(place / "g", "gguf", verified=False)
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    bert = transformers.BertForSequenceClassification(config).eval()
    found = calib.quantize(bert, "w8a8-static", "rtn", batches("bert"), progress=False, report=False)
    found.save(place / "o", "onnx", verified=False)
    return {"gguf": place / "g" / "model.gguf", "onnx": place / "o" / "model.onnx"}


def read_gguf(file: Path) -> None:
    load_model(ResolvedModel(file.name, str(file.parent), "folder", file.name, gguf_file=file.name), progress=False)


def read_onnx(file: Path) -> None:
    inputs: Mapping[str, Tensor] = batches("bert")[0]
    onnxruntime_answer(file, dict(inputs))


READERS: dict[str, Callable[[Path], None]] = {"gguf": read_gguf, "onnx": read_onnx}


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Cut, overwritten (mostly in the header) or with a number in it made huge."""
    out = bytearray(data)
    kind = draw.randrange(3)
    if kind == 0:
        return bytes(out[: draw.randrange(len(out))])
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(min(len(out) - 8, 4000) if draw.random() < 0.8 else len(out) - 8)
        if kind == 1:
            out[at] = draw.randrange(256)
        else:
            out[at : at + 8] = draw.choice([2**63 - 1, 2**40, 2**32, 2**31 - 1, 2**64 - 1]).to_bytes(8, "little")
    return bytes(out)


def ending(read: Callable[[Path], None], file: Path) -> str:
    """How a reading ended: read, refused, memory, crashed (by which signal) or hung."""
    if not (pid := os.fork()):
        code = 3
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (space + ROOM, space + ROOM))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
            read(file)
            code = 0
        except MemoryError:
            code = 2
        except CalibError as error:
            code = 2 if "memory" in str(error) else 1
        except Exception as error:
            code = 2 if "alloc" in str(error).lower() or "memory" in str(error).lower() else 1
        finally:
            os._exit(code)
    end = time.monotonic() + 20 * SECONDS  # of one that waits
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            names = {0: "read", 1: "refused", 2: "out of memory", 3: "ended"}
            if code == -signal.SIGXCPU:
                return "hung"
            return f"crashed: {signal.Signals(-code).name}" if code < 0 else names[code]
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def foreign(draws: int, seed: int = 0, keep: Path | None = None) -> dict[str, Counter[str]]:
    """So many damaged files of each format. keep: a folder for those that hung or crashed."""
    torch.set_num_threads(1)
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        files = written(Path(place))
        for kind, file in files.items():
            draw, whole = random.Random(seed), file.read_bytes()
            assert ending(READERS[kind], file) == "read"
            found[kind] = Counter()
            for number in range(draws):
                file.write_bytes(damaged(whole, draw))
                how = ending(READERS[kind], file)
                found[kind][how] += 1
                if keep is not None and (how == "hung" or how.startswith("crashed")):
                    (keep / f"{number}-{how.rpartition(' ')[2]}.{kind}").write_bytes(file.read_bytes())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for files that hung or crashed a reader")
    given = parser.parse_args()
    found = foreign(given.draws, given.seed, given.keep)
    for kind, counts in found.items():
        print(f"{kind}: " + ", ".join(f"{count} {how}" for how, count in counts.most_common()))
    return int(any(counts["hung"] for counts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
