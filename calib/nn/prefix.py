"""Prefix tokens whose keys and values stay in float in the cache (PrefixQuant's idea).

A decoder parks its massive activations on the first token it sees. When that token is a fixed prefix, kept as float
keys and values, no later token needs the range: static per-tensor grids fit again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import create_masks_for_generate

WIDENED = ("attention_mask", "position_ids")  # what tells of tokens, and not of the prefix


class StatelessCache(DynamicCache):
    """A cache that prepends given keys and values and remembers nothing: for replaying blocks on calibration data."""

    def __init__(self, keys: Sequence[Tensor | None], values: Sequence[Tensor | None], length: int) -> None:
        super().__init__()
        self._keys, self._values, self._length = keys, values, length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = self._keys[layer_idx], self._values[layer_idx]
        if key is None or value is None:
            return key_states, value_states
        batch = key_states.shape[0]
        key = key.to(key_states).expand(batch, -1, -1, -1)
        value = value.to(value_states).expand(batch, -1, -1, -1)
        return torch.cat([key, key_states], dim=-2), torch.cat([value, value_states], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length + self._length, 0


class Prefix(nn.Module):
    """Float keys and values [layers, kv_heads, P, head_dim] of P prefix tokens, primed into every new cache."""

    keys: Tensor
    values: Tensor

    def __init__(self, tokens: Sequence[int], layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.tokens = tuple(int(t) for t in tokens)
        shape = (layers, kv_heads, len(self.tokens), head_dim)
        self.register_buffer("keys", torch.zeros(shape, dtype=dtype))
        self.register_buffer("values", torch.zeros(shape, dtype=dtype))

    @classmethod
    def from_tensors(cls, tokens: Sequence[int], keys: Sequence[Tensor], values: Sequence[Tensor]) -> Prefix:
        """keys, values: one [1, kv_heads, P, head_dim] a layer; all layers alike."""
        _, heads, _, dim = keys[0].shape
        prefix = cls(tokens, len(keys), heads, dim, keys[0].dtype)
        prefix.keys = torch.cat(list(keys)).detach().clone()
        prefix.values = torch.cat(list(values)).detach().clone()
        return prefix

    def __len__(self) -> int:
        return len(self.tokens)

    def stateless(self) -> StatelessCache:
        """What block replays pass as ``past_key_values``."""
        return StatelessCache([k[None] for k in self.keys], [v[None] for v in self.values], len(self))

    def prime(self, cache: Any, batch: int) -> None:
        """Write the prefix into an empty cache; one of fixed length grows by as much."""
        for layer in getattr(cache, "layers", ()):
            if type(layer) is StaticLayer and not layer.is_initialized:
                layer.max_cache_len += len(self)
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)

    def install(self, model: nn.Module) -> None:
        """Attach to a causal LM as ``model.calib_prefix``: every forward and ``generate`` starts after the prefix."""
        model.calib_prefix = self
        model.register_forward_pre_hook(_prime_inputs, with_kwargs=True)
        model.create_masks_for_generate = functools.partial(_masks_behind, self, type(model))  # type: ignore[assignment]


def _masks_behind(prefix: Prefix, kind: type, **given: Any) -> Any:
    """What ``generate`` asks for the mask of a cache of fixed length before every forward, the prefix counted in.

    kind: of the model, which may have masks of its own.
    """
    cache, mask, positions = map(given.get, ("past_key_values", *WIDENED))
    assert cache is not None
    if not int(cache.get_seq_length()):
        prefix.prime(cache, given["inputs_embeds"].shape[0])
    given = {**given, **_behind(prefix, mask, positions)}
    return getattr(kind, "create_masks_for_generate", create_masks_for_generate)(**given)


def _behind(prefix: Prefix, mask: Tensor | None, positions: Tensor | None) -> dict[str, Tensor]:
    """Those of a 2-D mask and of position ids that are there, the prefix counted in."""
    found = {}
    if mask is not None and mask.dim() == 2:
        found["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], len(prefix)), mask], dim=1)
    if positions is not None:
        found["position_ids"] = positions + len(prefix)
    return found


def _prime_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: prime an empty cache, widen the 2-D mask, move given positions past the prefix."""
    prefix = model.calib_prefix
    assert isinstance(prefix, Prefix)
    kwargs = dict(kwargs)
    inputs = args[0] if args else kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    assert inputs is not None
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = kwargs["past_key_values"] = DynamicCache(config=model.config)  # type: ignore[arg-type]
    if not isinstance(cache, StatelessCache) and int(cache.get_seq_length()) == 0:
        prefix.prime(cache, inputs.shape[0])
    return args, kwargs | _behind(prefix, *map(kwargs.get, WIDENED))
