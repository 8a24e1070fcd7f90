"""``calib tune``: recovery training of a quantized checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from calib.errors import Interrupted
from calib.evaluate import peak_rss_mib
from calib.options import one_of, set_up
from calib.tuning import LOSSES, PRESETS, TRAINABLE

Option = typer.Option


def tune(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that calib quantize wrote.")],
    out: Annotated[str, Option(help="Folder to write the trained checkpoint to.")],
    teacher: Annotated[str | None, Option(help="The float model it came from; only loss ce does without.")] = None,
    data: Annotated[
        str | None,
        Option(help="Text, labelled sentences, or self (the teacher writes). Default: built-in text."),
    ] = None,
    preset: Annotated[str | None, Option(help=f"A published recipe: {', '.join(PRESETS)}.")] = None,
    trainable: Annotated[
        str | None, Option(help=f"Comma separated: {', '.join(TRAINABLE)}. Default: scales, or the preset's.")
    ] = None,
    loss: Annotated[str | None, Option(help=f"{', '.join(LOSSES)}. Default: kd, or the preset's.")] = None,
    steps: Annotated[int | None, Option(min=1, help="Optimizer steps; 200.")] = None,
    lr: Annotated[float | None, Option(min=0.0, help="Learning rate; 1e-4. Scales learn at ten times of it.")] = None,
    warmup: Annotated[float | None, Option(min=0.0, max=1.0, help="Share of the steps; 0.03.")] = None,
    gamma: Annotated[float | None, Option(min=0.0, help="Of dad: how much more uncertain tokens count; 1.")] = None,
    temperature: Annotated[float | None, Option(min=0.0, help="Of distilled logits; 1.")] = None,
    accumulate: Annotated[int | None, Option(min=1, help="Batches a step, on every process; 1.")] = None,
    precision: Annotated[str | None, Option(help="Of forward passes: no, or bf16 (autocast).")] = None,
    checkpointing: Annotated[
        bool, Option("--checkpointing", help="Recompute activations in the backward pass: slower, smaller.")
    ] = False,
    every: Annotated[int | None, Option(min=1, help="Steps between checkpoints of the training; 50.")] = None,
    samples: Annotated[int | None, Option(min=1, help="Training windows or sentences; 128.")] = None,
    seq_len: Annotated[int | None, Option(min=2, help="Tokens a window; 512, or the model's limit.")] = None,
    batch_size: Annotated[int | None, Option(min=1, help="Windows a batch; 8.")] = None,
    seed: Annotated[int | None, Option(help="Of everything drawn at random; 0.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what the output folder holds.")] = False,
    verify: Annotated[bool, Option("--verify/--no-verify", help="Reload in a fresh process and compare.")] = True,
    threads: Annotated[int | None, Option(min=1, max=1024, help="CPU threads. Default: all cores.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object as the last line of stdout.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="No progress, no tables.")] = False,
) -> None:
    """Train a quantized model on its grids, and write a verified checkpoint.

    A run that was stopped goes on when the same command is given again.

    Example: calib tune out/w2 --teacher smollm2-135m --data self --loss kd --steps 60 --out out/w2-tuned
    """
    import calib

    if preset is not None:
        one_of("preset", preset, list(PRESETS))
    set_up(threads, quiet)
    first = int(os.environ.get("RANK", "0")) == 0  # under torchrun the first process speaks
    options: dict[str, Any] = {
        "trainable": None if trainable is None else tuple(part.strip() for part in trainable.split(",")),
        "checkpointing": checkpointing or None,
        **{"steps": steps, "lr": lr, "warmup": warmup, "gamma": gamma, "temperature": temperature},
        **{"accumulate": accumulate, "precision": precision, "every": every, "samples": samples},
        **{"seq_len": seq_len, "batch_size": batch_size, "seed": seed},
    }
    try:
        tuned = calib.tune(
            folder,
            teacher,
            data,
            out,
            preset=preset,  # type: ignore[arg-type]
            loss=loss,
            overwrite=overwrite,
            verified=verify,
            progress=not quiet,
            **options,
        )
    except KeyboardInterrupt as stop:
        raise Interrupted("interrupted", "run the same command again to go on from the last saved step") from stop
    if not first:
        return
    losses = tuned.report["loss"]
    if not quiet:
        print("\n".join([f"{tuned.report['trained']} numbers trained", *tuned.report["notes"], _curve(losses)]))
        if "verify" in tuned.report:
            print(calib.VerifyReport(**tuned.report["verify"]))
        print(f"written to {tuned.out}, format {tuned.report['format']}, {tuned.seconds['total']:.1f} s")
    if as_json:
        answer = {"out": str(tuned.out), "loss": losses, "trained": tuned.report["trained"]}
        print(json.dumps({**answer, "seconds": tuned.seconds, "peak_rss_mib": peak_rss_mib()}), flush=True)


def _curve(losses: list[float], points: int = 6) -> str:
    """The loss at a few steps, each the mean of its stretch."""
    size = max(1, len(losses) // points)
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    return "loss " + " > ".join(f"{sum(part) / len(part):.4f}" for part in parts)
