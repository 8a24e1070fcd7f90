"""The end of every export: reload in a fresh process with the target's own loader and compare logits."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calib.errors import CalibError, InputError, ModelError, VerifyError
from calib.export.files import MANIFEST, Finish, made_of, read_manifest, writing
from calib.export.hf import set_mode
from calib.export.load import check_folder
from calib.files import is_file_name, sha256

REFERENCE = Path("verify") / "reference.safetensors"  # in a folder of its own: loaders read every top-level safetensors
ROWS, TOKENS, TAIL = 2, 64, 16
STORED_LOGITS = 1 << 20  # past this many, only the last TAIL positions are kept
TOLERANCE = {"float32": 1e-3, "float64": 1e-3, "float16": 5e-3, "bfloat16": 3e-2}  # of the logit range
KERNEL_TOLERANCE = {
    "float32": 1e-4,
    "float64": 1e-4,
    "float16": 5e-3,
    "bfloat16": 3e-2,
}  # of a linear's largest output
FORMAT_TOLERANCE = {
    "gptq": 5e-3,  # scales are rounded to fp16
    "awq": 5e-3,
    "gguf": 5e-3,
    "onnx": 2e-2,  # norms and softmax are summed in another order, and a code next to a boundary flips
}


@dataclass(frozen=True)
class VerifyReport:
    """max_difference: largest |logit - reference| over the reference's range. top1: share of equal arg max.

    Of calib's own format the fresh process runs the arithmetic that defines the reference, from the packed file,
    for these; kernel_difference holds each kernel of this machine against it on the same inputs (see
    kernel_check.py), and packed_* are the logits of the whole model as ``calib.load`` runs it. Where every kernel
    gives the same bits, as on CPUs with VNNI, those must agree as well.
    """

    max_difference: float
    tolerance: float
    top1: float
    positions: int
    loader: str
    seconds: float
    kernel_difference: float | None = None
    packed_difference: float | None = None
    packed_top1: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        text = (
            f"verified: a fresh process ({self.loader}) answers within {self.max_difference:.1e} of the "
            f"logit range, equal top-1 at {self.top1:.1%} of {self.positions} positions"
        )
        if self.kernel_difference is None:
            return text
        return (
            f"{text}; on this machine's kernels within {self.packed_difference:.1e}, top-1 {self.packed_top1:.1%} "
            f"(linear by linear within {self.kernel_difference:.1e})"
        )


def reference_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The small batch that a checkpoint is verified on: the first 2 rows and 64 tokens of a calibration
    batch; features [B, mel, T] whole, for models take them in one length.
    """
    return {
        key: (value[:ROWS, :TOKENS] if value.dim() == 2 else value[:ROWS]).contiguous()
        for key, value in batch.items()
        if value.dim() == 2 or key == "input_features"
    }


def answer(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What is compared: the logits, or the last hidden states of a model without a head. fp32."""
    with torch.no_grad():
        output = model(**inputs)
    result = output.logits if "logits" in output else output.last_hidden_state
    assert isinstance(result, Tensor)
    return result.float()


def reference_of(model: nn.Module, inputs: Mapping[str, Tensor], format: str) -> Tensor:
    """What a written model is held against: its answers, simulated as the format's programs compute."""
    mode = "fake" if format in ("calib", "onnx") else "float"  # integers and a rescale, or products of floats
    answers = answer(set_mode(model, mode), inputs)
    set_mode(model, "fake")
    return answers


def verify(
    out: str | Path,
    reference: Tensor | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    tolerance: float | None = None,
) -> VerifyReport:
    """Compare what ``out`` answers in a fresh process with ``reference``, the logits of the model it was
    written from.

    With reference and inputs they are stored in the folder first, so that a later call needs neither. Raises
    VerifyError where the largest difference exceeds ``tolerance`` (default by dtype: 1e-3 of the logit range
    in fp32), or where a weight file, or what the manifest says of model, data and recipe, is not what was written;
    ModelError where the folder cannot be
    read.
    """
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"a tolerance of {tolerance} is none", "give 0 or more, of the logit range")
    folder = Path(out).expanduser().absolute()
    if reference is not None and inputs is not None:
        store_reference(folder, reference, inputs)
    report = verify_all([folder], tolerance=tolerance)[folder]
    if isinstance(report, CalibError):
        raise report
    return report


def verifying(reference: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Finish, list[VerifyReport]]:
    """What a writer calls with its complete folder before it takes its place, and the list that then has the report."""
    reports: list[VerifyReport] = []

    def finish(stage: Path) -> dict[str, Any]:
        reports.append(verify(stage, reference, inputs))
        return {"report": {"verify": reports[0].as_dict()}}

    return finish, reports


def verify_all(folders: Iterable[Path], *, tolerance: float | None = None) -> dict[Path, VerifyReport | CalibError]:
    """``verify`` of folders that hold their reference, in one fresh process with calib and one without."""
    found: dict[Path, VerifyReport | CalibError] = {}
    wanted: dict[bool, list[_Wanted]] = {True: [], False: []}
    for folder in folders:
        try:
            each = _wanted(folder, tolerance)
            wanted[each.own].append(each)
        except CalibError as error:
            found[folder] = error
    for own, jobs in wanted.items():
        start = time.perf_counter()
        answers = _fresh_answers([each.folder for each in jobs], own) if jobs else {}
        for each in jobs:
            try:
                found[each.folder] = _judged(each, answers[each.folder], time.perf_counter() - start)
            except CalibError as error:
                found[each.folder] = error
    return found


@dataclass(frozen=True)
class _Wanted:
    """What a folder is held to."""

    folder: Path
    own: bool  # calib's own format
    dtype: str
    logits: Tensor
    tolerance: float


def _wanted(folder: Path, tolerance: float | None) -> _Wanted:
    config = check_folder(folder)
    _check_hashes(folder)
    file = folder / REFERENCE
    try:
        logits = load_file(file)["logits"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(
            f"{file} is missing or damaged", "only exports that were verified once can be again"
        ) from error
    own = (config.get("quantization_config") or {}).get("quant_method") == "calib"
    dtype = str(config.get("dtype"))
    allowed = max(TOLERANCE.get(dtype, 1e-3), FORMAT_TOLERANCE.get(_format(folder), 0.0))
    return _Wanted(folder, own, dtype, logits, allowed if tolerance is None else tolerance)


def _judged(wanted: _Wanted, answer: tuple[dict[str, Tensor], str] | VerifyError, seconds: float) -> VerifyReport:
    """The report of a folder's answers, or the VerifyError that they, or their absence, are."""
    if isinstance(answer, VerifyError):
        raise answer
    answers, loader = answer
    folder, limit = wanted.folder, wanted.tolerance
    difference, top1 = _compare(folder, answers["logits"], wanted.logits)
    report = VerifyReport(
        max_difference=difference,
        tolerance=limit,
        top1=top1,
        positions=wanted.logits[..., 0].numel(),
        loader=loader,
        seconds=seconds,
    )
    if not difference <= limit:
        raise VerifyError(
            f"{folder} differs from the model it was written from by {difference:.2e} of the logit range, "
            f"more than {limit:.0e} (equal top-1: {top1:.1%})",
            "report this as a bug",
        )
    if not wanted.own:
        return report
    kernels, allowed = float(answers["kernels"]), KERNEL_TOLERANCE.get(wanted.dtype, 1e-4)
    if not kernels <= allowed:
        raise VerifyError(
            f"an integer kernel of this machine differs from float arithmetic by {kernels:.2e} of a linear's "
            f"largest output, more than {allowed:.0e}",
            "load with mode='fake', and report this as a bug",
        )
    packed, packed_top1 = _compare(folder, answers["packed"], wanted.logits)
    if kernels == 0 and not packed <= limit:
        raise VerifyError(
            f"{folder} on integer kernels differs from the model it was written from by {packed:.2e} of the logit "
            f"range, more than {limit:.0e}, although each linear alone does not",
            "report this as a bug",
        )
    return replace(report, kernel_difference=kernels, packed_difference=packed, packed_top1=packed_top1)


def _compare(folder: Path, got: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Largest difference over the range of ``wanted``, share of equal arg max; of the last positions, if
    fewer are wanted.
    """
    if got.dim() == 3:
        got = got[:, -wanted.shape[1] :]
    if got.shape != wanted.shape:
        raise VerifyError(
            f"{folder} answers in shape {list(got.shape)}, not {list(wanted.shape)}", "export the model again"
        )
    span = max(float(wanted.max() - wanted.min()), 1e-12)
    return float((got - wanted).abs().max()) / span, float((got.argmax(-1) == wanted.argmax(-1)).float().mean())


def store_reference(folder: Path, reference: Tensor, inputs: Mapping[str, Tensor]) -> None:
    """Keep in a folder what `verify` will hold it to."""
    reference = reference.detach().float().cpu()
    if reference.dim() == 3 and reference.numel() > STORED_LOGITS:
        reference = reference[:, -TAIL:]
    tensors = {f"input.{key}": value.detach().cpu().contiguous() for key, value in inputs.items()}
    file = folder / REFERENCE
    with writing(file):
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(".part")
        save_file({**tensors, "logits": reference.contiguous()}, str(part))
        part.replace(file)


def _format(folder: Path) -> str:
    """The manifest's word for what the folder is; empty without a manifest."""
    return str(read_manifest(folder).get("format", ""))


def _check_hashes(folder: Path) -> None:
    file = folder / MANIFEST
    if not file.is_file():
        return
    manifest = read_manifest(folder)
    hashes, made = manifest.get("sha256"), manifest.get("made_of", {})
    if not isinstance(made, dict) or not isinstance(hashes, dict) or not all(map(is_file_name, hashes)):
        raise ModelError(f"{file} names no files of its folder with their sha256", "export the model again")
    for key, found in made_of(manifest).items():
        if made.get(key, found) != found:
            raise VerifyError(f"what {file} says of the {key} is not what was written", "export the model again")
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing", "export or copy the model again")
        if sha256(folder / name) != expected:
            raise VerifyError(
                f"{folder / name} is not the file that was written (sha256 differs)", "export the model again"
            )


def _fresh_answers(folders: Sequence[Path], own: bool) -> dict[Path, tuple[dict[str, Tensor], str] | VerifyError]:
    """Of each folder the answers of verify_worker.py, and what loaded it there."""
    worker = Path(__file__).with_name("verify_worker.py")
    with tempfile.TemporaryDirectory() as scratch:
        results = {folder: Path(scratch) / f"{number}.safetensors" for number, folder in enumerate(folders)}
        jobs = [str(path) for folder, result in results.items() for path in (folder, folder / REFERENCE, result)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        child = subprocess.run(
            [sys.executable, str(worker), str(Path(__file__).parents[2]) if own else "", *jobs],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        lines = [line for line in child.stderr.splitlines() if line.strip()] or [f"exit code {child.returncode}"]
        return {folder: _read(folder, result, lines[-1]) for folder, result in results.items()}


def _read(folder: Path, result: Path, otherwise: str) -> tuple[dict[str, Tensor], str] | VerifyError:
    if not result.is_file():
        error = result.with_suffix(".error")
        cause = error.read_text(encoding="utf-8") if error.is_file() else otherwise
        return VerifyError(f"{folder} does not load in a fresh process: {cause[:300]}", "export the model again")
    with safe_open(str(result), framework="pt") as file:
        answers = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return answers, file.metadata()["loader"]
