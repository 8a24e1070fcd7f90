"""A disk that is really full: a small tmpfs, filled by the command itself, then enlarged for the second run."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tests.faults import box, harness

SIZES = ("4k", "96k")


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of one page, which is taken."""
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    place = tmp_path / "room"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        (place / "filler").write_bytes(bytes(4096))
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def resize(place: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", harness.COMMANDS)
def test_a_full_disk_is_said_and_the_same_command_goes_on(
    name: str, room: Path, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = tmp_path / "box"
    folder.mkdir()
    box.fill(folder, byte_tokenizer, broken=False)
    box.content("pool.txt", "".join(f"{box.TEXT}{i}\n" for i in range(400)))(folder)
    assert harness.run([*harness.COMMANDS[name], "--out", "whole.jsonl"], folder, cold=True).code == 0
    want = harness.digest(folder / "whole.jsonl")
    command, out = [*harness.COMMANDS[name], "--out", str(room / "out.jsonl")], room / "out.jsonl"
    stopped = 0
    for size in SIZES:
        resize(room, size)
        ended = harness.run(command, folder, cold=True)
        if ended.code == 0:
            break
        stopped += 1
        lines = [line for line in ended.error.splitlines() if line.startswith("error: ")]
        assert ended.code == 6 and len(lines) == 1 and "space" in lines[0], ended
        assert not out.exists(), "what is not whole is not at the output"
    assert stopped
    resize(room, "64m")
    assert harness.run(command, folder, cold=True).code == 0
    assert harness.digest(out) == want
    assert sorted(path.name for path in room.iterdir()) == ["filler", out.name]
