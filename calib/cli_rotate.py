"""``calib rotate``: a turned float model, for formats and programs that hold no rotation."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from calib.evaluate import peak_rss_mib
from calib.options import DTYPES, dtype_named, set_up

Option = typer.Option


def rotate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for quantize.")],
    out: Annotated[str, Option(help="Folder to write the turned float model to.")],
    heads: Annotated[bool, Option("--heads/--no-heads", help="Turn value heads as well.")] = True,
    learn: Annotated[int, Option(min=0, max=100_000, help="Steps that learn the turn on --data; 0: random.")] = 0,
    data: Annotated[str | None, Option(help="Text to learn on, as for quantize. Default: built in.")] = None,
    samples: Annotated[int, Option(min=1, help="Windows to learn on.")] = 16,
    seq_len: Annotated[int, Option(min=1, help="Tokens a window.")] = 512,
    seed: Annotated[int, Option(help="Of the rotation.")] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what the output folder holds.")] = False,
    verify: Annotated[bool, Option("--verify/--no-verify", help="Reload in a fresh process and compare.")] = True,
    threads: Annotated[int | None, Option(min=1, max=1024, help="CPU threads. Default: all cores.")] = None,
    dtype: Annotated[str, Option(help=f"Floats to write: {', '.join(DTYPES)}.")] = "float32",
    as_json: Annotated[bool, Option("--json", help="Print one JSON object as the last line of stdout.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="No progress, no tables.")] = False,
) -> None:
    """Turn a model's residual stream, so that outliers spread over all channels at no cost, and write it as floats.

    The result is a plain checkpoint that answers as the model did: quantize it next, in any format, with any tool.

    Example: calib rotate smollm2-135m --out out/smollm2-turned
    """
    import calib

    set_up(threads, quiet)
    found = calib.rotate(
        model,
        out,
        heads=heads,
        learn=learn,
        data=data,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        dtype=dtype_named(dtype),
        overwrite=overwrite,
        verified=verify,
        progress=not quiet,
    )
    if not quiet:
        print(found)
        if found.verify is not None:
            print(found.verify)
        print(f"written to {found.out}")
    if as_json:
        learned = None if found.learned is None else {"before": found.learned.before, "after": found.learned.after}
        shown = {name: getattr(found, name) for name in ("width", "norms", "writers", "readers", "heads", "difference")}
        verified = None if found.verify is None else found.verify.as_dict()
        shown |= {"learned": learned, "verify": verified}
        print(json.dumps({"out": str(found.out), **shown, "peak_rss_mib": peak_rss_mib()}))
