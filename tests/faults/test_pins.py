"""The check of pinned versions: what it hits, what it lets pass, and what it says it did not ask."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.faults.pins import PINS, Pin, affected, main, offered, read_pins


def entry(*events: dict[str, str], name: str = "Demo_Pkg", **more: Any) -> dict[str, Any]:
    spans = [{"type": "ECOSYSTEM", "events": list(events)}] if events else []
    return {"package": {"ecosystem": "PyPI", "name": name}, "ranges": spans, **more}


FROM, FIXED, LAST = {"introduced": "1.2"}, {"fixed": "1.4"}, {"last_affected": "1.4"}


@pytest.mark.parametrize(
    ("version", "found", "hit"),
    [
        ("1.1.9", entry(FROM, FIXED), False),
        ("1.2rc1", entry(FROM, FIXED), False),
        ("1.2", entry(FROM, FIXED), True),
        ("1.2.0", entry(FIXED, FROM), True),  # events come in any order
        ("1.4rc1", entry(FROM, FIXED), True),
        ("1.4", entry(FROM, FIXED), False),
        ("1.4+cpu", entry(FROM, FIXED), False),
        ("1.10", entry({"introduced": "1.9"}), True),  # as versions, not as words
        ("1.4", entry(FROM, LAST), True),
        ("1.4.1", entry(FROM, LAST), False),
        ("0.1", entry({"introduced": "0"}, FIXED), True),
        ("2.1", entry({"introduced": "0"}, FIXED, {"introduced": "2.0"}, {"fixed": "2.2"}), True),
        ("1.5", entry({"introduced": "0"}, FIXED, {"introduced": "2.0"}, {"fixed": "2.2"}), False),
        ("1.3", entry(FROM, {"limit": "1.3"}), False),
        ("1.3", entry(FROM, {"limit": "*"}), True),
        ("1.0", entry(versions=["0.9", "1.0.0"]), True),
        ("1.0", entry(versions=["0.9", "not-a-version"]), False),
        ("1.0", {**entry(), "ranges": [{"type": "GIT", "events": [{"introduced": "0"}]}]}, False),
    ],
)
def test_ranges(version: str, found: dict[str, Any], hit: bool) -> None:
    assert affected(Version(version), found) is hit


def advisory(name: str, *entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": name, "aliases": ["CVE-1-1"], "modified": "2026-02-03T00:00:00Z", "affected": list(entries), **more}


ADVISORIES = {
    "hit.json": advisory("PYSEC-1", entry({"introduced": "0"}, {"fixed": "1.4"}, {"introduced": "2"}, {"fixed": "3"})),
    "past.json": advisory("PYSEC-2", entry({"introduced": "0"}, {"fixed": "1.0"})),
    "gone.json": advisory("PYSEC-3", entry({"introduced": "0"}), withdrawn="2025-01-01T00:00:00Z"),
    "npm.json": advisory("GHSA-4", {**entry({"introduced": "0"}), "package": {"ecosystem": "npm", "name": "demo-pkg"}}),
    "other.json": advisory("PYSEC-5", entry({"introduced": "0"}, name="elsewhere")),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A constraints file, a folder of advisories and a zip of them."""
    (tmp_path / "pins.txt").write_text('# two\ndemo.pkg==1.3  # odd name\nother==2.0; python_version < "3"\n')
    (tmp_path / "osv" / "deep").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "osv.zip", "w") as archive:
        for name, found in ADVISORIES.items():
            (tmp_path / "osv" / "deep" / name).write_text(json.dumps(found))
            archive.writestr(name, json.dumps(found))
    return tmp_path


def run(place: Path, *more: str, **ask: Any) -> int:
    return main(["--pins", str(place / "pins.txt"), *more], **ask)


@pytest.mark.parametrize("where", ["osv", "osv.zip"])
def test_a_hit_is_named_with_its_fix(where: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--offline", "--advisories", str(place / where)) == 1
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("hit")] == [
        "hit: demo-pkg 1.3: PYSEC-1 (CVE-1-1), fixed in 1.4"
    ]
    assert "5 read, the newest of 2026-02-03, 1 withdrawn; 1 of 2 packages are named by one; 1 pins hit" in out
    assert "held against: demo-pkg 2" in out
    assert "no advisory at hand: other" in out
    assert "index: not asked (--offline)" in out


def test_yaml_without_a_hit_and_files_that_are_no_advisory(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = place / "yaml"
    found.mkdir()
    (found / "a.yaml").write_text(
        "id: PYSEC-9\nmodified: 2026-01-01T00:00:00Z\naffected:\n- package: {name: demo-pkg, ecosystem: PyPI}\n"
        "  ranges:\n  - type: ECOSYSTEM\n    events:\n    - introduced: '0'\n    - fixed: '1.3'\n"
    )
    assert run(place, "--offline", "--advisories", str(found)) == 0
    assert "1 read, the newest of 2026-01-01" in capsys.readouterr().out
    (found / "b.yaml").write_text("!!python/object/apply:os.getcwd []")
    (found / "c.json").write_text("[1")
    (found / "d.json").write_text(json.dumps(advisory("X", entry({"introduced": "soon"}))))
    (found / "e.json").write_text(json.dumps({"id": "OLD-1", "affects": {"ranges": []}}))  # before OSV's version 1
    assert run(place, "--offline", "--advisories", str(found)) == 2
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("not an advisory")] == [
        "not an advisory: b.yaml (ConstructorError)",
        "not an advisory: c.json (JSONDecodeError)",
        "not an advisory: d.json (InvalidVersion)",
        "not an advisory: e.json (KeyError)",
    ]


def test_the_index_as_pip_sees_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself reads a folder as an index; a yanked release is not offered, an unknown package has no answer."""
    (place / "index" / "demo-pkg").mkdir(parents=True)
    links = (
        'demo_pkg-1.2-py3-none-any.whl"',
        'demo_pkg-0.8-final0.tar.gz"',
        'demo_pkg-1.3-py3-none-any.whl" data-yanked="bad"',
    )
    page = "".join(f'<a href="{link}>file</a>' for link in (*links, 'demo_pkg-1.4-py3-none-any.whl"'))
    (place / "index" / "demo-pkg" / "index.html").write_text(f"<!DOCTYPE html><html><body>{page}</body></html>")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", (place / "index").as_uri())
    assert offered("demo-pkg") == [Version("1.4"), Version("1.2")]
    with pytest.raises(LookupError, match="No matching distribution found for elsewhere"):
        offered("elsewhere")


def test_yanked_and_behind(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, ask=lambda name: [Version("1.4"), Version("1.2")]) == 1
    out = capsys.readouterr().out
    assert "index: answered for 1 of 2 pins: 1 not offered, 1 behind" in out
    assert "not offered (yanked, or gone): demo-pkg 1.3, newest 1.4" in out
    assert "behind: demo-pkg 1.3 < 1.4" in out
    assert "not asked: other (not for Python" in out
    assert "advisories: none given" in out


def test_an_index_out_of_reach_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "pins.txt").write_text("a==1\nb==1\nc==1\nd==1\n")
    asked = []

    def ask(name: str) -> list[Version]:
        asked.append(name)
        raise LookupError("no route")

    assert run(place, ask=ask) == 2
    out = capsys.readouterr().out
    assert asked == ["a", "b", "c"]
    assert "index: answered for 0 of 4 pins" in out
    assert "no answer: c: no route" in out
    assert "no answer: d: not asked after these" in out


def test_nothing_to_ask_and_what_pins_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, more, said in (
        ("a==1", ["--offline"], "nothing to ask"),
        ("a==1\n\nb>=2", [], "line 3: 'b>=2' is no name==version"),
        ("a==1.*", [], "line 1: 'a==1.*' is no name==version"),
        ("a==1", ["--offline", "--advisories", str(place / "pins.txt")], "not a zip file"),
    ):
        (place / "pins.txt").write_text(text)
        with pytest.raises(SystemExit) as stop:
            run(place, *more)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


def test_every_line_of_constraints_is_a_pin() -> None:
    pins = read_pins(PINS)
    lines = [line for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    assert len(pins) == len({pin.name for pin in pins}) == len(lines)
    assert all(isinstance(pin, Pin) for pin in pins)
