"""torchao: int8 weights and dynamic int8 inputs; grouped int4 weights. Runs without calib."""

from __future__ import annotations

from typing import Any

import torch
from judge import main
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup


def quantize(model: Any, tokenizer: Any, calibration: Any, scheme: str, arm: str) -> Any:
    configs = {
        "w8a8": Int8DynamicActivationInt8WeightConfig(),
        "w4a16": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)),
        "w3a16": IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(64)),
    }
    if scheme not in configs:
        raise SystemExit(f"torchao has no {scheme} that runs on a CPU")
    linear = torch.nn.Linear
    quantize_(model, configs[scheme], lambda module, name: isinstance(module, linear) and name != "lm_head")
    return model


if __name__ == "__main__":
    main("torchao", quantize)
