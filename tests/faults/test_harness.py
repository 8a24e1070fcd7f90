"""Twenty faults over four commands; ``python -m tests.faults.harness --kills 200`` is the long run."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calib.errors import OutputError
from calib.export.files import MANIFEST, check_out, placed, staged
from tests.faults.harness import ROOT, Outcome, table


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits and signals as Linux has them")
def test_twenty_faults() -> None:
    """In a process of its own: it forks, and nothing here may run threads by then."""
    command = [sys.executable, "-m", "tests.faults.harness", "--kills", "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 faults, 0 wrong" in done.stdout


def test_the_table_counts() -> None:
    found = [Outcome("tune", "kill", True, False), Outcome("tune", "kill", False, True, "odd")]
    assert "| tune | kill | 2 | 1 | 1 | 1 |" in table(found) and "2 faults, 1 wrong\ntune, kill: odd" in table(found)


def leave(place: Path) -> None:
    """What a kill leaves: a stage, and an old output moved away."""
    (place / ".out.tmp-abcd1234").mkdir()
    (place / ".out.tmp-abcd1234" / "half.safetensors").write_text("half")


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    leave(tmp_path)
    (tmp_path / ".out.tmp-other").mkdir()  # not a name of ours
    with staged(tmp_path / "out") as stage:
        (stage / MANIFEST).write_text("{}")
        check_out(tmp_path / "out")  # another process that looks
        assert stage.is_dir(), "a live run's stage is not swept"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.tmp-other", "out"]


def test_an_output_killed_while_it_was_replaced_comes_back(tmp_path: Path) -> None:
    leave(tmp_path)
    (tmp_path / ".out.old-abcd1234" / "out").mkdir(parents=True)
    (tmp_path / ".out.old-abcd1234" / "out" / MANIFEST).write_text('{"mine": 1}')
    check_out(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / MANIFEST).read_text() == '{"mine": 1}'


def test_a_file_is_placed_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / ".out.jsonl.part").write_text("of a killed run")
    for full in (OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error")):
        with pytest.raises(OutputError), placed(tmp_path / "out.jsonl") as part:
            part.write_text("half")
            raise full
        assert list(tmp_path.iterdir()) == []
    with placed(tmp_path / "out.jsonl") as part:
        part.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
