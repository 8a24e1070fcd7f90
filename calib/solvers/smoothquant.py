"""SmoothQuant (arXiv 2211.10438), eq. 4."""

from __future__ import annotations

from torch import Tensor


def smoothing_scale(absmax: Tensor, weight_absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha). absmax, weight_absmax [n]: of inputs and of weight columns.

    Channels that are all zero on either side stay unscaled.
    """
    scale = absmax.pow(alpha) / weight_absmax.clamp(min=1e-5).pow(1 - alpha)
    return scale.where((absmax > 0) & (weight_absmax > 0), scale.new_ones(())).clamp(min=1e-5)
