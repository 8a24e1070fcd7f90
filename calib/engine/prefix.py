"""Which prefix tokens a decoder needs, and their float keys and values."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from calib.errors import InputError
from calib.memory import release_pages
from calib.model import Batch, Call, Plan, call_model, observing
from calib.model.terms import LOGIT_BYTES
from calib.nn import Prefix, StatelessCache
from calib.recipe import Recipe

MASSIVE = 16.0  # a first token this many times larger than the largest of the others is an outlier of position


class PrefixBuilder:
    """Carries the prefix's own float hidden state through the blocks, collecting each layer's keys and values."""

    def __init__(self, model: nn.Module, tokens: Sequence[int]) -> None:
        self.tokens = [int(t) for t in tokens]
        config = model.config.get_text_config()  # type: ignore[union-attr,operator]
        self.keys: list[Tensor | None] = [None] * config.num_hidden_layers
        self.values: list[Tensor | None] = [None] * config.num_hidden_layers
        self.cache = StatelessCache(self.keys, self.values, len(self.tokens))
        self.ids = torch.tensor([self.tokens])

    def take(self, layer: int, block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
        """Run the (float) block on the prefix's hidden state, keep the keys and values it writes, return its output."""
        cache = DynamicCache()
        order = list(inspect.signature(block.forward).parameters)
        known = [name for name in ("layer_past", "past_key_values") if name in call.kwargs or name in order]
        out = call.giving((known or ["past_key_values"])[0], cache, order).run(block, hidden)
        written: Any = cache.layers[layer]
        self.keys[layer], self.values[layer] = written.keys, written.values
        return out.to(hidden.dtype)

    def settle(self, layer: int, dtype: torch.dtype) -> None:
        """Hold a layer's keys and values as the finished block runs on them."""
        key, value = self.keys[layer], self.values[layer]
        assert key is not None and value is not None
        self.keys[layer], self.values[layer] = key.to(dtype), value.to(dtype)

    def placeholder(self) -> Prefix:
        """A Prefix without keys and values: installed during calibration, so that positions and masks are moved."""
        return Prefix(self.tokens, 0, 1, 1, torch.float32)

    def build(self) -> Prefix:
        assert all(k is not None for k in self.keys) and all(v is not None for v in self.values)
        return Prefix.from_tensors(
            self.tokens, [k for k in self.keys if k is not None], [v for v in self.values if v is not None]
        )


def supports_prefix(model: nn.Module) -> bool:
    """True for causal decoders with a transformers key-value cache, one entry a layer, of equal shapes."""
    config = getattr(model, "config", None)
    if config is None or config.is_encoder_decoder or not hasattr(model, "generate"):
        return False
    layer_types = getattr(config.get_text_config(), "layer_types", None) or []
    return bool(getattr(config, "use_cache", False)) and not any("sliding" in t or "linear" in t for t in layer_types)


def choose_prefix(
    model: nn.Module, plan: Plan, recipe: Recipe, batch: Batch, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[tuple[int, ...], str]:
    """The prefix tokens (none: empty) and a line that says why."""
    if recipe.prefix == "none":
        return (), ""
    if isinstance(recipe.prefix, tuple):
        if not supports_prefix(model):
            raise InputError(
                f"{type(model).__name__} cannot take prefix tokens",
                "use --prefix none; only full-attention decoders can",
            )
        return recipe.prefix, f"prefix: tokens {list(recipe.prefix)}, as asked"
    if not (recipe.scheme.static or recipe.prefix == "on") or not supports_prefix(model):
        return (), ""
    ratio, where = first_token_ratio(model, plan, batch)
    if ratio < MASSIVE:
        return (), f"prefix: none, the first token is at most {ratio:.1f} times the others ({where})"
    candidates = _candidates(model, tokenizer)
    if not candidates:
        return (), f"prefix: none, no candidate token (first token is {ratio:.0f} times the others at {where})"
    release_pages()
    losses = _losses_after(model, candidates, batch)
    token = candidates[losses.index(min(losses))]
    shown = "" if tokenizer is None else f" {tokenizer.decode([token])!r}"
    return (token,), f"prefix: token {token}{shown}, since the first token is {ratio:.0f} times the others at {where}"


def first_token_ratio(model: nn.Module, plan: Plan, batch: Batch) -> tuple[float, str]:
    """How much larger the first token is than every other, at the site where it is worst."""
    worst, where = 0.0, ""

    def take(name: str, x: Tensor) -> None:
        nonlocal worst, where
        if x.dim() != 3 or x.shape[1] < 2:
            return
        size = x.abs().amax(-1)
        ratio = float((size[:, 0] / size[:, 1:].amax(1).clamp(min=1e-9)).median())
        if ratio > worst:
            worst, where = ratio, name

    modules = {name: model.get_submodule(name) for name in plan.quantized()}
    with observing(modules, take), torch.no_grad(), _last_logits_only(model.get_output_embeddings()):  # type: ignore[operator]
        call_model(model, batch)
    return worst, where


def _candidates(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    ids: list[Any] = [getattr(config, "bos_token_id", None), getattr(config, "eos_token_id", None)]
    if tokenizer is not None:
        ids += [tokenizer.bos_token_id]
        for text in ("\n", "."):
            encoded = tokenizer.encode(text, add_special_tokens=False)
            ids += encoded if len(encoded) == 1 else []
    flat = [i for item in ids for i in (item if isinstance(item, list) else [item])]
    return list(dict.fromkeys(int(i) for i in flat if i is not None and 0 <= i < config.vocab_size))


def _losses_after(model: nn.Module, tokens: Sequence[int], batch: Batch) -> list[float]:
    """Next-token loss of the float model on the batch after each prefix token: all in one forward, one read of the
    weights. A cap or a scale that a model puts on its logits is left out: it ranks prefixes no differently."""
    ids = batch["input_ids"]
    with_prefix = torch.cat([torch.cat([torch.full_like(ids[:, :1], token), ids], dim=1) for token in tokens])
    head = model.get_output_embeddings()  # type: ignore[operator]
    with torch.no_grad(), _last_logits_only(head) as hidden:
        call_model(model, {"input_ids": with_prefix})
        release_pages()  # the blocks' free memory would lie under the logits
        before = hidden[0][:, 1:-1].flatten(0, 1)
        wanted = ids[:, 1:].repeat(len(tokens), 1).flatten()
        at_once = max(1, LOGIT_BYTES // (4 * model.config.get_text_config().vocab_size))  # type: ignore[union-attr,operator]
        parts = zip(before.split(at_once), wanted.split(at_once), strict=True)
        losses = [nn.functional.cross_entropy(head(x).float(), to, reduction="none") for x, to in parts]
    return [float(loss.mean()) for loss in torch.cat(losses).chunk(len(tokens))]


@contextlib.contextmanager
def _last_logits_only(head: nn.Module | None) -> Iterator[list[Tensor]]:
    """The head computes each sequence's last logits only, where it gets hidden states [batch, tokens, width]; they come
    in the list. A vocabulary's logits of every token are larger than a small model."""
    taken: list[Tensor] = []

    def cut(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].dim() != 3 or args[0].shape[1] == 1:
            return None
        taken.append(args[0])
        return (args[0][:, -1:], *args[1:])

    hook = None if head is None else head.register_forward_pre_hook(cut)
    try:
        yield taken
    finally:
        if hook is not None:
            hook.remove()
