"""Every format x every family: verified by the format's own loader in a fresh process, or refused with the reason.

``python -m experiments.bench.formats`` writes docs/formats.md. Models are the tests' tiny random ones, calibrated on
random tokens (8 x 24), seed 0: the matrix shows what can be expressed and read back, not how good it is.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

import calib
from calib.errors import CalibError
from calib.export.checkpoint import versions
from calib.export.verify import reference_batch, reference_of, store_reference, verify_all
from tests.families import FAMILIES, batches, build

# what each format is made for: scheme, its options, method
STATIC = ("w8a8-static", {}, "os+")
GROUPS = ("w4a16", {"weight_group": 32}, "rtn")
COLUMNS = {
    "calib": ("calib", *STATIC),
    "compressed-tensors": ("compressed-tensors", *STATIC),
    "the same, fp8": ("compressed-tensors", "fp8", {}, "os+"),
    "float": ("float", *GROUPS),
    "gptq": ("gptq", *GROUPS),
    "awq": ("awq", *GROUPS),
    "gguf": ("gguf", *GROUPS),
    "onnx": ("onnx", *STATIC),
}
FILE = Path(__file__).resolve().parents[2] / "docs" / "formats.md"


def matrix(families: Iterable[str], columns: Iterable[str], work: Path) -> dict[tuple[str, str], str]:
    """(family, column) -> what became of it, in words."""
    cells: dict[tuple[str, str], str] = {}
    written: dict[Path, tuple[str, str]] = {}
    for family in families:
        for column in columns:
            folder = work / f"{family}-{column}"
            try:
                write(family, column, folder)
                written[folder] = (family, column)
            except CalibError as error:
                cause = error.cause.partition(": ")[2] or error.cause
                cells[family, column] = f"{cause}; {error.fix}"
    for folder, report in verify_all(written).items():
        cells[written[folder]] = f"FAILED: {report}" if isinstance(report, CalibError) else _verified(report)
    return cells


def write(family: str, column: str, folder: Path) -> None:
    """Quantize as the format is made for, write it with the reference that it will be held to. Raises CalibError."""
    format, scheme, options, method = COLUMNS[column]
    data = batches(family)
    result = calib.quantize(
        build(family), scheme, method, data, samples=8, seq_len=24, prefix="none", progress=False,
        format=format, scheme_options=options,
    )  # fmt: skip
    result.save(folder, format, verified=False)
    inputs = reference_batch(data[0])
    store_reference(folder, reference_of(result.model, inputs, format), inputs)


def _verified(report: calib.VerifyReport) -> str:
    return f"{report.max_difference:.0e}" if report.max_difference else "0"


def page(cells: dict[tuple[str, str], str], families: list[str], columns: list[str]) -> str:
    """The matrix as Markdown, refusals as footnotes."""
    notes: dict[str, int] = {}
    rows = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for family in families:
        shown = []
        for column in columns:
            text = cells[family, column]
            refused = not text[0].isdigit()
            shown.append(f"[{notes.setdefault(text, len(notes) + 1)}]" if refused else text)
        rows.append(f"| {family} | {' | '.join(shown)} |")
    listed = [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join([*rows, "", *listed])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--columns", default=list(COLUMNS), nargs="*")
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args()
    families = given.families.split(",")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        cells = matrix(families, given.columns, Path(work))
    text = page(cells, families, given.columns)
    print(text)
    given.out.write_text(HEAD.format(versions=", ".join(f"{k} {v}" for k, v in versions().items())) + text + "\n")


HEAD = """# What can be written for which program

Largest difference from the simulated model's logits, of their range, as the format's own loader answers in a fresh
process; a number in brackets is a refusal, with the reason below. Written by `python -m experiments.bench.formats` on
tiny random models ({versions}). `calib`, `compressed-tensors` and `onnx` hold `w8a8-static` by `os+`, and "the same,
fp8" that scheme; the others hold weights only: `w4a16`, groups of 32. For `gptq` and `awq` a decoder written from their
definitions stood for GPTQModel. Tiny shapes are not the released ones, which is why GGUF refuses gpt2, qwen3 and gemma2
here; with released shapes they pass (`tests/test_formats.py`).

"""


if __name__ == "__main__":
    main()
