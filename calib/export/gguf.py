"""GGUF (llama.cpp and its kin): Q8_0, Q4_0 and Q4_1 blocks of 32 weights, for architectures that both sides know.

A block is 32 inputs of one output: Q8_0 an fp16 d and 32 int8, value d q; Q4_0 d and 16 bytes, byte j holding value j
low and j + 16 high, value d (q - 8); Q4_1 d, an fp16 m and the same bytes, value d q + m. Names come from the gguf
package, config keys from transformers' own reader; what its config cannot say is refused by asking it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from calib.errors import OutputError
from calib.export.checkpoint import require_transformers, state, stored, write_rest
from calib.export.compressed import stock_config, zero_bias
from calib.export.files import Finish, finished, nbytes, staged
from calib.export.gguf_tokenizer import add_tokenizer
from calib.export.weight_only import Grid, grid_of, integer_reasons, reasons_for
from calib.export.weight_only import refusals as common_refusals
from calib.files import sha256
from calib.nn import QuantLinear
from calib.quantizers import AnyWeight
from calib.recipe import Recipe

FORMAT = "gguf"
FILE = "model.gguf"
BLOCK = 32
ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gpt2", "bloom")
UNREAD = {
    "architectures",
    "dtype",
    "quantization_config",
    "transformers_version",
    "use_cache",
    "initializer_range",
    "pretraining_tp",
}
SILENT = ("dropout", "pdrop", "token_id", "summary_", "label", "_name")  # config entries that no answer depends on


def refusals(recipe: Recipe) -> list[str]:
    """Why a recipe's result will not be `expressible`, as far as it says."""
    return common_refusals(recipe, _format_reasons)


def _format_reasons(weights: AnyWeight) -> list[str]:
    reasons = integer_reasons(weights, (4, 8))
    if not reasons and not weights.symmetric and weights.bits > 4:
        reasons.append(f"{weights.bits}-bit weights with zero points")
    group = weights.group_size
    if group is not None and group % BLOCK:
        reasons.append(f"groups of {group}: blocks are of {BLOCK}")
    return reasons


def unsuited(model: nn.Module, rewrites: Sequence[Mapping[str, str]]) -> list[str]:
    """What is known of an architecture before it is quantized."""
    del rewrites  # GGUF has linears for all of them
    config: Any = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", None))
    if kind not in ARCHITECTURES:
        return [f"calib knows no GGUF form of {kind}"]
    lost = _lost(config)
    return [f"its readers do not learn {', '.join(lost)} of a {kind}"] if lost else []


def expressible(model: nn.Module) -> list[str]:
    """Why GGUF cannot hold this model; empty where it can."""
    if unknown := unsuited(model, ()):
        return unknown
    reasons = reasons_for(model, _linear_reasons, rewritten=True)
    if reasons:
        return reasons
    stock = require_transformers(model)
    try:
        config, extra = stock_config(stock)
    except OutputError as error:
        return [error.cause]
    lost = _lost(config)
    if lost:
        reasons.append(f"its readers do not learn {', '.join(lost)} of a {config.model_type}")
    name_of = _names(config.model_type, config.num_hidden_layers)
    unnamed = [key for key in {**stored(stock), **extra} if not name_of(_plain_name(key))]
    return reasons + [f"it has no name for {key}" for key in unnamed[:1]]


def _linear_reasons(module: QuantLinear) -> list[str]:
    reasons = _format_reasons(module.weight_spec)
    if module.in_features % BLOCK:
        reasons.append(f"{module.in_features} inputs are not blocks of {BLOCK}")
    return reasons


def _lost(config: Any) -> list[str]:
    """Config entries that differ in a config rebuilt from what transformers' reader takes from the file."""
    read = {name: _entry(config, name) for name in _entries(config).values()}
    rebuilt = type(config)(**read, tie_word_embeddings=config.tie_word_embeddings).to_dict()
    return sorted(
        key
        for key, value in config.to_dict().items()
        if rebuilt.get(key) != value and key not in UNREAD and not any(part in key for part in SILENT)
    )


def _entries(config: Any) -> dict[str, str]:
    """GGUF's key -> the config's, of what transformers' reader takes."""
    table: Any = GGUF_CONFIG_MAPPING
    return {key: name for key, name in table[config.model_type].items() if name}


def _entry(config: Any, name: str) -> Any:
    if name == "rope_theta":
        return config.rope_parameters["rope_theta"]
    if config.model_type == "gpt2":  # two that its config has under other names
        other = {"n_ctx": config.n_positions, "feed_forward_length": config.n_inner or 4 * config.n_embd}
        return other[name] if name in other else getattr(config, name)
    return getattr(config, name)


def _names(kind: str, blocks: int) -> Callable[[str], str | None]:
    """transformers' parameter name -> GGUF's; None where it has none."""
    import gguf

    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == kind)
    table = gguf.get_tensor_name_map(architecture, blocks)

    def name_of(key: str) -> str | None:
        base, _, leaf = key.rpartition(".")
        while base:  # some are known from the headless class
            if (found := table.get_name(base)) is not None:
                return f"{found}.{leaf}"
            base = base.partition(".")[2]
        return None

    return name_of


def _plain_name(key: str) -> str:
    """A quantized linear's buffers stand for its weight."""
    base, _, leaf = key.rpartition(".")
    return f"{base}.weight" if leaf.startswith("weight") else key


def _order(name: str, config: Any) -> Callable[[Tensor], Tensor]:
    """The rows of a tensor in GGUF's order: rotary halves interleaved in llama, q, k and v apart in bloom."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    module = name.split(".")[-2]
    if config.model_type == "llama" and module in heads:
        return lambda t: t.unflatten(0, (heads[module], 2, -1)).transpose(1, 2).flatten(0, 2)
    if config.model_type == "bloom" and module == "query_key_value":
        return lambda t: t.unflatten(0, (config.n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
    return lambda t: t


def blocks_of(grid: Grid, symmetric: bool) -> tuple[str, np.ndarray]:
    """The type's name and its blocks, uint8 [out, bytes a row]."""
    grid = grid.per(BLOCK)
    codes = grid.codes.unflatten(1, (-1, BLOCK))
    parts = [grid.scale.unsqueeze(-1)]
    if grid.bits == 8:
        kind, octets = "Q8_0", codes
    else:
        kind = "Q4_0" if symmetric else "Q4_1"
        if not symmetric:
            parts.append((-grid.scale.float() * (grid.zero.float() + 8)).to(torch.float16).unsqueeze(-1))
        nibbles = (codes + 8).view(torch.uint8)
        octets = nibbles[..., : BLOCK // 2] | nibbles[..., BLOCK // 2 :] << 4
    row = torch.cat([*(part.view(torch.uint8) for part in parts), octets.contiguous().view(torch.uint8)], dim=-1)
    return kind, row.flatten(1).contiguous().numpy()


def save(
    model: nn.Module,
    tokenizer: Any,
    out: str | Path,
    *,
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    finish: Finish | None = None,
) -> Path:
    """Write ``model.gguf`` with config and tokenizer beside it, as safely as checkpoint.save; for an `expressible`
    model. What is float stays in its dtype, vectors in fp32.
    """
    import gguf

    stock = require_transformers(model)
    config, zero_biases = stock_config(stock)
    tensors = state(stock) | {name: zero_bias(stock, size) for name, size in zero_biases.items()}
    with staged(out, overwrite=overwrite, needed_bytes=nbytes(tensors)) as stage:
        writer = gguf.GGUFWriter(stage / FILE, config.model_type)
        _add_config(writer, config)
        vocabulary = add_tokenizer(writer, tokenizer, config.vocab_size)
        _add_tensors(writer, stock, config, tensors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        about = {**manifest, "format": FORMAT, "vocabulary": vocabulary}
        write_rest(stage, stock, config, tokenizer, about, {FILE: sha256(stage / FILE)})
        finished(stage, out, finish)
    return Path(out).expanduser().absolute()


def _add_config(writer: Any, config: Any) -> None:
    writer.add_name(config.model_type)
    values = {key: _entry(config, name) for key, name in _entries(config).items()}
    if (head := getattr(config, "head_dim", None)) is not None:
        values |= {"attention.key_length": head, "attention.value_length": head}
    values.setdefault("vocab_size", config.vocab_size)  # llama.cpp needs it, and of bloom two more
    if config.model_type == "bloom":
        values |= {"context_length": getattr(config, "seq_length", 2048), "feed_forward_length": 4 * config.hidden_size}
    if config.model_type == "gemma2":
        values["attn_logit_softcapping"] = config.attn_logit_softcapping
        values["final_logit_softcapping"] = config.final_logit_softcapping
    special = {"bos": config.bos_token_id, "eos": config.eos_token_id, "padding": config.pad_token_id}
    for name, token in special.items():
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    for key, value in values.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{config.model_type}.{key}", value)


def _add_tensors(writer: Any, model: PreTrainedModel, config: Any, tensors: dict[str, Tensor]) -> None:
    import gguf

    name_of = _names(config.model_type, config.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            grid, key = grid_of(module), f"{name}.weight"
            for buffer in module.state_dict():
                if buffer != "bias":
                    del tensors[f"{name}.{buffer}"]
            order = _order(key, config)
            grid = Grid(order(grid.codes), order(grid.scale), order(grid.zero))
            kind, data = blocks_of(grid, module.weight_spec.symmetric)
            writer.add_tensor(name_of(key), data, raw_dtype=gguf.GGMLQuantizationType[kind])
    for key, tensor in tensors.items():
        tensor = _order(key, config)(tensor).float()
        if config.model_type == "gemma2" and key.endswith("norm.weight"):
            tensor = tensor + 1
        form = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(config.dtype, "F32") if tensor.dim() > 1 else "F32"
        number = gguf.GGMLQuantizationType[form]
        writer.add_tensor(name_of(key), gguf.quantize(tensor.contiguous().numpy(), number), raw_dtype=number)
