"""Low-rank bases measured: which to keep, on whose data, at what cost; Basel against truncation with equal fine-tuning.

    python experiments/basel/run.py layers      # per layer: predicted loss, whitening, domains, compensation
    python experiments/basel/run.py selection   # loss of the whole model, ranks global or uniform, at each ratio
    python experiments/basel/run.py cost        # the training-free selection through calib.quantize, timed
    python experiments/basel/run.py tiny        # Basel against SVD-LLM + the same steps, on stories260k, 3 seeds
    python experiments/basel/run.py grid        # all arms, ratios and targets on smollm2-135m: hours
    python experiments/basel/run.py exact       # can it do the task at all: GSM8K answers got right
    python experiments/basel/run.py figure      # of what has been run

Every finished cell is kept in results-<part>.json and skipped on the next run; --only TEXT runs the cells that hold it.
Calibration and training take train or validation splits, figures are of test splits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import calib
from calib.methods.basel import finetune
from calib.model import Batch, call_model, observing
from calib.nn import LowRankLinear, changed_linears
from calib.observers import Moments
from calib.quantizers import AffineSpec, bits_per_weight, decode, encode, qparams, weight_range
from calib.solvers import (
    Bases,
    InputStatistics,
    bases,
    choose_ranks,
    error_bases,
    svd_llm_bases,
    uniform_ranks,
)
from calib.tuning import Tuning, next_token_loss
from model_zoo.sources import load_model

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared"
RATIOS = (0.9, 0.8, 0.7, 0.5, 0.3)
Figures = dict[str, Any]


def text_of(domain: str, split: str) -> str:
    """A domain's text; split: 'train' (WikiText-2: valid) or 'test'."""
    if domain == "wikitext-2":
        return (SHARED / "data/wikitext-2" / ("test.txt" if split == "test" else "valid.txt")).read_text()
    if domain == "gsm8k":
        rows = [json.loads(line) for line in (SHARED / f"data/gsm8k/{split}.jsonl").read_text().splitlines()]
        return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)
    rows = [json.loads(line) for line in (SHARED / "data/mbpp/mbpp.jsonl").read_text().splitlines()]
    span = range(11, 511) if split == "test" else range(601, 975)  # the data set's own splits
    return "\n\n".join(f"{row['text']}\n{row['code']}" for row in rows if row["task_id"] in span)


def windows(tokenizer: Any, domain: str, split: str, count: int, length: int) -> Tensor:
    """Token ids [count, length], evenly spread over the text."""
    ids = tokenizer(text_of(domain, split), add_special_tokens=False, verbose=False)["input_ids"]
    step = (len(ids) - length) // max(count - 1, 1)
    return torch.tensor([ids[i * step : i * step + length] for i in range(count)])


def in_batches(ids: Tensor, size: int = 8) -> list[Batch]:
    return [{"input_ids": part} for part in ids.split(size)]


def loss_on(model: nn.Module, ids: Tensor) -> float:
    """Mean next-token loss, nats."""
    with torch.no_grad():
        losses = [float(next_token_loss(model)(batch)) * len(batch["input_ids"]) for batch in in_batches(ids, 2)]
    return sum(losses) / len(ids)


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{n}"}


def observed(model: nn.Module, ids: Tensor) -> dict[str, InputStatistics]:
    """Of every block Linear's input; those that share one share its statistics."""
    linears = block_linears(model)
    same = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    owner = {
        name: name.replace(name.split(".")[-1], same.get(name.split(".")[-1], name.split(".")[-1])) for name in linears
    }
    moments = {name: Moments(linears[name].in_features, gram=True) for name in set(owner.values())}
    sums = {name: torch.zeros(linears[name].in_features, dtype=torch.float64) for name in moments}

    def take(name: str, x: Tensor) -> None:
        moments[name].update(x.reshape(-1, x.shape[-1]))
        sums[name] += x.abs().double().sum((0, 1))

    with torch.no_grad(), observing({name: linears[name] for name in moments}, take):
        for batch in in_batches(ids, 4):
            call_model(model, batch)
    known = {}
    for name, each in moments.items():
        assert each.gram is not None
        known[name] = InputStatistics(each.gram / each.count, sums[name] / each.count)
    return {name: known[owner[name]] for name in linears}


def output_error(weight: Tensor, change: Tensor, gram: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T)."""
    d, w, h = change.double(), weight.double(), gram.double()
    return float(((d @ h) * d).sum() / ((w @ h) * w).sum())


def smollm2() -> tuple[Any, Any]:
    model, tokenizer = load_model("smollm2-135m", progress=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, tokenizer


def layers(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """Of the layers of three blocks (or --blocks), statistics of the float model, errors on held-out text."""
    model, tokenizer = smollm2()
    wanted = {n: m for n, m in block_linears(model).items() if int(n.split(".")[2]) in args.blocks}
    known: dict[tuple[str, str], dict[str, InputStatistics]] = {}

    def of(domain: str, split: str) -> dict[str, InputStatistics]:
        if (domain, split) not in known:
            known[domain, split] = observed(model, windows(tokenizer, domain, split, args.samples, args.length))
        return known[domain, split]

    def mean(errors: Callable[[str, Tensor], float]) -> float:
        found = [errors(name, linear.weight) for name, linear in wanted.items()]
        return sum(found) / len(found)

    def identity() -> Figures:
        """Against the inputs themselves, not their Gram matrix."""
        linears, seen, worst = wanted, dict[str, list[Tensor]](), {"full_rank": 0.0, "predicted": 0.0}
        with torch.no_grad(), observing(linears, lambda name, x: seen.setdefault(name, []).append(x.flatten(0, 1))):
            call_model(model, {"input_ids": windows(tokenizer, "wikitext-2", "train", 8, args.length)})
        for name, linear in linears.items():
            x, w = torch.cat(seen[name]).double(), linear.weight.double()
            moments = Moments(linear.in_features, gram=True)
            moments.update(x.float())
            assert moments.gram is not None
            found = bases(w, moments.gram / len(x))
            for rank in (1, len(found.energy) // 4, len(found.energy) // 2, len(found.energy)):
                b, a = (factor.float().double() for factor in found.factors(rank))
                lost = float((x @ (w - b @ a).T).square().sum() / len(x))
                if rank < len(found.energy):
                    told = float(found.energy[rank:].sum())
                    worst["predicted"] = max(worst["predicted"], abs(lost - told) / told)
                else:
                    y = x @ w.T
                    worst["full_rank"] = max(worst["full_rank"], float((x @ (b @ a).T - y).norm() / y.norm()))
        return {"largest relative difference": worst, "linears": len(linears), "tokens": 8 * args.length}

    def whitening(ratio: float) -> Figures:
        calibration, held = of("wikitext-2", "train"), of("wikitext-2", "test")

        def truncated(found: Bases, weight: Tensor) -> Tensor:
            (rank,) = uniform_ranks([tuple(weight.shape)], ratio)  # type: ignore[list-item]
            b, a = found.factors(rank or len(found.energy))
            return weight - b @ a

        def errors(variant: str, name: str, weight: Tensor) -> float:
            known = calibration[name]
            found = svd_llm_bases(weight, known.gram) if variant == "svd-llm" else bases(weight, known.metric(variant))
            return output_error(weight, truncated(found, weight), held[name].gram)

        found = {v: mean(lambda n, w, v=v: errors(v, n, w)) for v in ("svd", "asvd", "rms", "svd-llm", "whitened")}  # type: ignore[misc]
        return {"output_error": found, "whitened_over_svd": found["whitened"] / found["svd"]}

    def domains(target: str, other: str) -> Figures:
        held = of(target, "test")

        def errors(domain: str, name: str, weight: Tensor) -> float:
            (rank,) = uniform_ranks([tuple(weight.shape)], 0.5)  # type: ignore[list-item]
            b, a = bases(weight, of(domain, "train")[name].gram).factors(rank or 1)
            return output_error(weight, weight - b @ a, held[name].gram)

        right, wrong = (mean(lambda n, w, d=d: errors(d, n, w)) for d in (target, other))  # type: ignore[misc]
        return {"in_domain": right, "wrong_domain": wrong, "ratio": wrong / right}

    def compensation(bits: int) -> Figures:
        calibration, held, rank = of("wikitext-2", "train"), of("wikitext-2", "test"), 16
        size: dict[str, float] = {}

        def rounded(weight: Tensor, bits: int) -> Tensor:
            spec = AffineSpec(bits, symmetric=False, granularity="group", group_size=64)
            scale, zero = qparams(*weight_range(weight, spec), spec)
            return decode(encode(weight, scale, zero, spec), scale, zero, spec)

        def errors(variant: str, name: str, weight: Tensor) -> float:
            plain = rounded(weight, bits + (variant == "one bit more"))
            change = weight - plain
            if variant not in ("none", "one bit more"):
                b, a = error_bases(variant, change, calibration[name]).factors(rank)
                change = change - b @ a
            return output_error(weight, change, held[name].gram)

        variants = ("none", "lqer", "l2qer", "qera-approx", "qera", "one bit more")
        found = {v: mean(lambda n, w, v=v: errors(v, n, w)) for v in variants}  # type: ignore[misc]
        whole = sum(m.weight.numel() for m in wanted.values())
        extra = sum(rank * sum(m.weight.shape) for m in wanted.values()) / whole
        spec = AffineSpec(bits, symmetric=False, granularity="group", group_size=64)
        each = bits_per_weight((576, 576), spec, scale_bits=16)
        size = {"none": each, "with rank 16 in 16 bit": each + 16 * extra, "with rank 16 in 8 bit": each + 8 * extra}
        return {"output_error": found, "bits_per_weight": {**size, "one bit more": each + 1}}

    yield "identity", identity
    for ratio in (0.8, 0.5):
        yield f"whitening {ratio}", lambda ratio=ratio: whitening(ratio)  # type: ignore[misc]
    for target, other in itertools.permutations(("wikitext-2", "gsm8k", "mbpp"), 2):
        yield f"domain {target} on {other}", lambda t=target, o=other: domains(t, o)  # type: ignore[misc]
    for bits in (2, 3):
        yield f"compensation w{bits}", lambda bits=bits: compensation(bits)  # type: ignore[misc]


def selection(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """All layers truncated at once, with statistics of the float model."""
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

    def measure(ratio: float, select: str) -> Figures:
        found, worth = prepare()
        energies = [found[name].energy for name in linears]
        ranks = (
            uniform_ranks(shapes, ratio)
            if select == "uniform"
            else choose_ranks(shapes, energies, worth, ratio * whole)
        )
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
    for ratio, select in itertools.product(RATIOS, ("uniform", "global")):
        yield f"{ratio} {select}", lambda r=ratio, s=select: measure(r, s)  # type: ignore[misc]


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


UNIFORM = {"select": "uniform"}
ARMS = [
    Arm("svd", method="low_rank:svd"),
    Arm("fwsvd", method="low_rank:fwsvd"),
    Arm("asvd", method="low_rank:asvd"),
    Arm("svd-llm", method="low_rank:svd-llm"),
    Arm("global"),
    Arm("basel", method="basel", trained=True),
    Arm("basel, published bases", method="basel:svd", trained=True),
    Arm("svd-llm + steps", method="low_rank:svd-llm", tuned=True),
    Arm("global + steps", tuned=True),
]
SMALL = [  # bytes against bytes: bases in integers, and plain integers
    Arm("w8a8 x global", "w8a8", "gptq,low_rank"),
    Arm("w4a16 x global", "w4a16", "gptq,low_rank"),
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
    entries = [e for e in result.plan.entries.values() if e.rank is not None or "dense" in e.reason]
    whole = sum(e.shape[0] * e.shape[1] for e in entries)
    kept = sum(e.rank * sum(e.shape) if e.rank else e.shape[0] * e.shape[1] for e in entries)
    return {"kept": kept / whole if whole else 1.0, "bytes": sum(t.numel() * t.element_size() for t in tensors)}


def tiny(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """stories260k moved to GSM8K's text: loss on its test split, and on WikiText-2's."""

    def run(arm: Arm | None, keep: float, seed: int) -> Figures:
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
    def run(arm: Arm | None, target: str, source: str, keep: float, seed: int) -> Figures:
        model, tokenizer = smollm2()
        size: Figures = {}
        if arm is not None:
            data = in_batches(windows(tokenizer, source, "train", args.samples, args.length), 4)
            result = shrunk(arm, model, data, keep, args.steps, args.lr, seed)
            model, size = result.model, size_of(result)
            for module in model.modules():
                if isinstance(module, calib.nn.QuantLinear):
                    module.set_mode("packed")
        test = {d: windows(tokenizer, d, "test", args.tests, args.length) for d in ("wikitext-2", "gsm8k", "mbpp")}
        start = time.perf_counter()
        losses = {domain: loss_on(model, ids) for domain, ids in test.items()}
        rate = sum(ids.numel() for ids in test.values()) / (time.perf_counter() - start)
        return {"loss": losses, **size, "tokens_per_second": rate, "target": target, "keep": keep}

    for target in ("gsm8k", "mbpp", "wikitext-2"):
        yield f"{target}: float", lambda t=target: run(None, t, t, 1.0, 0)  # type: ignore[misc]
        for keep, arm in itertools.product((0.9, 0.7, 0.5, 0.3), [*ARMS, *SMALL]):
            for seed in range(3 if arm.trained or arm.tuned else 1):
                yield (
                    f"{target}: {keep} {arm.name}, seed {seed}",
                    lambda a=arm, t=target, k=keep, s=seed: run(a, t, t, k, s),  # type: ignore[misc]
                )
        for arm in PLAIN:
            yield f"{target}: {arm.name}", lambda a=arm, t=target: run(a, t, t, 1.0, 0)  # type: ignore[misc]
        for keep in (0.7, 0.5):
            wrong = "mbpp" if target == "gsm8k" else "gsm8k"
            name = f"{target}: {keep} global, calibrated on {wrong}"
            yield name, lambda t=target, w=wrong, k=keep: run(ARMS[4], t, w, k, 0)  # type: ignore[misc]


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
        yield f"{keep} global", lambda k=keep: run(k)  # type: ignore[misc]


def figure() -> None:
    """Loss against size: of the selection, and of the grid, a panel a target, where it has been run."""
    import matplotlib.pyplot as plt

    panels: dict[str, tuple[str, dict[str, list[tuple[float, float]]]]] = {}
    if (file := HERE / "results-selection.json").is_file():
        arms: dict[str, list[tuple[float, float]]] = {}
        for name, row in json.loads(file.read_text()).items():
            if "kept" in row:
                arms.setdefault(f"ranks {name.partition(' ')[2]}", []).append((row["kept"], row["loss"]))
        panels["WikiText-2, no training"] = ("share of parameters kept", arms)
    if (file := HERE / "results-grid.json").is_file():
        for name, row in json.loads(file.read_text()).items():
            if "bytes" in row:
                arm = name.split(": ")[1].partition(" ")[2].partition(", seed")[0]
                arms = panels.setdefault(row["target"], ("MiB", {}))[1]
                arms.setdefault(arm, []).append((row["bytes"] / 2**20, row["loss"][row["target"]]))
    _, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (title, (size, arms)) in zip(axes[0], panels.items(), strict=True):
        for arm, points in arms.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=arm)
        axis.set(title=title, xlabel=size, ylabel="test loss, nats")
        axis.legend(fontsize=7)
    plt.tight_layout()
    plt.savefig(HERE / "quality-size.svg", metadata={"Date": None})


PARTS = {"layers": layers, "selection": selection, "cost": cost, "tiny": tiny, "grid": grid, "exact": exact}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=[*PARTS, "figure"])
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
    if args.part == "figure":
        figure()
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
