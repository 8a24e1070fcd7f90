"""Tiny random models of every architecture family calib is held to, with norm gains drawn at random."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as t
from torch import Tensor
from transformers import PreTrainedModel

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 96}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**COMMON, **GROUPED)),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=128,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=128,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
        )
    ),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)),
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**COMMON, intermediate_size=128)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**COMMON, intermediate_size=128)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**COMMON, **GROUPED, head_dim=16)),
    "gemma2": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(**COMMON, **GROUPED, head_dim=16, sliding_window=16, query_pre_attn_scalar=16)
    ),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**COMMON, **GROUPED, pad_token_id=0)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**COMMON, **GROUPED, num_local_experts=4)),
    "bart": lambda: t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=128,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_position_embeddings=64,
        )
    ),
}

HEARS = t.WhisperConfig(
    vocab_size=128,
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    num_mel_bins=16,
    max_source_positions=50,
    max_target_positions=40,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode whose norms have random gains and biases, and whose linears are of useful size."""
    torch.manual_seed(seed)
    model = t.WhisperForConditionalGeneration(HEARS) if name == "whisper" else FAMILIES[name]()
    model.eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                centre = 1.0 if key.endswith("weight") and name != "gemma2" else 0.0
                parameter.copy_(torch.randn_like(parameter) * 0.3 + centre)
            elif "embed" not in key:
                parameter.mul_(4.0)  # default inits are so small that blocks would hardly change the residual
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def batches(name: str, count: int = 2, rows: int = 4, length: int = 24, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        ids = torch.randint(3, 128, (rows, length), generator=generator)
        if name == "whisper":
            features = torch.randn(rows, 16, 100, generator=generator)
            out.append({"input_features": features, "decoder_input_ids": ids})
            continue
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if name == "bart":
            batch["decoder_input_ids"] = ids.flip(1)
        out.append(batch)
    return out


def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**batch).logits
    assert isinstance(out, Tensor)
    return out
