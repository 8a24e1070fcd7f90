"""Low-rank bases measured: which to keep, on whose data, at what cost; Basel against truncation with equal fine-tuning.

    python -m experiments.basel.run layers      # per layer: predicted loss, whitening, domains, compensation
    python -m experiments.basel.run selection   # loss of the whole model, ranks from global to even, at each ratio
    python -m experiments.basel.run cost        # the training-free selection through calib.quantize, timed
    python -m experiments.basel.run tiny        # Basel against SVD-LLM + the same steps, on stories260k, 3 seeds
    python -m experiments.basel.run grid        # all arms, ratios and targets on smollm2-135m: hours
    python -m experiments.basel.run exact       # can it do the task at all: GSM8K answers got right
    python -m experiments.basel.run figure      # of what has been run
    python -m experiments.basel.run table       # of the grid, in markdown

Every finished cell is kept in results-<part>.json and skipped on the next run; --only TEXT runs the cells that hold it.
Calibration and training take train or validation splits, figures are of test splits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

import calib
from calib.methods.basel import finetune
from calib.methods.low_rank import EVEN
from calib.model import Batch, call_model
from calib.nn import LowRankLinear, changed_linears
from calib.solvers import (
    Bases,
    bases,
    choose_ranks,
    evened,
)
from calib.tuning import Tuning
from experiments.basel.layers import layers
from experiments.basel.text import (
    HERE,
    RATIOS,
    SHARED,
    Figures,
    block_linears,
    in_batches,
    loss_on,
    observed,
    smollm2,
    windows,
)
from model_zoo.sources import load_model


def selection(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """All layers truncated at once, with statistics of the float model; ranks from chosen across layers to even."""
    model, tokenizer = smollm2()
    linears = block_linears(model)
    shapes = [(m.out_features, m.in_features) for m in linears.values()]
    whole = sum(out * n for out, n in shapes)
    test = windows(tokenizer, "wikitext-2", "test", 10, args.length)
    original = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    ready: list[Any] = []

    def prepare() -> tuple[dict[str, Bases], list[float]]:
        if not ready:
            from calib.engine.survey import survey
            from calib.methods import LowRank
            from calib.model import Resident, make_plan
            from calib.recipe import recipe, scheme

            chosen = recipe(scheme("none"), "low_rank", keep=0.5)
            data = in_batches(windows(tokenizer, "wikitext-2", "train", args.samples, args.length))
            plan = make_plan(model, chosen, {"input_ids": data[0]["input_ids"][:1, :32]})
            with torch.no_grad():
                found = survey(model, plan, LowRank(chosen, "svd"), data, Resident(), list, args.seed)
            known = observed(model, torch.cat([batch["input_ids"] for batch in data]))
            ready.extend(
                [{n: bases(linears[n].weight, known[n].gram) for n in linears}, [found.worth[n] for n in linears]]
            )
        return ready[0], ready[1]

    def measure(ratio: float, even: float) -> Figures:
        found, worth = prepare()
        energies = [found[name].energy for name in linears]
        ranks = evened(shapes, choose_ranks(shapes, energies, worth, ratio * whole), ratio, even)
        for (name, linear), rank in zip(linears.items(), ranks, strict=True):
            if rank is not None:
                b, a = found[name].factors(rank)
                linear.weight.copy_((b @ a).float())
        loss = loss_on(model, test)
        for name, linear in linears.items():
            linear.weight.copy_(original[name])
        kept = sum(out * n if r is None else r * (out + n) for r, (out, n) in zip(ranks, shapes, strict=True))
        return {"loss": loss, "kept": kept / whole, "dense": sum(rank is None for rank in ranks)}

    yield "float", lambda: {"loss": loss_on(model, test)}
    for ratio, even in itertools.product(RATIOS, EVEN):
        yield f"{ratio} even {even}", lambda r=ratio, e=even: measure(r, e)  # type: ignore[misc]


def cost(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Figures]]]:
    def run() -> Figures:
        model, tokenizer = smollm2()
        data = in_batches(windows(tokenizer, "wikitext-2", "train", args.samples, args.length), args.samples)
        test = windows(tokenizer, "wikitext-2", "test", 10, args.length)
        start = time.process_time()
        with torch.no_grad():
            for batch in data:
                call_model(model, batch)
        forward = time.process_time() - start
        known = {n: torch.eye(m.in_features) for n, m in block_linears(model).items()}
        start = time.process_time()
        for name, linear in block_linears(model).items():
            bases(linear.weight, known[name])
        decompositions = 2 * (time.process_time() - start)  # once to choose the ranks, once to truncate
        start = time.process_time()
        result = calib.quantize(model, "none", "low_rank", data, keep=0.7, progress=False, seq_len=args.length)
        total = time.process_time() - start
        kept = sum(e.rank is not None for e in result.plan.entries.values())
        return {
            "cpu_seconds": {"one plain forward": forward, "decompositions": decompositions, "calib.quantize": total},
            "forwards beside decompositions": (total - decompositions) / forward,
            "loss": loss_on(result.model, test),
            "factored": kept,
            "wall_seconds": {key: round(value, 2) for key, value in result.seconds.items()},
        }

    yield "keep 0.7", run


@dataclass
class Arm:
    """One way to make the model smaller. tuned: fine-tune the factors for the grid's steps afterwards."""

    name: str
    scheme: str = "none"
    method: str = "low_rank"
    options: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False
    trained: bool = False


ARMS = [
    Arm("svd", method="low_rank:svd"),
    Arm("fwsvd", method="low_rank:fwsvd"),
    Arm("asvd", method="low_rank:asvd"),
    Arm("svd-llm", method="low_rank:svd-llm"),
    Arm("tried"),  # calib's default: ranks from global to even, by a trial on the calibration data
    Arm("basel", method="basel", trained=True),
    Arm("basel, published bases", method="basel:svd", trained=True),
    Arm("svd-llm + steps", method="low_rank:svd-llm", tuned=True),
    Arm("global + steps", options={"select": "global"}, tuned=True),
]
SMALL = [  # bytes against bytes: bases in integers, and plain integers
    Arm("w8a8 x tried", "w8a8", "gptq,low_rank"),
    Arm("w4a16 x tried", "w4a16", "gptq,low_rank"),
]
PLAIN = [Arm(f"{scheme}, gptq", scheme, "gptq") for scheme in ("w8a8", "w4a16", "w3a16")]


def shrunk(arm: Arm, model: Any, data: list[Batch], keep: float, steps: int, lr: float, seed: int) -> calib.Result:
    """The arm's model, trained for the same number of steps where it is trained at all."""
    options = {**arm.options, "seed": seed} | ({} if arm in PLAIN else {"keep": keep})
    options |= {"steps": steps, "lr": lr} if arm.trained else {}
    result = calib.quantize(model, arm.scheme, arm.method, data, progress=False, **options)
    if arm.tuned:
        names = [n for n, m in changed_linears(result.model).items() if isinstance(m, LowRankLinear)]
        finetune(result.model, names, data, Tuning(steps, lr=lr, seed=seed))
    return result


def size_of(result: calib.Result) -> Figures:
    tensors = {t.data_ptr(): t for t in result.model.state_dict().values()}.values()
    entries = [entry for name, entry in result.plan.entries.items() if ".layers." in name]
    whole = sum(e.shape[0] * e.shape[1] for e in entries)
    kept = sum(e.rank * sum(e.shape) if e.rank else e.shape[0] * e.shape[1] for e in entries)
    return {"kept": kept / whole, "bytes": sum(t.numel() * t.element_size() for t in tensors)}


def tiny(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """stories260k moved to GSM8K's text: loss on its test split, and on WikiText-2's."""

    def run(arm: Arm | None, keep: float, seed: int) -> Figures:
        model: Any
        model, tokenizer = load_model(SHARED / "models/stories260k", progress=False)
        model.requires_grad_(False)
        test = {d: windows(tokenizer, d, "test", 64, 128) for d in ("gsm8k", "wikitext-2")}
        size: Figures = {}
        if arm is not None:
            generator = torch.Generator().manual_seed(seed)
            pool = windows(tokenizer, "gsm8k", "train", 1024, 128)
            data = in_batches(pool[torch.randperm(len(pool), generator=generator)[:512]])
            result = shrunk(arm, model, data, keep, args.steps, args.lr, seed)
            model, size = result.model, size_of(result)
        return {"loss": {domain: loss_on(model, ids) for domain, ids in test.items()}, **size}

    yield "float", lambda: run(None, 1.0, 0)
    arms = [arm for arm in ARMS if arm.trained or arm.tuned]
    for keep, seed, arm in itertools.product((0.5, 0.3), (0, 1, 2), arms):
        yield f"{keep} {arm.name}, seed {seed}", lambda a=arm, k=keep, s=seed: run(a, k, s)  # type: ignore[misc]


def grid(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """Every cell is measured on all three domains: a row of one target is the others' calibration on the wrong one."""

    def run(arm: Arm | None, target: str, keep: float, seed: int) -> Figures:
        model, tokenizer = smollm2()
        size: Figures = {}
        if arm is not None:
            text = windows(tokenizer, target, "train", (seed + 1) * args.samples, args.length)
            data = in_batches(text[-args.samples :], 4)  # every seed has windows of its own
            result = shrunk(arm, model, data, keep, args.steps, args.lr, seed)
            model, size = result.model, size_of(result)
            size["ranks"] = [note for note in result.plan.notes if note.startswith("ranks are")]
            for module in model.modules():
                if isinstance(module, calib.nn.QuantLinear):
                    module.set_mode("packed")
        test = {d: windows(tokenizer, d, "test", args.tests, args.length) for d in ("wikitext-2", "gsm8k", "mbpp")}
        start = time.perf_counter()
        losses = {domain: loss_on(model, ids) for domain, ids in test.items()}
        rate = sum(ids.numel() for ids in test.values()) / (time.perf_counter() - start)
        return {"loss": losses, **size, "tokens_per_second": rate, "target": target, "keep": keep}

    for target in ("gsm8k", "mbpp", "wikitext-2"):
        yield f"{target}: float", lambda t=target: run(None, t, 1.0, 0)  # type: ignore[misc]
        for keep, arm in itertools.product((0.9, 0.7, 0.5, 0.3), [*ARMS, *SMALL]):
            for seed in range(3 if arm.trained or arm.tuned else 1):
                rate = f", lr {args.lr:g}" if arm.trained or arm.tuned else ""
                name = f"{target}: {keep} {arm.name}{rate}, seed {seed}"
                yield name, lambda a=arm, t=target, k=keep, s=seed: run(a, t, k, s)  # type: ignore[misc]
        for arm in PLAIN:
            yield f"{target}: {arm.name}", lambda a=arm, t=target: run(a, t, 1.0, 0)  # type: ignore[misc]


def exact(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """Greedy answers to GSM8K's first test questions, after four solved ones of its training split."""
    shots, asked = ([json.loads(line) for line in (SHARED / f"data/gsm8k/{s}.jsonl").open()] for s in ("train", "test"))
    solved = "".join(f"{row['question']}\n{row['answer']}\n\n" for row in shots[:4])

    def run(keep: float | None) -> Figures:
        model, tokenizer = smollm2()
        if keep is not None:
            data = in_batches(windows(tokenizer, "gsm8k", "train", args.samples, args.length), 4)
            model = calib.quantize(model, "none", "low_rank", data, progress=False, keep=keep).model
        right, greedy = 0, {"do_sample": False, "max_new_tokens": 120, "stop_strings": "\n\n", "tokenizer": tokenizer}
        for row in asked[: args.questions]:
            ids = torch.tensor([tokenizer(solved + row["question"] + "\n")["input_ids"]])
            with torch.no_grad():
                told = model.generate(ids, **greedy)
            answer = tokenizer.decode(told[0, ids.shape[1] :]).partition("####")[2].split()
            right += answer[:1] == [row["answer"].partition("####")[2].strip()]
        return {"right": right, "questions": args.questions}

    yield "float", lambda: run(None)
    for keep in (0.9, 0.7):
        yield f"{keep} tried", lambda k=keep: run(k)  # type: ignore[misc]


def table() -> None:
    """The grid in markdown: by target, size and loss; cells of several seeds as mean ± standard deviation."""
    rows: dict[str, list[Figures]] = {}
    for name, cell in json.loads((HERE / "results-grid.json").read_text()).items():
        rows.setdefault(name.partition(", seed")[0], []).append(cell)
    domains = ("gsm8k", "mbpp", "wikitext-2")
    print("| target | arm | windows | MiB | " + " | ".join(domains) + " | tokens/s |\n" + "|---" * 8 + "|")
    for name, cells in sorted(
        rows.items(), key=lambda row: (row[1][0]["target"], row[1][0]["loss"][row[1][0]["target"]])
    ):
        told = []
        for losses in ([cell["loss"][domain] for cell in cells] for domain in domains):
            spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            told.append(f"{statistics.mean(losses):.3f}{spread}")
        first, arm = cells[0], name.partition(": ")[2]
        size = (first["settings"]["samples"], f"{first['bytes'] / 2**20:.0f}") if "bytes" in first else ("", 513)
        rate = statistics.mean(cell["tokens_per_second"] for cell in cells)
        print("|", " | ".join(map(str, [first["target"], arm, *size, *told, f"{rate:.0f}"])), "|")


def figure() -> None:
    """Loss against size: of the selection, and of the grid, a panel a target, where it has been run."""
    import matplotlib.pyplot as plt

    panels: dict[str, tuple[str, dict[str, list[tuple[float, float]]]]] = {}
    if (file := HERE / "results-selection.json").is_file():
        arms: dict[str, list[tuple[float, float]]] = {}
        for name, row in json.loads(file.read_text()).items():
            if "kept" in row:
                arms.setdefault(name.partition(" ")[2], []).append((row["kept"], row["loss"]))
        panels["WikiText-2, no training"] = ("share of parameters kept", arms)
    if (file := HERE / "results-grid.json").is_file():
        for name, row in json.loads(file.read_text()).items():
            if "bytes" in row:
                arm = name.split(": ")[1].partition(" ")[2].partition(", seed")[0]
                arms = panels.setdefault(row["target"], ("MiB", {}))[1]
                arms.setdefault(arm, []).append((row["bytes"] / 2**20, row["loss"][row["target"]]))
    _, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (title, (size, arms)) in zip(axes[0], panels.items(), strict=True):
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
        for arm, points in arms.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=arm)
        axis.set(title=title, xlabel=size, ylabel="test loss, nats", yscale="log")
        axis.legend(fontsize=7)
    plt.tight_layout()
    plt.savefig(HERE / "quality-size.svg", metadata={"Date": None})


PARTS = {"layers": layers, "selection": selection, "cost": cost, "tiny": tiny, "grid": grid, "exact": exact}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=[*PARTS, "figure", "table"])
    parser.add_argument("--only", default="")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tests", type=int, default=10, help="test windows of each domain in the grid")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 14, 24])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.part in ("figure", "table"):
        (figure if args.part == "figure" else table)()
        return
    file = HERE / f"results-{args.part}.json"
    rows: dict[str, Figures] = json.loads(file.read_text()) if file.is_file() else {}
    settings = {k: v for k, v in vars(args).items() if k not in ("only", "part")}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "calib": calib.__version__}
    for name, run in PARTS[args.part](args):
        if name in rows or args.only not in name:
            continue
        start = time.process_time()
        found = run()
        about = {
            "settings": settings,
            "versions": versions,
            "cpu_seconds_of_cell": round(time.process_time() - start, 1),
        }
        rows[name] = {**found, **about}
        file.write_text(json.dumps(rows, indent=1) + "\n")
        print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
