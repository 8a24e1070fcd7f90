"""Stop real commands at random moments, by signals and by limits, and look at what is left.

``python -m tests.faults.harness --kills 200`` prints the table. Each command is ``python -m calib``'s own entry, run in
a process forked from this one once its libraries are loaded: most of a cold start is imports, where nothing can be
lost, and a fork makes the moments fall into the work. ``--cold`` starts a fresh interpreter each time instead.

Faults: ``kill`` and ``term`` are signals at a random time; ``disk`` limits the size of files the process may write
(RLIMIT_FSIZE: a write in the middle of a file fails, as on a full disk or a broken one); ``memory`` limits its address
space (RLIMIT_AS). After each: what stands at the output is absent or whole and bit for bit the undisturbed run's, an
error is one line with a known exit code, the same command then ends with those bits, and nothing else is left.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calib import cli
from tests.faults import box

ROOT = Path(__file__).resolve().parents[2]
KNOWN = (2, 3, 4, 5, 6, 7)
LIMITED = ("disk", "memory")
FAULTS = ("kill", "term", *LIMITED)
QUICK = ["--no-verify", "--quiet", "--threads", "1"]
CALIBRATE = ["--data", "text.txt", "--samples", "8", "--seq-len", "32", "--batch-size", "2", *QUICK]
TUNE = ["--teacher", "llama", "--steps", "6", "--every", "1", *CALIBRATE]
WINDOWS = ["--windows", "4", "--seq-len", "16"]
COMMANDS: dict[str, list[str]] = {
    "quantize": ["quantize", "llama", "--scheme", "w8a8-static", "--method", "os+", "--no-report", *CALIBRATE],
    "tune": ["tune", "small", *TUNE],
    "export": ["export", "small", "--format", "compressed-tensors", "--no-verify", "--threads", "1"],
    "data select": ["data", "select", "--pool", "pool.txt", "--target", "text.txt", *WINDOWS],
}
OUT = "out.jsonl"  # a folder for all but data select


@dataclass
class Ended:
    """How a command ended; error: what it said."""

    code: int
    error: str
    seconds: float
    peak: int  # bytes of address space


@dataclass
class Outcome:
    """What was found after one fault and a second run."""

    command: str
    fault: str
    hit: bool  # the fault came before the end
    finished: bool  # and the output stood there all the same
    wrong: str = ""


def run(command: Sequence[str], folder: Path, fault: str = "", at: float = 0.0, *, cold: bool = False) -> Ended:
    """Run a command in a folder. at: seconds until the signal, or the limit in bytes."""
    begin, errors = time.monotonic(), folder.parent / "stderr.txt"
    pid = _start(command, folder, errors, fault, int(at), cold)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if fault in ("kill", "term") and time.monotonic() - begin >= at:
            os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGTERM)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, errors.read_text(errors="replace"), time.monotonic() - begin, usage.ru_maxrss << 10)


def _start(command: Sequence[str], folder: Path, errors: Path, fault: str, limit: int, cold: bool) -> int:
    def child() -> None:
        os.chdir(folder)
        for descriptor, file in ((1, Path(os.devnull)), (2, errors)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        if fault == "disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as a full disk's does
            most = max(limit, 4096)  # the message of the command itself is written too
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        if fault == "memory":
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    if cold:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        arguments = [sys.executable, "-m", "calib", *command]
        return subprocess.Popen(arguments, env=environment, preexec_fn=child).pid
    if pid := os.fork():
        return pid
    code = 99
    try:
        child()
        code = cli.run(list(command))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def digest(path: Path) -> dict[str, str]:
    """sha256 of what a command wrote, less what holds times."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    kept = [p for p in files if p.suffix in (".safetensors", ".jsonl") or p.name in ("config.json", "tokenizer.json")]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def _known(ended: Ended) -> bool:
    """It did its work, or said in one line why not."""
    lines = [line for line in ended.error.splitlines() if line.startswith("error: ")]
    return ended.code == 0 or (ended.code in KNOWN and len(lines) == 1)


def try_once(name: str, folder: Path, want: Mapping[str, str], fault: str, at: float, *, cold: bool = False) -> Outcome:
    """One fault, a look at the folder, and the same command again."""
    command, out = [*COMMANDS[name], "--out", OUT], folder / OUT
    before = {p.name for p in folder.iterdir()}
    ended = run(command, folder, fault, at, cold=cold)
    found = Outcome(name, fault, hit=ended.code != 0, finished=out.exists())
    if out.exists() and digest(out) != want:
        found.wrong = "what stands at the output is not what an undisturbed run writes"
    elif ended.code not in (() if fault in LIMITED else (-signal.SIGKILL, -signal.SIGTERM)) and not _known(ended):
        found.wrong = f"exit code {ended.code}: {ended.error.strip()[-200:]}"
    again = run(command, folder, cold=cold)
    if not found.wrong and again.code:
        found.wrong = f"the second run ended with {again.code}: {again.error.strip()[-200:]}"
    elif not found.wrong and digest(out) != want:
        found.wrong = "the second run wrote other bits"
    elif not found.wrong and (strays := {p.name for p in folder.iterdir()} - before - {OUT}):
        found.wrong = f"left behind: {', '.join(sorted(strays))}"
    for path in folder.iterdir():
        if path.name not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def harness(
    place: Path, kills: int, *, commands: Sequence[str] = tuple(COMMANDS), seed: int = 0, cold: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:  # fmt: skip
    """So many faults, spread evenly over commands and kinds. place: an empty folder."""
    from tests.conftest import byte_tokenizer

    folder = place / "box"
    folder.mkdir()
    box.fill(folder, byte_tokenizer.__wrapped__(), broken=False)
    box.content("pool.txt", "".join(f"{box.TEXT}{i}\n" for i in range(400)))(folder)
    draw, found = random.Random(seed), list[Outcome]()
    want: dict[str, dict[str, str]] = {}
    whole: dict[str, Ended] = {}
    for name in commands:
        run([*COMMANDS[name], "--out", OUT], folder, cold=cold)  # caches are warm from here on
        shutil.rmtree(folder / OUT, ignore_errors=True)
        (folder / OUT).unlink(missing_ok=True) if (folder / OUT).is_file() else None
        whole[name] = run([*COMMANDS[name], "--out", OUT], folder, cold=cold)
        assert whole[name].code == 0, whole[name].error
        want[name] = digest(folder / OUT)
        assert want[name]
        shutil.rmtree(folder / OUT) if (folder / OUT).is_dir() else (folder / OUT).unlink()
    pairs = [(name, fault) for fault in FAULTS for name in commands]
    largest = 256 << 10  # bytes: above any single file that these commands write
    for number in range(kills):
        name, fault = pairs[number % len(pairs)]
        at = draw.random() * 1.02 * whole[name].seconds
        if fault == "disk":
            at = draw.random() ** 2 * largest
        elif fault == "memory":
            at = _address_space() + draw.random() ** 2 * (96 << 20)
        found.append(try_once(name, folder, want[name], fault, at, cold=cold))
        say(f"{number + 1}/{kills} {name} {fault}: {found[-1].wrong or 'as it should be'}")
    return found


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def table(found: Sequence[Outcome]) -> str:
    """Counts by command and fault."""
    head = "| command | fault | faults | before the end | output whole at once | wrong |"
    lines = [head, "|" + 6 * "---|"]
    groups = Counter((each.command, each.fault) for each in found)
    for (name, fault), count in sorted(groups.items()):
        these = [each for each in found if (each.command, each.fault) == (name, fault)]
        numbers = (count, sum(e.hit for e in these), sum(e.finished for e in these), sum(bool(e.wrong) for e in these))
        lines.append(f"| {name} | {fault} | " + " | ".join(map(str, numbers)) + " |")
    wrong = sorted({f"{each.command}, {each.fault}: {each.wrong}" for each in found if each.wrong})
    return "\n".join([*lines, f"{len(found)} faults, {sum(bool(e.wrong) for e in found)} wrong", *wrong])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", action="store_true", help="a fresh interpreter each time")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = harness(
            Path(place), asked.kills, commands=asked.commands, seed=asked.seed, cold=asked.cold,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    print(table(found))
    return int(any(each.wrong for each in found))


if __name__ == "__main__":
    sys.exit(main())
