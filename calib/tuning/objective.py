"""A loss of the model and its teacher on a batch, from the terms that a recipe weighs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from calib.errors import InputError, ModelError
from calib.model import Batch, call_model
from calib.tuning import losses
from calib.tuning.loop import Loss
from calib.tuning.recipe import Terms

STREAMS = ("", "encoder_", "decoder_")  # what names of hidden states and attentions begin with
ATTENTIONS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")


def next_token_loss(model: nn.Module) -> Loss:
    """Mean cross-entropy of each token given those before it, padding apart, in nats."""
    return lambda batch: task_loss(model, batch, getattr(call_model(model, batch), "logits", None))


def task_loss(model: nn.Module, batch: Batch, logits: Tensor | None) -> Tensor:
    """Cross-entropy of logits at the batch's ``labels`` ([B] classes, or [B, T] tokens, -100 apart); without, at the
    next tokens. ModelError for a model that gives no such logits.
    """
    ids, labels = batch["input_ids"], batch.get("labels")
    if labels is not None and logits is not None and logits.shape[:-1] == labels.shape:
        return losses.cross_entropy(logits, labels)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if logits is None or logits.shape[:2] != ids.shape or logits.dim() != 3 or encodes or labels is not None:
        raise ModelError(
            f"{type(model).__name__} gives no next-token logits to learn from",
            "use a causal language model, labelled data, or a loss without the task",
        )
    mask = batch.get("attention_mask")
    target = ids if mask is None else ids.masked_fill(mask == 0, -100)
    return losses.cross_entropy(logits[:, :-1], target[:, 1:])


def objective(model: nn.Module, teacher: nn.Module | None, terms: Terms) -> Loss:
    """The weighed sum of the terms. A batch holds the model's inputs and, where the task has them, ``labels``.

    Raises InputError for terms that compare with a teacher where there is none.
    """
    if terms.distils and teacher is None:
        raise InputError("the loss compares with a teacher, and none is given", "give one, or use loss ce")
    if terms.attention:
        for each in (model, teacher):
            if getattr(each.config, "_attn_implementation", "") == "sdpa":  # type: ignore[union-attr]
                each.set_attn_implementation("eager")  # type: ignore[union-attr,operator]
    asked = {"output_hidden_states": bool(terms.hidden or terms.contrast), "output_attentions": bool(terms.attention)}
    extra = {key: True for key, wanted in asked.items() if wanted}

    def loss(batch: Batch) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        got = call_model(model, inputs, **extra)
        parts: list[Tensor] = []
        if terms.task:
            parts.append(terms.task * task_loss(model, batch, getattr(got, "logits", None)))
        if terms.distils:
            with torch.no_grad():
                wanted = call_model(teacher, inputs, **extra)  # type: ignore[arg-type]
            parts += _distilled(terms, batch, got, wanted)
        return torch.stack(parts).sum()

    return loss


def _distilled(terms: Terms, batch: Batch, got: Any, wanted: Any) -> list[Tensor]:
    parts: list[Tensor] = []
    if terms.logits:
        student, teacher = (_answer(each) for each in (got, wanted))
        if student.shape != teacher.shape:
            cause = f"the teacher answers in shape {list(teacher.shape)}, the model in {list(student.shape)}"
            raise ModelError(cause, "name the float model it came from")
        mask = _mask(batch, student.shape[:-1])
        parts.append(terms.logits * losses.dad(student, teacher, mask, terms.gamma, terms.temperature))
    for stream in STREAMS:
        students, teachers = (getattr(each, f"{stream}hidden_states", ()) or () for each in (got, wanted))
        if not students:
            continue
        mask = _mask(batch, students[0].shape[:2], stream)
        if terms.hidden:
            parts.append(terms.hidden * losses.hidden_mse(students, teachers, mask))
        if terms.contrast:
            pairs = zip(students[1:], teachers[1:], strict=True)
            each = [
                losses.contrastive(
                    losses.pooled(s, mask), losses.pooled(t, mask), terms.tau, terms.hardness, terms.focus
                )
                for s, t in pairs
            ]
            parts.append(terms.contrast * torch.stack(each).sum())
    for name in ATTENTIONS if terms.attention else ():
        students, teachers = (getattr(each, name, ()) or () for each in (got, wanted))
        if students:
            mask = _mask(batch, (students[0].shape[0], students[0].shape[2]), name)
            # a teacher has no prefix to look at
            own = [each[..., -other.shape[-1] :] for each, other in zip(students, teachers, strict=True)]
            parts.append(terms.attention * losses.attention_mse(own, teachers, mask))
    return parts


def _answer(output: Any) -> Tensor:
    """The logits; ModelError for a model without a head."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError("the model gives no logits to distil", "use a loss on hidden states")
    return logits


def _mask(batch: Batch, shape: tuple[int, ...], stream: str = "") -> Tensor | None:
    """The mask of positions [B, T] that have this shape: the encoder's of its own states, else the decoder's first."""
    for name in ("decoder_attention_mask", "attention_mask")[stream.startswith("encoder") :]:
        if (mask := batch.get(name)) is not None and mask.shape == tuple(shape):
            return mask
    return None


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Layers recompute their activations in the backward pass. Nothing else changes: dropout stays off.

    Raises InputError where there are no layers that can, or a prefix would enter the cache twice.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers or getattr(model, "calib_prefix", None) is not None:
        cause = "has a prefix" if layers else "has no layers that recompute"
        raise InputError(f"the model {cause}, so its activations have to be kept", "leave out gradient checkpointing")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
