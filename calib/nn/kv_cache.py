"""A key-value cache that holds int8 codes, one range a token and head, behind transformers' cache interface.

What comes out are floats, of one layer at a time: bit for bit what ``AttentionFormat.cache`` of the format simulates.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer

from calib.errors import InputError
from calib.nn.attention import ROUNDED
from calib.nn.prefix import StatelessCache
from calib.quantizers import AffineSpec, decode, encode, minmax, qparams

INT8 = AffineSpec(8, symmetric=False, granularity="token", dynamic=True)
BEHIND = 5  # bytes behind a token's codes: four of its fp32 scale, one of its zero point


class Int8Layer(DynamicLayer):
    """One layer's ``keys`` and ``values``: int8 [B, heads, T, dim + 5]; the first ``floats`` tokens stay as they came.

    Codes, scale and zero point of a token lie in one row, so that all that transformers does with the rows of a cache
    (cropping, reordering, repeating, moving) is done by its own code.
    """

    _layer_type = None  # of this class, not for transformers' table of defaults

    def __init__(self, floats: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.floats, self._first = floats, {}  # type: ignore[var-annotated]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = self.values = torch.empty(0, dtype=torch.int8, device=self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values so far, in the dtype of the new ones, which come out rounded too."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._append("keys", key_states), self._append("values", value_states)

    def _append(self, name: str, x: Tensor) -> Tensor:
        first = self._first.get(name)
        if first is None and self.floats:  # the same prefix in every row of the batch
            first = self._first[name] = x[:1, :, : self.floats].clone()
            x = x[:, :, self.floats :]
        rows = torch.cat([getattr(self, name), pack(x)], dim=-2)
        setattr(self, name, rows)
        y = unpack(rows, x.dtype)
        if first is not None:
            y = torch.cat([first.expand(len(y), -1, -1, -1), y], dim=-2)
        setattr(y, ROUNDED, True)
        return y

    def get_seq_length(self) -> int:
        return int(super().get_seq_length()) + (self.floats if self._first else 0)

    def reset(self) -> None:
        super().reset()
        self._first = {}


def pack(x: Tensor) -> Tensor:
    """int8 [..., dim + 5] of floats [..., dim]."""
    if not x.numel():
        return x.new_empty(*x.shape[:-1], x.shape[-1] + BEHIND, dtype=torch.int8)
    scale, zero_point = qparams(*minmax(x.float(), INT8), INT8)
    codes = encode(x, scale, zero_point, INT8)
    return torch.cat([codes, scale.contiguous().view(torch.int8), zero_point.to(torch.int8)], dim=-1)


def unpack(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The floats [..., dim] that int8 rows [..., dim + 5] stand for."""
    dim = rows.shape[-1] - BEHIND
    if not rows.numel():
        return rows[..., :dim].to(dtype)
    scale = rows[..., dim : dim + 4].contiguous().view(torch.float32)
    return decode(rows[..., :dim], scale, rows[..., dim + 4 :], INT8).to(dtype)


class Int8Cache(DynamicCache):
    """For ``past_key_values`` of forward or generate: a new cache of the config's layers, in int8 where they grow.

    Layers with a sliding window hold a window and no more: they stay float. floats: leading tokens that stay float.
    """

    def __init__(self, config: PreTrainedConfig, floats: int = 0) -> None:
        super().__init__(config=config)
        turn_int8(self, floats)


def turn_int8(cache: DynamicCache, floats: int = 0) -> None:
    """Let an empty cache hold int8 from now on, in place: whoever made it keeps it."""
    cache.layers = [Int8Layer(floats) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = partial(Int8Layer, floats)  # type: ignore[assignment]


def cache_bytes(cache: Any) -> int:
    """What a cache's keys and values occupy."""
    if isinstance(cache, EncoderDecoderCache):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    held = [
        each for layer in cache.layers for each in (layer.keys, layer.values, *getattr(layer, "_first", {}).values())
    ]
    return sum(each.nbytes for each in held if each is not None)


def use_int8_cache(model: nn.Module) -> nn.Module:
    """Every cache that the model's forward or ``generate`` starts holds int8. Raises InputError for encoders."""
    if not getattr(model, "can_generate", lambda: False)():
        raise InputError(f"{type(model).__name__} keeps no key-value cache", "drop kv_cache")
    known = hasattr(model, "calib_int8_cache")
    model.calib_int8_cache = True  # type: ignore[assignment]
    if not known:
        model.register_forward_pre_hook(_start_int8, with_kwargs=True, prepend=True)  # before a prefix fills it
    return model


def _start_int8(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: an empty cache turns int8, and a model that would make one gets one.

    Raises InputError for a cache of fixed length, which would hold floats unasked.
    """
    cache = kwargs.get("past_key_values")
    if not model.calib_int8_cache:
        return args, kwargs
    floats = len(prefix) if (prefix := getattr(model, "calib_prefix", None)) is not None else 0
    config: Any = model.config
    if cache is None:
        wanted = kwargs.get("use_cache")
        wanted = getattr(config, "use_cache", False) if wanted is None else wanted
        if (wanted or floats) and not config.is_encoder_decoder:
            kwargs = {**kwargs, "past_key_values": Int8Cache(config, floats)}
        return args, kwargs
    if isinstance(cache, EncoderDecoderCache):  # the encoder's keys and values are made once and stay float
        cache = cache.self_attention_cache
    if isinstance(cache, StaticCache):
        raise InputError(
            "a cache of fixed length holds floats, and this model's is int8",
            'drop cache_implementation="static", or load the model without an int8 cache',
        )
    if isinstance(cache, DynamicCache) and not isinstance(cache, StatelessCache) and not int(cache.get_seq_length()):
        turn_int8(cache, floats)
    return args, kwargs
