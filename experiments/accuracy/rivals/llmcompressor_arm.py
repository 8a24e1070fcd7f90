"""LLM Compressor: round to nearest, GPTQ, SmoothQuant. Runs in an environment of its own, without calib."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from judge import main
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier


def groups(scheme: str) -> dict[str, Any]:
    """compressed-tensors' config of one of our schemes."""
    bits, _, inputs = scheme.partition("-static")[0].removeprefix("w").partition("a")
    weights: dict[str, Any] = {"num_bits": int(bits), "type": "int", "symmetric": True, "strategy": "channel"}
    if inputs == "16":
        weights |= {"strategy": "group", "group_size": 64}
        return {"group_0": {"targets": ["Linear"], "weights": weights}}
    given: dict[str, Any] = {"num_bits": int(inputs), "type": "int", "symmetric": False}
    static = scheme.endswith("-static")
    given |= {"strategy": "tensor", "dynamic": False} if static else {"strategy": "token", "dynamic": True}
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": given}}


def quantize(model: Any, tokenizer: Any, calibration: Any, scheme: str, arm: str) -> Any:
    rounding = GPTQModifier if arm.endswith("gptq") else QuantizationModifier
    recipe: list[Any] = [rounding(config_groups=groups(scheme), ignore=["lm_head"])]
    if arm.startswith("smoothquant"):
        recipe.insert(0, SmoothQuantModifier(smoothing_strength=0.8))
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in calibration.tolist()]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=calibration.shape[1],
        num_calibration_samples=len(rows),
    )
    return model


if __name__ == "__main__":
    main("llmcompressor", quantize)
