"""AutoRound, 50 iterations. Runs in an environment of its own, without calib."""

from __future__ import annotations

from typing import Any

from auto_round import AutoRound
from judge import main

ITERATIONS = 50


def quantize(model: Any, tokenizer: Any, calibration: Any, scheme: str, arm: str) -> Any:
    bits, _, inputs = scheme.removeprefix("w").partition("a")
    if inputs != "16":
        raise SystemExit(f"AutoRound is run on weight-only schemes, not {scheme}")
    tuner = AutoRound(
        model,
        tokenizer,
        bits=int(bits),
        group_size=64,
        sym=True,
        iters=ITERATIONS,
        nsamples=len(calibration),
        seqlen=calibration.shape[1],
        batch_size=8,
        dataset=[row[None] for row in calibration],
        device_map="cpu",
        amp=False,
    )
    found, _ = tuner.quantize()
    return found


if __name__ == "__main__":
    main("auto-round", quantize)
