"""The terms of a run's cost: tensors of the checkpoint, bytes in memory, seconds of each stage. See cost.py."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib.model.machine import GIGA, Machine, Shapes
from calib.model.plan import Plan
from calib.model.sites import Site
from calib.model.skeleton import Skeleton, Work
from calib.quantizers import AnyWeight
from calib.recipe import Recipe

SAMPLE_ROWS = 2048  # rows a site keeps for its search
SEARCH_COPIES = 3  # float copies of a site's stacked weights while it is searched: it, scaled, fake-quantized
GPTQ_COPIES = 9  # fp32 n x n matrices alive at GPTQ's peak: four in fp64, one in fp32
# Search: evaluations of a site's objective on few rows and on all, and passes over the weights in each.
RANKED, RANK_ROWS, RESCORED, WEIGHT_PASSES = 80, 256, 12, 4
# Where a context is judged: evaluations on few rows, rows of each, evaluations on as many more.
CONTEXT_RANKED, CONTEXT_ROWS, CONTEXT_RESCORED = 105, 1024, 40
SEARCH_CALLS = 100_000  # ops started for one site's search
LOGIT_COPIES = 3  # fp32 logits alive when an answer is compared: it, the fresh process's, their difference
# Logits a choice of a prefix holds at a time, beside their exponentials: so many that glibc maps them apart from the
# rest and gives them back.
LOGIT_BYTES = 36 << 20
HEAD = "embeddings or head, logits"
PROBE_ROWS = 512  # rows of the small batch that folds are proven on
PLAN_ROWS, PREFIX_ROWS, PREFIX_TRIES = 128, 512, 6  # rows of the planning forward; of the search for a prefix
QUALITY_ROWS = 2048  # rows that the report's quality is measured on, before and after
VERIFY_ROWS = 128  # rows of the answer that is compared
OBSERVE_PASSES = 3  # times an observed tensor is read
INPUT_PASSES = 3  # times a Linear's input is passed over when it is quantized
# Times what a site's Linears give is passed over on the way to what a context's loss compares: sums, floats, offset,
# scale and bias are nine, activation, product and squared difference, of half as many, the rest.
OUTPUT_PASSES = 14
LOGIT_PASSES = 8  # times a logit is passed over for its loss
MSE_PASSES, MINMAX_PASSES = 36 * 5, 6  # passes over a weight that find its ranges and round it
OVERHEAD = 32 << 20  # allocator's reserve
VERIFY_START = 6.5  # seconds until the fresh process of --verify has its libraries
DOUBLE = 4  # times slower than the run's floats fp64 is
COLUMN_CALLS = 20  # ops for one column of GPTQ
MODULE_CALLS = 3  # Python calls a counted op costs, as modules and hooks go

ITEM = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
NAMES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEADER = {8: "F64", 4: "F32", 2: "F16"}
SCALES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Stored = dict[str, tuple[str, int, tuple[int, ...]]]  # name -> (safetensors dtype, bytes an element, shape)


def numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def stored(bones: Skeleton, recipe: Recipe, dtype: torch.dtype) -> Stored:
    """Every tensor of the checkpoint in calib's format, as QuantLinear's and the stock modules' buffers are.

    What a search decides (whether a site keeps its shift or scale) is taken as planned.
    """
    item = ITEM[dtype]
    planned = set(bones.plan.quantized())
    gained = _gained_biases(bones, recipe)
    ignored = set(getattr(bones.model, "_keys_to_ignore_on_save", None) or ())
    tied = set(getattr(bones.model, "all_tied_weights_keys", None) or ())
    out: Stored = {}
    for name, tensor in bones.model.state_dict().items():  # all but the quantized linears, tied weights once
        owner = name.rpartition(".")[0]
        if name in ignored or name in tied or owner in planned:
            continue
        size = item if tensor.is_floating_point() else tensor.element_size()
        out[name] = (HEADER.get(size, "I64") if tensor.is_floating_point() else "I64", size, tuple(tensor.shape))
    inputs = recipe.scheme.inputs
    for name in planned:
        spec = recipe.scheme.weights_of(name)
        entry, linear = bones.plan.entries[name], bones.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        m, n = entry.shape
        if spec.bits == 8:
            out[f"{name}.weight"] = ("I8", 1, (m, n))  # one code a byte
        else:
            out[f"{name}.weight_packed"] = ("I32", 4, (m, spec.words(n)))  # rows padded to whole words
        shape = spec.scale_shape(m, n)
        out[f"{name}.weight_scale"] = (SCALES[spec.scale_dtype], spec.scale_dtype.itemsize, shape)
        if not spec.symmetric:
            out[f"{name}.weight_zero_point"] = ("I8", 1, shape)
        if linear._parameters.get("bias") is not None or name in gained or recipe.bias_correction:
            out[f"{name}.bias"] = (HEADER[item], item, (m,))
        if inputs is not None and not inputs.dynamic:
            out[f"{name}.input.scale"] = ("F32", 4, (1,))
            out[f"{name}.input.zero_point"] = ("I32", 4, (1,))
        fused = entry.fold.partition("fused: ")[2]  # what the input quantizer carries, per consumer
        if "shift" in fused:
            out[f"{name}.input.shift"] = ("F32", 4, (n,))
        if "scale" in fused:
            out[f"{name}.input.rescale"] = ("F32", 4, (n,))
    for name in gained - planned:
        out[f"{name}.bias"] = (HEADER[item], item, (bones.plan.entries[name].shape[0],))
    if isinstance(recipe.prefix, tuple) and recipe.prefix:
        text = bones.config.get_text_config()  # keys and values of the prefix, a layer, a head
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        for part in ("keys", "values"):
            shape = (text.num_hidden_layers, heads, len(recipe.prefix), width)
            out[f"calib_prefix.{part}"] = (HEADER[item], item, shape)
    return out


def _gained_biases(bones: Skeleton, recipe: Recipe) -> set[str]:
    """Linears without a bias that get one: a shift of their input is made good there (consumers), or is taken from
    their own output (producers that fold it)."""
    gained = set()
    for name, block in bones.plan.blocks.items():
        for site in block.sites:
            for path in site.consumers:
                entry = bones.plan.entries[f"{name}.{path}"]
                if entry.status != "transformed" or "shift" not in entry.fold:
                    continue
                gained.add(f"{name}.{path}")
                folded = entry.fold.partition("fused: ")[0]
                if site.producer is not None and site.producer.gain is None and "shift" in folded:
                    gained.add(f"{name}.{site.producer.path}")
    found = {name: bones.model.get_submodule(name) for name in gained}
    return {name for name, module in found.items() if isinstance(module, nn.Linear) and module.bias is None}


def file_bytes(tensors: Stored) -> int:
    """Bytes of the safetensors file: data, and the header with every name, shape and offset (a multiple of 8)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (kind, size, shape) in tensors.items():
        end = offset + size * numel(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + offset


def source_bytes(bones: Skeleton, source: Any) -> int:
    """The model's files, or where they are not at hand its parameters in the config's dtype (none named: fp32)."""
    if isinstance(source, (str, Path)) and (files := list(Path(source).glob("*.safetensors"))):
        return sum(file.stat().st_size for file in files)
    named = getattr(bones.config, "dtype", None)
    item = ITEM.get(NAMES.get(str(named).removeprefix("torch."), torch.float32), 4)
    return item * sum(p.numel() for p in bones.model.parameters())


def memory_terms(
    bones: Skeleton,
    recipe: Recipe,
    dtype: torch.dtype,
    machine: Machine,
    output: Stored,
    rows: int | None = None,
    blocks_only: bool = False,
) -> dict[str, int]:
    """Terms of one process's peak but the hidden states. rows: of a batch, where not the recipe's. blocks_only: while
    blocks are calibrated, even if embeddings and head take more."""
    item, gptq = ITEM[dtype], "gptq" in recipe.methods
    wide = max(item, 4)  # a half-precision block is calibrated in fp32
    fraction = 1.0 if rows is None else rows / bones.rows
    traced = next(bones.model.parameters()).element_size()
    sampled = min(SAMPLE_ROWS, recipe.samples * bones.tokens)
    phases = []
    for name in _unlike(bones):
        block = bones.model.get_submodule(name)
        weights = wide * sum(p.numel() for p in block.parameters())
        statistics, work = 0, [0]
        for site in _observed(bones.plan, name):
            n = site.features
            # lowest, highest, absolute and two fp64 sums a channel, and the sampled rows, fp32
            statistics += n * (3 * 4 + 2 * 8) + sampled * n * 4
            statistics += 4 * n * n * len(site.groups) if gptq else 0  # one Gram matrix a tensor: experts have several
            stacked = sum(block.get_submodule(path).out_features for path in site.consumers)  # type: ignore[misc]
            # copies of the stacked weights, and the sample's float and quantized outputs
            work.append(4 * n * stacked * SEARCH_COPIES + 2 * 4 * sampled * stacked)
            if gptq:  # the factor's matrices, and weights, scales, zeros, codes of all columns
                work.append(4 * n * n * GPTQ_COPIES + 4 * 4 * n * stacked)
        peak = int(bones.work[name].peak * fraction * wide / traced)
        # a batch is in memory twice, going in and coming out, beside what is alive inside the block
        activations = peak + int(2 * bones.hidden * fraction)
        packed = sum(s * numel(shape) for key, (_, s, shape) in output.items() if key.startswith(name + "."))
        phases.append(
            {
                "float block": weights,
                "quantized block": packed,
                "statistics": statistics,
                # a site is searched, and a batch is run, one after the other
                "activations or search": max(activations, *work),
            }
        )
    block_phase = max(phases, key=lambda terms: sum(terms.values()), default={})
    # embeddings, final norm and head run while no block is loaded
    logits = 4 * VERIFY_ROWS * _classes(bones) * LOGIT_COPIES
    if recipe.scheme.static and recipe.prefix == "auto":
        logits = max(logits, 2 * min(LOGIT_BYTES, 4 * PREFIX_TRIES * PREFIX_ROWS * _classes(bones)))
    head = _outside(bones, dtype) + logits
    if head > sum(block_phase.values()) and not blocks_only:
        block_phase = {HEAD: head, "activations or search": int(2 * bones.hidden * fraction)}
    return {"interpreter and libraries": machine.baseline, "allocator": OVERHEAD, **block_phase}


def _classes(bones: Skeleton) -> int:
    """How many logits a row has: outputs of the widest Linear outside the blocks."""
    blocks = tuple(f"{name}." for name in bones.plan.blocks)
    return max((e.shape[0] for e in bones.plan.entries.values() if not e.name.startswith(blocks)), default=0)


def _outside(bones: Skeleton, dtype: torch.dtype) -> int:
    """Bytes of the largest module outside the blocks."""
    blocks = tuple(f"{name}." for name in bones.plan.blocks)
    sizes = [p.numel() for name, p in bones.model.named_parameters() if not name.startswith(blocks)]
    return ITEM[dtype] * max(sizes, default=0)


def largest_block(bones: Skeleton, dtype: torch.dtype) -> int:
    sizes = [sum(p.numel() for p in bones.model.get_submodule(n).parameters()) for n in _unlike(bones)]
    return ITEM[dtype] * max(sizes, default=0)


def _unlike(bones: Skeleton) -> list[str]:
    """One block of each kind."""
    return list({id(work): name for name, work in reversed(bones.work.items())}.values())


def time_terms(
    bones: Skeleton,
    recipe: Recipe,
    dtype: torch.dtype,
    machine: Machine,
    output: Stored,
    batches: int,
    spilled: int,
    world: int,
) -> dict[str, float]:
    """Stages of one process, the slowest."""
    m, plan, scheme = machine, bones.plan, recipe.scheme
    os_plus = any(method.partition(":")[0] == "os+" for method in recipe.methods)
    gptq = "gptq" in recipe.methods
    seconds: dict[str, float] = dict.fromkeys(
        (
            "fingerprint",
            "read",
            "plan",
            "observe",
            "search",
            "prove",
            "weights",
            "propagate",
            "refine",
            "spill",
            "write",
            "quality",
            "verify",
        ),
        0.0,
    )
    source = source_bytes(bones, bones.config)
    tokens = bones.rows * bones.tokens
    judged = min(QUALITY_ROWS, recipe.samples * bones.tokens)
    for name in plan.blocks:
        work = bones.work[name]
        float_batch, packed_batch = _forward(work, m, False), _forward(work, m, True)
        seconds["observe"] += batches * float_batch  # one float forward ...
        sites = _observed(plan, name)
        block = bones.model.get_submodule(name)
        for site in sites:
            n = site.features
            consumers = [block.get_submodule(path) for path in site.consumers]
            stacked = sum(c.out_features for c in consumers)  # type: ignore[misc]
            weight = 4 * n * stacked
            # consumers of one input share its codes (experts see a share of the rows each)
            inputs = INPUT_PASSES * 4 * n * tokens if scheme.inputs is not None else 0
            seconds["propagate"] += batches * inputs / (m.copy * GIGA)
            seconds["quality"] += judged / tokens * inputs / (m.copy * GIGA)
            # ... and the statistics' passes over every site's input (experts see a share each)
            seconds["observe"] += batches * OBSERVE_PASSES * 4 * n * tokens / (m.copy * GIGA)
            if gptq:
                seconds["observe"] += batches * 2 * tokens * n * n / (m.gemm * GIGA)  # X^T X
            if os_plus:
                seconds["search"] += _search(site, plan.blocks[name].sites, stacked, work, tokens, recipe, m)
            seconds["prove"] += PROBE_ROWS / tokens * float_batch  # each fold: the block once more
            # ranges and codes; GPTQ: two Cholesky factors and an inverse (n^3, in fp64), then every
            # column's error spread over the columns after it (n^2 a row)
            seconds["weights"] += 2 * weight * _range_passes(scheme.weights) / (m.copy * GIGA)
            if gptq:
                seconds["weights"] += (2 * n**3 * DOUBLE + n * n * stacked) / (
                    m.gemm * GIGA
                ) + COLUMN_CALLS * n * m.call
        seconds["prove"] += 3 * PROBE_ROWS / tokens * float_batch  # before, at the end, its rounding noise
        seconds["propagate"] += batches * packed_batch
        seconds["quality"] += 2 * judged / tokens * float_batch  # the float model, and the quantized one simulated
        if recipe.refine:  # a float forward for the targets; then a forward and a backward, of two, a step
            seconds["refine"] += (batches + 3 * recipe.refine) * float_batch
        # planning runs every block on a few rows once, and once a fold; a prefix is chosen by float forwards
        few = (1 + len(sites)) * PLAN_ROWS + (PREFIX_TRIES * PREFIX_ROWS if scheme.static else 0)
        seconds["plan"] += few / tokens * float_batch
    logits = 4 * judged * _classes(bones)
    width = getattr(bones.config.get_text_config(), "hidden_size", 0)
    seconds["quality"] += logits * (width / m.gemm + 2 * LOGIT_PASSES / m.pointwise) / GIGA
    # the weights come from disk for the plan and for the run, and once to be hashed
    seconds["read"] = 2 * source / (m.read * GIGA)
    seconds["fingerprint"] = source * (1 / m.read + 1 / m.sha) / GIGA
    # every block reads and writes the hidden states that do not fit
    seconds["spill"] = len(plan.blocks) * spilled * (1 / m.read + 1 / m.write) / GIGA
    written = file_bytes(output)
    seconds["write"] = written * (1 / m.write + 1 / m.sha) / GIGA
    seconds["quality"] += (source + written) / (m.read * GIGA)
    # the reference answer, then the fresh process: both read what was written, which is hashed on the way
    seconds["verify"] = VERIFY_START + written * (2 / m.read + 1 / m.sha) / GIGA
    if world > 1:  # statistics of every site meet once
        seconds["reduce"] = _statistics(bones, gptq) * 2 / (m.network * GIGA)
    return seconds


def _search(
    site: Site, sites: Sequence[Site], stacked: int, work: Work, tokens: int, recipe: Recipe, m: Machine
) -> float:
    """Seconds of one site's search. sites: of its block; stacked: outputs of its consumers; tokens: of work's batch."""
    n = site.features
    rate = m.gemm if recipe.scheme.inputs is None else m.packed  # integer products where both sides are integers
    rows, tried, between = RANKED * RANK_ROWS + RESCORED * SAMPLE_ROWS, RANKED + RESCORED, 0.0
    if site.context is not None and recipe.objective == "context":
        tried = CONTEXT_RANKED + CONTEXT_RESCORED
        rows = tried * CONTEXT_ROWS
        between = rows * 4 * (INPUT_PASSES * n + OUTPUT_PASSES * stacked) / m.copy
        if any(other.kind == "vo" and set(other.consumers) & set(site.stops) for other in sites):
            between += rows / tokens * work.attention / m.attention
    passes = tried * WEIGHT_PASSES * 4 * n * stacked * 2
    return (2 * n * stacked * rows / rate + passes / m.copy + between) / GIGA + SEARCH_CALLS * m.call


def _forward(work: Work, m: Machine, packed: bool) -> float:
    """Seconds of one batch through one block: products at their rates, everything else at memory's."""
    products = work.gemm / ((m.packed if packed else m.gemm) * GIGA)
    attention = work.attention / (m.attention * GIGA)
    plain = (work.moved - work.pointwise) / (m.copy * GIGA) + work.pointwise / (m.pointwise * GIGA)
    return products + attention + plain + work.ops * m.call * MODULE_CALLS


def _observed(plan: Plan, name: str) -> list[Site]:
    """The sites of a block that feed a planned Linear: no other is looked at."""
    entries = plan.entries
    return [s for s in plan.blocks[name].sites if any(entries[f"{name}.{p}"].status != "excluded" for p in s.consumers)]


def _range_passes(spec: AnyWeight) -> int:
    return MSE_PASSES if spec.range == "mse" else MINMAX_PASSES


def _statistics(bones: Skeleton, gptq: bool) -> int:
    """Bytes of all sites' statistics of the model."""
    total = 0
    for name in bones.plan.blocks:
        for site in _observed(bones.plan, name):
            n = site.features
            total += 4 * n * (SAMPLE_ROWS + 7) + (4 * n * n * len(site.groups) if gptq else 0)
    return total


def probe_shapes(bones: Skeleton) -> Shapes:
    """The input width that most weights have, and the attention's."""
    weights: Counter[int] = Counter()
    for entry in bones.plan.entries.values():
        weights[entry.shape[1]] += entry.shape[0] * entry.shape[1]
    text = bones.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    head = getattr(text, "head_dim", None) or max(1, getattr(text, "hidden_size", 64) // heads)
    return Shapes(bones.rows * bones.tokens, weights.most_common(1)[0][0], bones.tokens, head)
