"""GPTQ (arXiv 2210.17323): round column by column, spreading each error over the columns still to come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calib.errors import NumericsError
from calib.quantizers import AnyWeight
from calib.solvers.grid import weight_params

BLOCK = 128
RIDGE = 0.3  # of the regression of the drift: held-out error is flat from 0.1 to 1, and higher below


@dataclass(frozen=True)
class Pairs:
    """T rows X of the float model and X' of the quantized one: cross X^T X' [n, n], count T, drift |X - X'|^2."""

    cross: Tensor
    count: int
    drift: float


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor [n, n] (fp32) of (H + damp mean(diag H) I)^-1; damping grows until H is factorable."""
    hessian = gram.double()
    mean = hessian.diagonal().mean().clamp(min=1e-12)
    for _ in range(6):
        damped = hessian + damp * mean * torch.eye(len(hessian), dtype=torch.float64, device=gram.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            inverse, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(bad) and bool(torch.isfinite(inverse).all()):
                return inverse.float()
        damp *= 10
    raise NumericsError("the Gram matrix of a site cannot be factored", "use more calibration rows or method os+ alone")


def gptq(
    weight: Tensor,
    gram: Tensor,
    spec: AnyWeight,
    damp: float = 0.01,
    act_order: bool = True,
    pairs: Pairs | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [m, n], scale, zero point (shaped as ``weight_range``'s) of weight [m, n]; gram [n, n]: inputs' X^T X.

    Scales come from the weight before rounding (groups too, so that columns may be taken in any order); act_order takes
    columns by falling energy. Columns without energy are rounded to nearest. pairs: of the inputs X that the float
    model gives and X', whose Gram matrix ``gram`` then is, that the quantized one will: what is rounded is then the
    weight that on X' comes nearest to the float output (asymmetric calibration; GPTAQ, arXiv 2504.02692).
    """
    n = weight.shape[1]
    if pairs is not None:
        weight = towards(weight, gram, pairs)
    energy = gram.diagonal().clone()
    scale, zero_point = weight_params(weight, spec, energy / energy.mean().clamp(min=1e-12))
    column = spec.with_(granularity="channel", group_size=None)  # the same levels, for one column of scales
    column_scale, column_zero = (_per_column(params, spec, n) for params in (scale, zero_point))
    gram = gram.clone()
    dead = energy <= 0
    gram[dead, dead] = 1.0
    order = torch.argsort(energy, descending=True, stable=True) if act_order else torch.arange(n, device=weight.device)
    factor = inverse_factor(gram[order][:, order], damp)
    rest = weight.float()[:, order].clone()
    steps, zeros = column_scale[:, order], column_zero[:, order]
    codes = torch.empty_like(rest, dtype=torch.int8)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        block, errors = rest[:, start:end], torch.zeros_like(rest[:, start:end])
        for i in range(end - start):
            values, params = block[:, i : i + 1], (steps[:, start + i], zeros[:, start + i])
            q = column.encode(values, *params)
            codes[:, start + i] = q[:, 0]
            errors[:, i] = (values - column.decode(q, *params))[:, 0] / factor[start + i, start + i]
            block[:, i:] -= torch.outer(errors[:, i], factor[start + i, start + i : end])
        rest[:, end:] -= errors @ factor[start:end, end:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result, scale, zero_point


def towards(weight: Tensor, gram: Tensor, pairs: Pairs, ridge: float = RIDGE) -> Tensor:
    """The weight [m, n] that on X' comes nearest to ``weight`` on X: W + a W (C - H) (H + ridge mean(diag H) I)^-1.

    gram H = X'^T X'. a in [0, 1] takes back what chance explains: a regression of the drift X - X' with k degrees of
    freedom on T rows of noise would find k / (T - k) of the energy that it leaves unexplained.
    """
    hessian, n = gram.double(), len(gram)
    damping = ridge * float(hessian.diagonal().mean().clamp(min=1e-12))
    damped = hessian + damping * torch.eye(n, dtype=torch.float64, device=gram.device)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed) or not bool(torch.isfinite(pairs.cross).all()):
        raise NumericsError("the Gram matrix of a site cannot be factored", "use more calibration rows, or method gptq")
    drift = pairs.cross.double() - hessian
    solved = torch.cholesky_solve(drift.T, lower).T  # (C - H) (H + ...)^-1
    freedom = n - damping * float(torch.cholesky_inverse(lower).diagonal().sum())
    explained = float((solved * drift).sum())
    chance = freedom * max(pairs.drift - explained, 0.0) / max(pairs.count - freedom, 1.0)
    share = max(0.0, 1 - chance / explained) if explained > 0 else 0.0
    return (weight.double() + share * (weight.double() @ solved)).to(weight.dtype)


def _per_column(params: Tensor, spec: AnyWeight, n: int) -> Tensor:
    """Scales or zero points as [rows, n, p], those of each column; p: how many a granule has."""
    if params.dim() == 3:
        assert spec.group_size is not None
        return params.repeat_interleave(spec.group_size, dim=1)
    params = params if params.dim() == 2 else params.reshape(1, 1)  # one for all
    return params.unsqueeze(1).expand(-1, n, -1)
