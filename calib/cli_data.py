"""``calib data``: choose calibration windows from a pool."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from calib.data import Selection
from calib.errors import InputError, ModelError, OutputError
from calib.export.files import check_place, placed
from calib.options import one_of

REPORTS = (".json", ".png", ".svg", ".pdf")

app = typer.Typer(help="Choose calibration data.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def data() -> None:
    """Choose calibration data."""


@app.command()
def select(
    pool: Annotated[list[str], typer.Option(help="File, folder or hub id to choose from; repeatable.")],
    target: Annotated[list[str], typer.Option(help="Examples of the application's text; repeatable.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write.")],
    tokenizer: Annotated[str | None, typer.Option(help="The model whose tokens are counted. Default: words only.")] = (
        None
    ),
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows to fill.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    pack: Annotated[
        bool, typer.Option("--pack/--pad", help="Fill windows with joined texts (language models), or one text each.")
    ] = True,
    uniform: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share drawn evenly from the pool.")] = 0.25,
    features: Annotated[str, typer.Option(help="Some of subword,word,pieces. Default: all there are.")] = "",
    column: Annotated[str | None, typer.Option(help="Of rows: where the text is.")] = None,
    coverage: Annotated[bool, typer.Option("--coverage", help="Run the model: which channels' extremes appear?")] = (
        False
    ),
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    processes: Annotated[int, typer.Option(min=1, max=256, help="That share the pool.")] = 1,
    report: Annotated[list[Path] | None, typer.Option(help="A .json or a figure (.png) to write; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as the last line of stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no report.")] = False,
) -> None:
    """Choose the texts of a pool that look like a target, for calib quantize --data.

    Hashed n-grams, importance weights, draws without replacement; what repeats a text already drawn is left out.

    Example: calib data select --pool crawl/ --target mine.jsonl --tokenizer smollm2-135m --out chosen.jsonl
    """
    from calib.data import report as reports
    from calib.data import select as choose
    from calib.data.pool import named
    from calib.export.load import load_tokenizer

    if quiet:
        warnings.simplefilter("ignore")
    if coverage and tokenizer is None:
        raise InputError("--coverage needs a model", "name it with --tokenizer")
    for path in report or ():
        one_of("report", path.suffix, REPORTS)
    if any(Path(name).resolve() == out.resolve() for name in (*pool, *target)):
        raise OutputError(f"{out} is what is chosen from", "choose another --out")
    for path, option in ((out, "--out"), *((path, "--report") for path in report or ())):
        check_place(path, option)
    start = time.perf_counter()
    words = None if tokenizer is None else load_tokenizer(tokenizer)
    if tokenizer is not None and words is None:  # words would be counted, which nobody asked for
        raise ModelError(f"{tokenizer} has no tokenizer", "name another model, or leave --tokenizer out")
    chosen = choose(
        [named(name) for name in pool],
        [named(name) for name in target],
        words,
        windows=windows,
        seq_len=seq_len,
        pack=pack,
        uniform=uniform,
        seed=seed,
        processes=processes,
        features=[kind.strip() for kind in features.split(",")] if features else None,
        column=column,
        progress=not quiet,
    )
    figures: dict[str, Any] = {**chosen.report, "seconds": round(time.perf_counter() - start, 2)}
    if coverage:
        figures["coverage"] = _coverage(str(tokenizer), chosen, windows, seq_len, pack=pack)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen.rows)
    with placed(out) as file:
        file.write_text(lines, encoding="utf-8")
    for path in report or ():
        with placed(path, "--report") as file:
            if path.suffix == ".json":
                file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            else:
                reports.figure(figures, file, path.suffix.removeprefix("."))
    if not quiet:
        print(f"{reports.text(figures)}\nwritten to {out}")
    if as_json:
        del figures["log_weights"]
        figures.get("coverage", {}).pop("linears", None)
        print(json.dumps({"out": str(out), **figures}), flush=True)


def _coverage(model: str, chosen: Selection, windows: int, seq_len: int, *, pack: bool) -> dict[str, Any]:
    """Channel extremes under the chosen texts, against as many tokens drawn evenly from the pool."""
    from calib.data import calibration_data, coverage
    from calib.export.load import load_pair

    network, words = load_pair(model, progress=False)
    batches = [calibration_data(texts, words, windows, seq_len, pack=pack) for texts in (chosen.texts, chosen.sample)]
    return coverage(network, *batches)
