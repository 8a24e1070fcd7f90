"""``calib.rotate``: a model whose residual stream and value heads are turned, as a plain checkpoint of the same class.

Rotation spreads an outlier over all channels. The rotations of ``--method rotate`` run with the model, before each
linear; these lie in the weights alone, so that formats that hold no rotation, and other programs, have them too. The
one of the stream is drawn at random, or learned from there on calibration text.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib import prepare
from calib.data import calibration_data
from calib.errors import InputError, ModelError
from calib.evaluate.result import vocabulary
from calib.export import plain
from calib.export.files import check_out
from calib.export.verify import VerifyReport, answer, verifying
from calib.model import Batch, apply_rewrites, call_model, make_plan, observing, target_of
from calib.model.linears import find_rewrites
from calib.model.residual import Residual, find_residual
from calib.observers.base import rows_of
from calib.recipe import recipe as make_recipe
from calib.recipe import scheme as make_scheme
from calib.solvers import LearnedTurn, learn_turn
from calib.transforms import SiteTransform
from calib.transforms.residual import free_norm, rotation, turn_reader, turn_writer

LEARNED_ROWS = 32768  # inputs that a turn is learned on, of all norms together
TOLERANCE = 1e-3  # of the logits' range, in fp32: rounding, amplified by a deep model; a wrong turn gives 1


@dataclass(frozen=True)
class Rotated:
    """model: turned, in eval mode. heads: largest block turned between value and output projections; 0: none.

    difference: largest, of the logits' range, between the model before and after, on random tokens. learned: the turn
    and what it costs held-out rows to be rounded, where it was learned.
    """

    model: nn.Module
    tokenizer: Any
    width: int
    norms: int
    writers: int
    readers: int
    heads: int
    keeps_mean: bool
    difference: float
    learned: LearnedTurn | None = None
    out: Path | None = None
    verify: VerifyReport | None = None

    def __str__(self) -> str:
        kept = ", the mean kept for LayerNorm" if self.keeps_mean else ""
        heads = f"; value heads by blocks of {self.heads}" if self.heads else ""
        found = self.learned
        gain = (
            f"; rounding inputs costs {found.after / found.before:.0%} of a random turn's"
            if found and found.before
            else ""
        )
        parts = f"{self.writers} writers, {self.readers} readers, {self.norms} norms"
        return (
            f"{self.width} channels turned{kept}: {parts}{heads}{gain}; "
            f"logits differ by {self.difference:.1e} of their range"
        )


def rotate(
    model: prepare.Model,
    out: str | os.PathLike[str] | None = None,
    *,
    heads: bool = True,
    learn: int = 0,
    data: Any = None,
    samples: int = 16,
    seq_len: int = 512,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    overwrite: bool = False,
    verified: bool = True,
    progress: bool = True,
) -> Rotated:
    """Turn a float model's residual stream, and its value heads, and write it as the plain checkpoint that it stays.

    model: name, folder, hub id, or an nn.Module, which is changed in place. heads: also turn what passes from value to
    output projections, head by head. Tied embeddings are untied: the norm before the head has moved into it. out: a
    folder that any tool, ``calib quantize`` too, takes as a float model; verified in a fresh process.

    learn: steps (100 are plenty) that make the stream's turn better than a random one on data, samples and seq_len as
    for ``quantize``: it minimizes what rounding their inputs costs the linears behind the norms (``solvers/turn.py``).

    Raises ModelError, with the module's name, where the stream cannot be turned: something but norms and linears reads
    it (post-norm encoders, norms after a branch) or the model answers otherwise afterwards. The model is then spoiled.
    """
    if out is not None:
        check_out(out, overwrite=overwrite)
        if not isinstance(model, nn.Module):
            prepare.check_apart(out, model)
    if data is not None and not learn:
        raise InputError("a random turn reads no data", "give --learn 100, or no data")
    network, tokenizer, _, _ = prepare.load_model(model, tokenizer, dtype, progress, streamed=False)
    batch = _batch(network, seed)
    before = answer(network, batch)
    rewrites = find_rewrites(network, batch)
    apply_rewrites(network, rewrites)
    network.calib_rewrites = rewrites  # type: ignore[assignment]
    found = find_residual(network, batch)
    if not found.norms:
        raise ModelError("no norm reads the residual stream", "use --method rotate")
    keeps_mean = any(norm.centers for norm in found.norms.values())
    turn, learned = rotation(found.width, keeps_mean, torch.Generator().manual_seed(seed)), None
    if learn:
        text = calibration_data(data, tokenizer, samples, seq_len, seed, vocabulary=vocabulary(network))
        rows, worth = _rows(network, found, text, seed)
        learned = learn_turn(rows, worth, turn, learn, seed, keeps_mean=keeps_mean, progress=progress)
        turn = learned.turn
    blocks = _turn_heads(network, batch) if heads else 0
    _turn(network, found, turn)
    after = answer(network, batch)
    difference = float((after - before).abs().amax() / (before.amax() - before.amin()).clamp(min=1e-12))
    limit = TOLERANCE if dtype == torch.float32 else 0.1
    if not difference <= limit:
        raise ModelError(
            f"{type(network).__name__} answers otherwise after the turn, by {difference:.1e} of the logits' range",
            "use --method rotate, which turns each input by itself",
        )
    result = Rotated(
        network,
        tokenizer,
        width=found.width,
        norms=len(found.norms),
        writers=len(found.writers),
        readers=len(found.readers) + sum(len(norm.readers) for norm in found.norms.values()),
        heads=blocks,
        keeps_mean=keeps_mean,
        difference=difference,
        learned=learned,
    )
    return result if out is None else _written(result, Path(out), before, batch, overwrite, verified, seed)


def _batch(model: nn.Module, seed: int) -> Batch:
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__} is no transformers model of one stack", "use --method rotate")
    generator = torch.Generator().manual_seed(seed)
    text = config.get_text_config()
    return {"input_ids": torch.randint(0, text.vocab_size, (2, 32), generator=generator)}


@torch.no_grad()
def _rows(model: nn.Module, found: Residual, text: Sequence[Batch], seed: int) -> tuple[Tensor, Tensor]:
    """Inputs of the linears behind the norms, gains left to the weights, as rows [T, width]; and what a unit of each
    row's squared peak costs [T]: in the outputs' energy, so that all linears add up.

    Weights are no part of it: a random turn leaves them as flat as a learned one can (SmolLM2: 0.5 % less at best).
    """
    network: Any = model
    head = network.get_output_embeddings()  # mostly stays float
    norms = {path: norm for path, norm in found.norms.items() if any(r is not head for r in norm.readers)}
    draw = torch.Generator().manual_seed(seed)
    taken: dict[str, list[Tensor]] = {path: [] for path in norms}
    share = -(-LEARNED_ROWS // (len(norms) * len(text)))

    def take(mask: Tensor | None, path: str, x: Tensor) -> None:
        rows = rows_of(x, None if mask is None else mask.bool())
        rows = rows[torch.randperm(len(rows), generator=draw)[:share]].float()
        rows = rows - rows.mean(1, keepdim=True) if norms[path].centers else rows
        taken[path].append(rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12))

    for batch in text:
        see = partial(take, batch.get("attention_mask"))
        with observing({path: norm.module for path, norm in norms.items()}, see):
            call_model(model, batch)
    rows, worth = [], []
    for path, norm in norms.items():
        x, costs = torch.cat(taken[path]), 0.0
        gain = norm.module.weight.float() + norm.gain.offset  # type: ignore[operator]
        for reader in norm.readers:
            if reader is not head:
                weight = reader.weight.float() * gain
                energy = float((x @ weight.T).square().sum(1).mean())
                costs += float(weight.square().sum()) / max(energy, 1e-12) / len(x)
        rows.append(x)
        worth.append(torch.full((len(x),), costs))
    return torch.cat(rows), torch.cat(worth)


def _turn_heads(model: nn.Module, batch: Batch) -> int:
    """Turn what value projections hand to output projections; the largest block, 0 where none is proven."""
    plan = make_plan(model, make_recipe(make_scheme("w8a8"), "rotate", prefix="none"), batch)
    largest = 0
    for name, block in plan.blocks.items():
        for site in block.sites:
            if site.kind == "vo" and site.head > 1:
                transform = SiteTransform(target_of(model.get_submodule(name), site))
                transform.rotate(site.head, foldable=True)
                transform.remove_hooks()
                largest = max(largest, site.head)
    return largest


def _turn(model: nn.Module, found: Residual, turn: Tensor) -> None:
    readers: list[tuple[nn.Linear, Tensor | None, Tensor | None]] = [(reader, None, None) for reader in found.readers]
    for norm in found.norms.values():
        keeps = any(reader.bias is None for reader in norm.readers)  # a class may have no place for one
        gain, bias = free_norm(norm.module, norm.gain.offset, norm.gain.bias, turn, keeps)
        readers += [(reader, gain, bias) for reader in norm.readers]
    _untie([*found.writers, *(reader for reader, _, _ in readers)])
    for writer in found.writers:
        turn_writer(writer, turn)
    for reader, found_gain, found_bias in readers:
        turn_reader(reader, turn, found_gain, found_bias)


def _untie(modules: list[nn.Module]) -> None:
    """Give each module a weight of its own."""
    seen: set[int] = set()
    for module in dict.fromkeys(modules):
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if id(weight) in seen:
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        seen.add(id(weight))


def _written(
    made: Rotated, out: Path, before: Tensor, batch: Batch, overwrite: bool, verified: bool, seed: int
) -> Rotated:
    finish, reports = verifying(before, batch) if verified else (None, [])
    shown: dict[str, Any] = {"width": made.width, "heads": made.heads, "keeps_mean": made.keeps_mean, "seed": seed}
    if made.learned is not None:
        shown |= {"learned": {"before": made.learned.before, "after": made.learned.after}}
    manifest = {"rotated": {**shown, "difference": made.difference}}
    path = plain.save(made.model, made.tokenizer, out, manifest=manifest, overwrite=overwrite, finish=finish)
    return replace(made, out=path, verify=reports[0] if reports else None)
