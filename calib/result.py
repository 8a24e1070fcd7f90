"""What a run gives back, and how it becomes a folder."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from calib.data import TokenData
from calib.engine import Journal
from calib.errors import CalibError, InputError
from calib.evaluate import peak_rss_mib
from calib.export import checkpoint, compressed, targets
from calib.export.files import MANIFEST
from calib.export.load import load
from calib.export.streamed import Shards
from calib.export.streamed import write as write_streamed
from calib.export.targets import Format
from calib.export.verify import reference_batch, reference_of, verify
from calib.model import Plan, Resident
from calib.recipe import Recipe
from calib.report import page, record
from calib.report import write as write_report
from calib.tuning import TuneRecipe


@dataclass
class Outcome:
    """A model made, and what was said of it."""

    network: nn.Module
    tokenizer: Any
    report: dict[str, Any]
    seconds: dict[str, float]
    data: TokenData
    out: Path | None = None
    peak_rss_mib: float | None = None

    @property
    def model(self) -> nn.Module:
        return self.network

    def save(
        self,
        out: str | os.PathLike[str],
        format: Format = "auto",
        *,
        overwrite: bool = False,
        verified: bool = True,
    ) -> Path:
        """Write the checkpoint; ``auto`` is compressed-tensors where it can express the model, else calib's.

        The folder is reloaded in a fresh process, whose logits must match (``verified``), before it takes its
        place: what lies at ``out`` is finished. Raises OutputError, VerifyError.
        """
        model = self.model
        chosen = self._choose(format, compressed.expressible(model) if format in ("auto", compressed.FORMAT) else ())
        finish = self._finisher(model, chosen, verified)
        self.out = targets.save(
            model, self.tokenizer, out, chosen, manifest=self._manifest(), overwrite=overwrite, finish=finish
        )
        return self.out

    def _choose(self, format: Format, reasons: Sequence[str]) -> str:
        chosen = format if format != "auto" else ("calib" if reasons else compressed.FORMAT)
        if format == "auto" and reasons:
            self.report["format"] = f"calib: compressed-tensors cannot express {'; '.join(reasons)}"
        else:
            self.report["format"] = chosen
        return chosen

    def _manifest(self) -> dict[str, Any]:
        """What is noted of how it was made."""
        raise NotImplementedError

    def _drawn(self) -> dict[str, Any]:
        return {"source": self.data.source, "fingerprint": self.data.fingerprint, "tokens": self.data.tokens}

    def _write_report(self, stage: Path) -> None:
        """For readers, beside the checkpoint."""

    def _finisher(self, model: nn.Module, format: str, verified: bool) -> Callable[[Path], dict[str, Any]]:
        """What verifies a written folder against the model and adds report and times to its manifest."""
        start = time.perf_counter()
        before = self.seconds.get("total", 0.0)
        inputs = reference_batch(self.data[0])
        reference = reference_of(model, inputs, format)
        self.report.pop("verify", None)

        def finish(stage: Path) -> dict[str, Any]:
            written = time.perf_counter()
            self.seconds["save"] = written - start
            if verified:
                self.report["verify"] = verify(stage, reference, inputs).as_dict()
                self.seconds["verify"] = time.perf_counter() - written
            self.seconds["total"] = before + time.perf_counter() - start
            self.peak_rss_mib = peak_rss_mib()
            self._write_report(stage)
            return {"report": self.report, "seconds": self.seconds, "peak_rss_mib": self.peak_rss_mib}

        return finish


@dataclass(kw_only=True)
class Result(Outcome):
    """What ``quantize`` gives: the plan, the report, the model.

    ``model`` gives the bits that the packed checkpoint gives on integer kernels. Where the weights were streamed it
    is loaded from ``out`` when first asked for.
    """

    recipe: Recipe
    plan: Plan
    about: dict[str, Any] = field(default_factory=dict)  # the float model; empty: no report was asked for
    source: dict[str, str] | str = "given in memory"  # of the float model: sha256 by file, or the hub's name
    pictures: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        if self.out is not None and any(p.device.type == "meta" for p in self.network.parameters()):
            self.network = load(self.out, mode="fake")
        return self.network

    def report_json(self, folder: Path | None = None) -> dict[str, Any]:
        """All that a reader is told, as JSON values (calib.report.record). folder: where the checkpoint is, if not yet
        at ``out``. Raises InputError where the run was told to make no report."""
        if not self.about:
            raise InputError("this run was made without a report", "quantize with report=True")
        place = self.out if folder is None else folder
        files = [] if place is None else [file for file in place.iterdir() if file.suffix == ".safetensors"]
        manifest = {} if place is None else json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        return record(
            about=self.about,
            recipe=self.recipe.model_dump(mode="json"),
            plan=self.plan,
            report=self.report,
            pictures=self.pictures,
            seconds=self.seconds,
            data={**self._drawn(), "rows": self.data.rows},
            peak_rss_mib=self.peak_rss_mib,
            versions=checkpoint.versions(),
            disk_bytes=sum(file.stat().st_size for file in files if file.name in manifest["sha256"]) or None,
            sha256=manifest.get("sha256"),
        )

    def report_html(self) -> str:
        """The report as one self-contained page."""
        return page(self.report_json())

    def publish(
        self,
        journal: Journal,
        shards: Shards,
        store: Resident,
        out: Path,
        format: Format,
        overwrite: bool,
        verified: bool,
    ) -> None:
        """Make the journal the checkpoint at ``out``: as ``save``, but the blocks are written already."""
        model = checkpoint.require_transformers(self.network)
        chosen = self._choose(
            format, compressed.expressible(model, store) if format in ("auto", compressed.FORMAT) else ()
        )
        write = partial(write_streamed, journal, shards, model, store, self.tokenizer)
        if chosen in targets.STREAMED:
            finish = self._finisher(model, chosen, verified)
            self.out = write(out, format=chosen, manifest=self._manifest(), overwrite=overwrite, finish=finish)
            return
        own = out.with_name(f"{out.name}-calib")  # finished before anything else can go wrong
        finish = self._finisher(model, checkpoint.FORMAT, verified)
        write(own, format=checkpoint.FORMAT, manifest=self._manifest(), overwrite=overwrite, finish=finish)
        self.network = load(own, mode="fake")
        try:
            self.save(out, format, overwrite=overwrite, verified=verified)
        except CalibError as error:
            raise type(error)(error.cause, f"{error.fix}; what was computed is in {own}") from error
        shutil.rmtree(own)

    def _manifest(self) -> dict[str, Any]:
        made = {"recipe": self.recipe.model_dump(mode="json"), "plan": self.plan.summary(), "data": self._drawn()}
        return {"model": self.source, **made}

    def _write_report(self, stage: Path) -> None:
        if self.about:
            write_report(stage, self.report_json(stage))


@dataclass(kw_only=True)
class Tuned(Outcome):
    """What ``tune`` gives: the model, in its report the loss before every step, and how the model it began with was
    made.
    """

    recipe: TuneRecipe
    origin: dict[str, Any]

    def _manifest(self) -> dict[str, Any]:
        return {**self.origin, "tuning": self.recipe.model_dump(mode="json"), "tuning_data": self._drawn()}
