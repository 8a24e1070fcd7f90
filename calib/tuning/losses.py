"""What recovery training minimises: tensors in, a scalar in nats or squared units out. Teachers get no gradient.

Positions that do not count are masked out; the mean is over those that do, in fp32 (fp64 of fp64 inputs).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_WEIGHT = 5.0  # of a token, the mean being 1: a few tokens must not carry a step


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values [...] where mask [...] is true; of all without one."""
    return values.mean() if mask is None else values[mask.bool()].mean()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [..., C] at targets [...], -100 apart."""
    return F.cross_entropy(_wide(logits).flatten(0, -2), targets.flatten())


def token_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """t^2 KL(softmax(teacher / t) || softmax(student / t)) [...] of logits [..., C] (arXiv 1503.02531)."""
    wanted = F.log_softmax(_wide(teacher).detach() / temperature, -1)
    given = F.log_softmax(_wide(student) / temperature, -1)
    return (wanted.exp() * (wanted - given)).sum(-1) * temperature**2


def kd(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Knowledge distillation on logits [..., C]: the mean of ``token_kl``."""
    return masked_mean(token_kl(student, teacher, temperature), mask)


def dad_weights(student: Tensor, teacher: Tensor, mask: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    """(h_T h_S)^gamma [...] over its mean, at most 5; h: entropies over log C. No gradient.

    DB-LLM (arXiv 2402.11960, deviation-aware distillation) weighs tokens by an entropy of teacher and student. How it
    joins the two, and its gamma, are not public to us: the product is this project's choice.
    """
    with torch.no_grad():
        both = _entropy(student) * _entropy(teacher)
        weights = both.clamp(min=0) ** gamma
        return (weights / masked_mean(weights, mask).clamp(min=1e-12)).clamp(max=LARGEST_WEIGHT)


def dad(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Deviation-aware distillation: ``token_kl`` weighed by ``dad_weights``; gamma = 0 is ``kd``, to the bit."""
    return masked_mean(dad_weights(student, teacher, mask, gamma) * token_kl(student, teacher, temperature), mask)


def hidden_mse(students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Sum over layers of the mean squared difference of hidden states [B, T, d], mask [B, T] (TBT, ACL 2023; equal
    layer counts). TBT sums its encoder's last state over the batch; here every layer is a mean.
    """
    return _summed([(_wide(s) - _wide(t).detach()).square().mean(-1) for s, t in _pairs(students, teachers)], mask)


def attention_mse(students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Sum over layers of the mean squared difference of attention probabilities [B, heads, T, S], mask [B, T] on
    queries (TBT, ACL 2023, whose code compares what its attention modules return).
    """
    return _summed([(_wide(s) - _wide(t).detach()).square().mean((1, 3)) for s, t in _pairs(students, teachers)], mask)


def pooled(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Unit vectors [B, d]: hidden states [B, T, d] averaged over the tokens of mask [B, T]."""
    hidden = _wide(hidden)
    counts = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden)
    return F.normalize((hidden * counts[..., None]).sum(1) / counts.sum(1, keepdim=True).clamp(min=1), dim=-1)


def contrastive(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 0.1,
    hardness: float | None = None,
    focus: float | None = None,
) -> Tensor:
    """Contrastive distillation of unit features [n, d] with sample adaptive reweighting, ACKD-style; a scalar.

    -log(e_ii / (e_ii + sum_j w_ij e_ij)), e_ij = exp(f_i g_j / temperature), f the student's and g the teacher's
    features. hardness: w_ij is a softmax over the wrong pairs of f_i g_j / hardness, mean 1: close wrong pairs count
    more. focus: samples are weighed by a softmax of their losses / focus, mean 1. None: evenly; both None: InfoNCE.
    Neither weight has a gradient. A batch of one has no negatives: a warning, and 0.

    ACKD (ACL Findings 2023, 2023.findings-acl.569) publishes the idea in its abstract, neither code nor, to us,
    formulas: this is a reconstruction, not its loss.
    """
    n = len(student)
    if n < 2:
        warnings.warn("a contrastive loss needs a batch of two or more: it counts as 0", stacklevel=2)
        return student.sum() * 0.0
    similarity = _wide(student) @ _wide(teacher).detach().T
    scores, own = similarity / temperature, torch.eye(n, dtype=torch.bool, device=student.device)
    if hardness is not None:
        wrong = (similarity.detach() / hardness).masked_fill(own, -math.inf)
        scores = scores + (F.log_softmax(wrong, -1) + math.log(n - 1)).masked_fill(own, 0.0)
    losses = F.cross_entropy(scores, torch.arange(n, device=student.device), reduction="none")
    if focus is None:
        return losses.mean()
    return ((losses.detach() / focus).softmax(0) * losses).sum()


def _entropy(logits: Tensor) -> Tensor:
    """Entropies [...] of logits [..., C], in parts of the largest."""
    log = F.log_softmax(_wide(logits), -1)
    return -(log.exp() * log).sum(-1) / math.log(log.shape[-1])


def _pairs(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(students, teachers, strict=True))


def _summed(layers: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    return torch.stack([masked_mean(layer, mask) for layer in layers]).sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
