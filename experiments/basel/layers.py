"""Single layers: predicted loss of output energy, whitening, domains, compensation of rounding."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from calib.model import call_model, observing
from calib.observers import Moments
from calib.quantizers import AffineSpec, bits_per_weight, decode, encode, qparams, weight_range
from calib.solvers import (
    Bases,
    InputStatistics,
    bases,
    error_bases,
    svd_llm_bases,
    uniform_ranks,
)
from experiments.basel.text import Figures, block_linears, observed, output_error, smollm2, windows


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
        each = bits_per_weight((576, 576), spec, 16, spec.bits)
        size = {"none": each, "with rank 16 in 16 bit": each + 16 * extra, "with rank 16 in 8 bit": each + 8 * extra}
        return {"output_error": found, "bits_per_weight": {**size, "one bit more": each + 1}}

    yield "identity", identity
    for ratio in (0.8, 0.5):
        yield f"whitening {ratio}", lambda ratio=ratio: whitening(ratio)  # type: ignore[misc]
    for target, other in itertools.permutations(("wikitext-2", "gsm8k", "mbpp"), 2):
        yield f"domain {target} on {other}", lambda t=target, o=other: domains(t, o)  # type: ignore[misc]
    for bits in (2, 3):
        yield f"compensation w{bits}", lambda bits=bits: compensation(bits)  # type: ignore[misc]
