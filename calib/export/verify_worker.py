"""Run in a fresh process, by file path: load an export with its own loader, answer a stored batch, save the answer.

usage: verify_worker.py ROOT (FOLDER BATCH.safetensors OUT.safetensors)... With a ROOT, calib is imported from there
first, and the integer kernels are compared with the float arithmetic as well; with "" calib must not be needed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, whose modules bear the names of packages

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def transformers_model(folder: Path, config: dict[str, Any]) -> tuple[Any, str]:
    """The stock class and what loaded it."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, config["architectures"][0])
    if (folder / "model.gguf").is_file():
        return kind.from_pretrained(
            folder, gguf_file="model.gguf", dtype=config["dtype"]
        ), "transformers without calib, gguf_file"
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method in ("gptq", "awq") and importlib.util.find_spec("gptqmodel") is None:
        plain = transformers.AutoConfig.from_pretrained(folder)
        entry = plain.quantization_config
        del plain.quantization_config
        tensors = {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}
        for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
            parts = {k: tensors.pop(f"{name}.{k}", None) for k in ("qweight", "qzeros", "scales", "g_idx")}
            weight = decoded_gptq(parts, entry) if method == "gptq" else decoded_awq(parts)
            tensors[f"{name}.weight"] = weight.to(plain.dtype or torch.float32)
        model, info = kind.from_pretrained(None, config=plain, state_dict=tensors, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        return model, f"the {method} layout decoded by its definition, as gptqmodel is not installed"
    return kind.from_pretrained(
        folder
    ), "transformers with calib" if "calib" in sys.modules else "transformers without calib"


def decoded_gptq(parts: dict[str, Any], entry: dict[str, Any]) -> Tensor:
    """Weight [out, in]: scales[g_idx] (q - zero), zeros stored less one in version 1."""
    bits, first = entry["bits"], entry["checkpoint_format"] == "gptq"
    shifts = torch.arange(0, 32, bits)
    codes = (parts["qweight"].unsqueeze(1) >> shifts.view(1, -1, 1)) & (1 << bits) - 1  # [in / k, k, out]
    zeros = (parts["qzeros"].unsqueeze(2) >> shifts) & (1 << bits) - 1  # [groups, out / k, k]
    zeros = zeros.flatten(1) + int(first)
    group = parts["g_idx"].long()
    return (parts["scales"].float()[group] * (codes.flatten(0, 1) - zeros[group])).T.contiguous()


def decoded_awq(parts: dict[str, Any]) -> Tensor:
    """Weight [out, in]: scales (q - zero), nibbles of a word in AWQ's order."""

    def columns(words: Tensor) -> Tensor:
        nibbles = (words.unsqueeze(2) >> torch.arange(0, 32, 4)) & 15
        plain = torch.empty_like(nibbles)
        plain[..., AWQ_ORDER] = nibbles
        return plain.flatten(1)

    codes, zeros, scales = columns(parts["qweight"]), columns(parts["qzeros"]), parts["scales"].float()
    times = len(codes) // len(zeros)
    return ((codes - zeros.repeat_interleave(times, 0)) * scales.repeat_interleave(times, 0)).T.contiguous()


def transformers_answer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    answer: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return answer.float().contiguous()


def onnxruntime_answer(file: Path, inputs: dict[str, Tensor]) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float inputs stay float
    options.add_session_config_entry("session.x64quantprecision", "1")  # without VNNI sums of products saturate
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    taken = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
    return torch.from_numpy(session.run(None, taken)[0])


def main(folder: Path, batch: Path, out: Path, own: bool) -> None:
    if own:
        from calib.export import hf, kernel_check
    inputs = {k.removeprefix("input."): v for k, v in load_file(batch).items() if k.startswith("input.")}
    if (folder / "model.onnx").is_file():
        answers, loader = {"logits": onnxruntime_answer(folder / "model.onnx", inputs)}, "onnxruntime"
    else:
        model, loader = transformers_model(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")))
        if not own:
            answers = {"logits": transformers_answer(model, inputs)}
        else:
            with kernel_check.comparing(model) as differences:
                answers = {"logits": transformers_answer(model, inputs)}
            answers["kernels"] = torch.tensor([max(differences.values(), default=0.0)], dtype=torch.float64)
            if float(answers["kernels"]):
                hf.set_mode(model, "packed")
                answers["packed"] = transformers_answer(model, inputs)
            else:  # every linear gave the same bits on the same inputs, so the model does
                answers["packed"] = answers["logits"].clone()
    assert own or "calib" not in sys.modules
    save_file(answers, out, metadata={"loader": loader})


if __name__ == "__main__":
    root, *jobs = sys.argv[1:]
    if root:
        sys.path.insert(0, root)
        os.environ["CALIB_MODE"] = "fake"
        from calib.export import hf

        hf.register()
    for folder, batch, out in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
        try:
            main(Path(folder), Path(batch), Path(out), bool(root))
        except Exception as error:  # the others still get their answers
            Path(out).with_suffix(".error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
