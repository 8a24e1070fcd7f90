"""Quantized attention matmuls and key-value cache, simulated in floats, behind transformers' attention interface.

Formats are dynamic: one range a token and head for q, k, v and the cache, one a row for the probabilities. Keys and
values of prefix tokens stay float.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from calib.errors import InputError
from calib.nn.hadamard import best_block, block_hadamard
from calib.quantizers import AffineSpec, fake_quantize_dynamic, straight

NAME = "calib_quantized"
ROUNDED = "calib_rounded"  # set on keys and values that come out of a cache on its grid already


@dataclass(frozen=True)
class AttentionFormat:
    """matmuls: q, k, v and probabilities; cache: keys and values; prefix: leading positions that stay float.

    turned: the cache holds keys and values turned within each head, so that no channel stands out.
    """

    matmuls: AffineSpec | None = None
    cache: AffineSpec | None = None
    prefix: int = 0
    turned: bool = False

    def keys_or_values(self, x: Tensor) -> Tensor:
        """x [B, heads, T, dim] as it comes out of the cache and enters its matmul."""
        head, rest = x[:, :, : self.prefix], x[:, :, self.prefix :]
        if self.cache is not None and not getattr(x, ROUNDED, False):
            rest = _rounded_turned(rest, self.cache) if self.turned else _rounded(rest, self.cache)
        if self.matmuls is not None:
            rest = _rounded(rest, self.matmuls)
        return torch.cat([head, rest], dim=2) if self.prefix else rest


def _rounded(x: Tensor, spec: AffineSpec) -> Tensor:
    """x on its grid; gradients pass as they are (its range is its own, so nothing clips)."""
    return straight.standing(x, fake_quantize_dynamic(x.detach(), spec))


def _rounded_turned(x: Tensor, spec: AffineSpec) -> Tensor:
    """x [..., dim] as it comes back from a grid that it was turned for: y = x S H, rounded, and back."""
    block = best_block(x.shape[-1])
    signs = _bent_signs(block, x.shape[-1]).to(x.device)
    with torch.no_grad():
        held = fake_quantize_dynamic(block_hadamard(x.float() * signs, block), spec)
        values = (block_hadamard(held, block) * signs).to(x.dtype)  # H of a power of two is its own inverse
    return straight.standing(x, values)


@functools.lru_cache(maxsize=16)
def _bent_signs(block: int, width: int) -> Tensor:
    """Signs S [width], a bent function of the channel's number in its block: H S H is as flat as H itself.

    Without them H H would be no turn at all, for values that a fold has turned already.
    """
    numbers = [(i & (i >> 1) & 0x5555).bit_count() for i in range(block)]
    with torch.inference_mode(False):
        return torch.tensor([1.0 - 2 * (n % 2) for n in numbers]).repeat(width // block)


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention [B, T, heads, dim] of query [B, heads, T, dim] over key, value [B, kv_heads, S, dim].

    Modules without a ``calib_attention`` format compute in float.
    """
    form = getattr(module, "calib_attention", None) or AttentionFormat()
    groups = query.shape[1] // key.shape[1]
    key = form.keys_or_values(key).repeat_interleave(groups, dim=1)
    value = form.keys_or_values(value).repeat_interleave(groups, dim=1)
    if form.matmuls is not None:
        query = _rounded(query, form.matmuls)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if form.matmuls is not None:
        probabilities = _rounded(probabilities, form.matmuls)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def route_attention(model: nn.Module) -> None:
    """Send the model's attention through ``quantized_attention``; formats are then set module by module.

    Raises InputError for models that do not use transformers' attention interface (BLOOM).
    """
    AttentionInterface.register(NAME, quantized_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    config = getattr(model, "config", None)
    if config is None or (not getattr(model, "_supports_attention_backend", False) and not attention_modules(model)):
        raise InputError(
            f"the attention of {type(model).__name__} cannot be quantized", "drop --kv-bits/--attention-bits"
        )
    model.set_attn_implementation(NAME)  # type: ignore[operator]


def attention_modules(block: nn.Module) -> list[nn.Module]:
    """The modules below a block that call the attention interface: they own the projections and a ``scaling``."""
    return [m for m in block.modules() if hasattr(m, "scaling") and hasattr(m, "is_causal")]
