"""The command line: a thin skin over calib.quantize, calib.plan, calib.evaluate and calib.verify.

Progress and errors go to stderr; the result, and with ``--json`` one JSON object as the last line, to stdout.
A known failure is one line, ``error: cause; fix``, and the exit code of its class (see errors.py).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import calib
from calib import cli_data, cli_eval, cli_guard, cli_info, cli_inspect, cli_rotate, cli_tune, cli_zoo, prepare
from calib.errors import CalibError, Interrupted, ModelError
from calib.export.targets import WRITERS
from calib.options import DTYPES, RecipeOptions, dtype_named, one_of, set_up, with_recipe_options
from calib.report import HTML

INTERRUPTED = Interrupted.exit_code

CODES = (
    "Exit codes: 0 done; 1 the reader of a pipe went away; 2 what was asked does not exist or fit together; 3 model; "
    "4 data; 5 NaN, infinity or no memory; 6 output or disk; 7 a checkpoint answers otherwise than its model; "
    "130 interrupted. A failure is one line on stderr: error: cause; fix."
)

app = typer.Typer(
    help="Make a transformer smaller and faster with answers that stay the same.",
    epilog=CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(cli_data.app, name="data")
app.add_typer(cli_zoo.app, name="zoo")
app.command()(cli_tune.tune)
app.command()(cli_rotate.rotate)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A name that calib info lists, a folder, .gguf or hub id.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Text to calibrate on: file, folder, hub id, or self (the model writes). Default: built-in text."
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows or sentences.")]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens a window.")]
Seed = Annotated[int, typer.Option(help="Of everything drawn at random.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Windows run at once. Default: 8, or what auto's recipe says.")
]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads. Default: all cores.")]
Dtype = Annotated[str, typer.Option(help=f"Floats to load in: {', '.join(DTYPES)}.")]
MaxMemory = Annotated[str | None, typer.Option(help="Memory a process may take, like 20GiB.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]


@app.command()
@with_recipe_options
def quantize(
    model: Model,
    out: Annotated[str, typer.Option(help="Folder to write the checkpoint to.")],
    recipe: RecipeOptions,
    data: Data = None,
    samples: Samples = 128,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens a window. Default: 512, or the model's limit.")
    ] = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Reload in a fresh process and compare.")] = True,
    max_memory: MaxMemory = None,
    auto_seconds: Annotated[float, typer.Option(min=0, help="For the trials of method auto; 0: none.")] = 600,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html and report.json beside it.")
    ] = (True),
    threads: Threads = None,
    dtype: Dtype = "float32",
    device: Annotated[str, typer.Option(help="Where blocks run on the data: cpu, cuda, cuda:1.")] = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model and write a verified checkpoint.

    A run that was stopped goes on when the same command is given again.

    Example: calib quantize smollm2-135m --scheme w8a8-static --method os+ --out out/smollm2-w8a8
    """
    from calib.model.cost import parse_size

    set_up(threads, quiet)
    quiet = quiet or int(os.environ.get("RANK", "0")) > 0  # under torchrun the first process speaks
    as_json = as_json and not int(os.environ.get("RANK", "0"))
    with cli_guard.interruptible():
        result = calib.quantize(
            model,
            data=data,
            out=out,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            batch_size=batch_size,
            overwrite=overwrite,
            verified=verify,
            dtype=dtype_named(dtype),
            device=device,
            max_memory=None if max_memory is None else parse_size(max_memory),
            auto_seconds=auto_seconds,
            report=report,
            progress=not quiet,
            **recipe.arguments(model),
        )
    if not quiet:
        print(_text(result))
    if as_json:
        summary = result.plan.summary()
        _print_json(
            {
                "out": None if result.out is None else str(result.out),
                "plan": {key: summary[key] for key in ("transformed", "quantized", "excluded")},
                "quality": result.report.get("quality"),
                "seconds": {stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
                "peak_rss_mib": _peak_rss_mib(),
            }
        )


@app.command()
@with_recipe_options
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for quantize, or a config.json.")],
    recipe: RecipeOptions,
    data: Annotated[str | None, typer.Option(help="What folds are proven on; implies --prove.")] = None,
    samples: Samples = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    batch_size: BatchSize = None,
    max_memory: MaxMemory = None,
    out: Annotated[str | None, typer.Option(help="Where the checkpoint would go: whose disk is measured.")] = None,
    prove: Annotated[bool, typer.Option("--prove", help="Read the weights and prove each fold.")] = False,
    threads: Threads = None,
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what quantize would do to every linear and what it would cost, without doing it.

    Only the model's config is needed, and a few seconds; low_rank and basel read the weights, and cost what they cost.

    Example: calib plan smollm2-135m --scheme w4a16 --method gptq --max-memory 8GiB
    """
    from calib.model.cost import UNPREDICTED, parse_size, refuse

    set_up(threads, quiet)
    arguments = recipe.arguments(model)
    limit = None if max_memory is None else parse_size(max_memory)
    predicted = all(method.partition(":")[0] not in UNPREDICTED for method in recipe.method.split(","))
    found, cost = None, None
    if predicted or limit is not None:
        cost = calib.cost(
            model,
            dtype=dtype_named(dtype),
            max_memory=limit,
            out=out,
            progress=not quiet,
            samples=samples,
            seq_len=seq_len,
            batch_size=batch_size,
            **arguments,
        )
        found = cost.plan
    if prove or data is not None or found is None:
        found = calib.plan(model, data=data, progress=not quiet, **arguments)
    if not quiet:
        told = f"what {recipe.method} costs is not predicted" if cost is None else cost.table()
        print(f"{found.table()}\n\n{told}")
    if cost is not None:
        refuse(cost, limit)
    if as_json:
        _print_json({**found.summary(), "cost": None if cost is None else cost.as_dict()})


@app.command()
def inspect(
    model: Model,
    data: Data = None,
    html: Annotated[Path | None, typer.Option(help="Write the pictures to this file, one page.")] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure what each linear and block, alone, costs at --scheme.")
    ] = False,
    scheme: Annotated[str, typer.Option(help="For --sensitivity, as for quantize.")] = "w8a8-static",
    max_size: Annotated[str | None, typer.Option(help="Propose formats for a checkpoint of this size, like 80MiB.")] = (
        None
    ),
    scheme_out: Annotated[Path | None, typer.Option(help="Write them to this .json, for quantize --scheme.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows or sentences to look at.")] = 16,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens a window. Default: 256.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows run at once.")] = 4,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a model's outliers, without quantizing it: which channels, which first tokens, what could absorb them.

    Example: calib inspect smollm2-135m --html out/outliers.html
    """
    set_up(threads, quiet)
    with cli_guard.interruptible():
        report = cli_inspect.inspect(
            model,
            data,
            html,
            sensitivity,
            scheme,
            max_size,
            scheme_out,
            samples,
            seq_len,
            batch_size,
            seed,
            progress=not quiet,
        )
    if not quiet:
        print(cli_inspect.text(report))
    if as_json:
        _print_json(report)


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Annotated[
        str,
        typer.Option(help="Text file, table of sentences and labels or of pairs and scores, or lm-eval's task.yaml."),
    ],
    task: Annotated[
        str,
        typer.Option(help="perplexity, classification, similarity, generation (like the float model's?), or harness."),
    ] = "perplexity",
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows, or prompts of generation (default: 40); of harness documents.")
    ] = None,
    seq_len: SeqLen = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Perplexity: windows so far apart, each for its last STRIDE tokens.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Generation: tokens written after half a window.")] = 32,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 4 windows or 32 sentences.")] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", "--reference", help="A second model, e.g. the float one: a paired test against it."),
    ] = None,
    mode: Annotated[str, typer.Option(help="packed: integer kernels; fake: the same grids in floats.")] = "packed",
    threads: Threads = None,
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model with its 95 % confidence interval, and whether it differs from another.

    Example: calib eval out/small --data test.txt --against smollm2-135m
    """
    set_up(threads, quiet)
    one_of("task", task, cli_eval.TASKS)
    options: dict[str, Any] = {}
    if task == "generation":
        options = {"prompt_len": max(1, seq_len // 2), "new_tokens": new_tokens}
    options |= {"seq_len": seq_len, "stride": stride} if task == "perplexity" else {}
    options |= {"limit": windows} if task == "harness" else {}
    answer = cli_eval.evaluate(
        cli_eval.Measure(
            task, data, windows or cli_eval.WINDOWS, batch_size, mode, dtype_named(dtype), not quiet, options
        ),
        model,
        against,
    )
    if not quiet or not as_json:
        print(cli_eval.text(answer))
    if as_json:
        _print_json({**answer, "peak_rss_mib": _peak_rss_mib()})


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that calib quantize wrote.")],
    tolerance: Annotated[float | None, typer.Option(help="Largest difference allowed, of the logit range.")] = None,
    model: Annotated[str | None, typer.Option(help="The float model: was the checkpoint made from its files?")] = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Reload a checkpoint in a fresh process and compare its answers with the stored ones.

    Example: calib verify out/smollm2-w8a8
    """
    set_up(threads, quiet)
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}", "name a folder that calib quantize wrote")
    if model is not None:
        prepare.check_source(folder, model)
    report = calib.verify(folder, tolerance=tolerance)
    if not quiet:
        print(report)
    if as_json:
        _print_json(report.as_dict())


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that calib quantize wrote.")],
    format: Annotated[str, typer.Option(help=f"Of the new folder: {', '.join(WRITERS)}.")],
    out: Annotated[str, typer.Option(help="Folder to write.")],
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave the grids of the inputs behind, where a format has none.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Reload in a fresh process and compare.")] = True,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a finished checkpoint in another program's format, and verify it with that program's loader.

    Example: calib export out/smollm2-w4 --format gguf --out out/smollm2-gguf
    """
    set_up(threads, quiet)
    report = calib.convert(folder, format, out, weights_only=weights_only, overwrite=overwrite, verified=verify)
    if not quiet:
        print(f"written to {out}, format {format}" + ("" if report is None else f"\n{report}"))
    if as_json:
        _print_json({"out": out, "format": format, "verify": None if report is None else report.as_dict()})


@app.command()
def info(threads: Threads = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Versions, threads, kernels, cache, and the models, schemes and methods known by name.

    Example: calib info --json
    """
    set_up(threads, quiet)
    facts = cli_info.info()
    if as_json:
        _print_json(facts)
    elif not quiet:
        print(cli_info.text(facts))


def _text(result: calib.Result) -> str:
    """What a run says on the terminal."""
    summary, report = result.plan.summary(), result.report
    lines = [f"{summary['quantized']} linears quantized, {summary['transformed']} of them transformed"]
    lines += [f"{summary['factored']} linears kept as two factors"] if summary["factored"] else []
    by_reason: dict[str, list[str]] = {}
    for name, reason in summary["excluded"].items():
        by_reason.setdefault(reason, []).append(name)
    lines += [f"left in float, {reason}: {', '.join(names)}" for reason, names in by_reason.items()]
    lines += result.plan.notes
    if (quality := report.get("quality")) is not None:
        rows = f"{quality['rows']} {'held-out' if quality['held_out'] else 'calibration'} rows"
        interval = "" if quality["ci95"] is None else f" (95 %: {quality['ci95'][0]:.4g} to {quality['ci95'][1]:.4g})"
        if quality["metric"] == "perplexity":
            change = f"{quality['float']:.4g} -> {quality['quantized']:.4g}, x {quality['ratio']:.4g}{interval}"
        else:
            change = f"{quality['quantized']:.3g}{interval}"
        lines.append(f"{quality['metric']} on {rows}: {change}")
    lowest = sorted(report.get("linears", {}).items(), key=lambda item: item[1])[:3]
    lines += [f"lowest SQNR: {', '.join(f'{name} {db:.1f} dB' for name, db in lowest)}"] if lowest else []
    worst = sorted(report["block_error"].items(), key=lambda item: -item[1])[:3]
    lines.append("largest block errors: " + ", ".join(f"{name} {error:.2%}" for name, error in worst))
    if result.out is not None:
        lines.append(f"written to {result.out}, format {report['format']}")
        lines += [f"report: {result.out / HTML}"] if (result.out / HTML).is_file() else []
    if "verify" in report:
        lines.append(str(calib.VerifyReport(**report["verify"])))
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.seconds.items())
    return "\n".join([*lines, f"seconds: {stages}", f"peak memory: {_peak_rss_mib()} MiB"])


def _peak_rss_mib() -> float | None:
    from calib.evaluate import peak_rss_mib

    return peak_rss_mib()


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


def run(argv: Sequence[str]) -> int:
    """Run one command; returns its exit code."""
    try:
        with cli_guard.plain_warnings(), cli_guard.known_causes():
            code = app(args=list(argv), prog_name="calib", standalone_mode=False)
        if code == INTERRUPTED:  # some versions of typer end Ctrl-C so
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except CalibError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; nothing half-written was left as finished", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no second complaint at exit
        return 1
    except Exception as error:  # usage errors, whichever click typer brings along
        if isinstance(error, typer.Abort):
            print("error: interrupted; nothing half-written was left as finished", file=sys.stderr)
            return INTERRUPTED
        message, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
        if message is None or code is None:
            raise
        text = message()
        if text.startswith("Usage:"):  # no arguments at all: the help is the answer
            print(text)
        else:
            print(f"error: {' '.join(text.split())}; see calib --help", file=sys.stderr)
        return int(code)


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
