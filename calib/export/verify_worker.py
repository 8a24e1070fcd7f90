"""Run in a fresh process, by file path: load a checkpoint with its own loader, answer a stored batch, save
the answer.

usage: verify_worker.py FOLDER BATCH.safetensors OUT.safetensors [ROOT]. With ROOT, calib is imported from
there first, and the integer kernels are compared with the float arithmetic as well; without it, calib must
not be needed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder: its neighbours are not top-level modules
    folder, batch_file, out_file, *root = sys.argv[1:]
    if root:
        sys.path.insert(0, root[0])
        os.environ["CALIB_MODE"] = "fake"
        from calib.export import hf, kernel_check

        hf.register()

    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    architecture = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder)
    stored = load_file(batch_file)
    inputs = {k.removeprefix("input."): v for k, v in stored.items() if k.startswith("input.")}

    def answer() -> Any:
        with torch.no_grad():
            output = model(**inputs)
        return (output.logits if "logits" in output else output.last_hidden_state).float().contiguous()

    answers = {}
    if root:
        with kernel_check.comparing(model) as differences:
            answers["logits"] = answer()
        answers["kernels"] = torch.tensor([max(differences.values(), default=0.0)], dtype=torch.float64)
        if float(answers["kernels"]):
            hf.set_mode(model, "packed")
            answers["packed"] = answer()
        else:  # every linear gave the same bits on the same inputs, so the model does
            answers["packed"] = answers["logits"].clone()
    else:
        answers["logits"] = answer()
        assert "calib" not in sys.modules
    save_file(answers, out_file)
