"""What a run gives back, and how it becomes a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from calib.data import TokenData
from calib.engine import Journal
from calib.evaluate import peak_rss_mib
from calib.export import checkpoint, compressed, dense
from calib.export.hf import set_mode
from calib.export.load import load
from calib.export.streamed import Shards
from calib.export.streamed import write as write_streamed
from calib.export.verify import answer, reference_batch, verify
from calib.model import Plan, Resident
from calib.recipe import Recipe
from calib.tuning import TuneRecipe

Format = Literal["auto", "calib", "compressed-tensors", "dense"]


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
        writer = {compressed.FORMAT: compressed, dense.FORMAT: dense}.get(chosen, checkpoint)
        finish = self._finisher(model, chosen, verified)
        self.out = writer.save(
            model, self.tokenizer, Path(out), manifest=self._manifest(), overwrite=overwrite, finish=finish
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

    def _finisher(self, model: nn.Module, format: str, verified: bool) -> Callable[[Path], dict[str, Any]]:
        """What verifies a written folder against the model and adds report and times to its manifest."""
        start = time.perf_counter()
        before = self.seconds.get("total", 0.0)
        inputs = reference_batch(self.data[0])
        # other programs simulate in floats: what they are held against has to as well
        set_mode(model, "float" if format == compressed.FORMAT else "fake")
        reference = answer(model, inputs)
        set_mode(model, "fake")
        self.report.pop("verify", None)

        def finish(stage: Path) -> dict[str, Any]:
            written = time.perf_counter()
            self.seconds["save"] = written - start
            if verified:
                self.report["verify"] = verify(stage, reference, inputs).as_dict()
                self.seconds["verify"] = time.perf_counter() - written
            self.seconds["total"] = before + time.perf_counter() - start
            self.peak_rss_mib = peak_rss_mib()
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

    @property
    def model(self) -> nn.Module:
        if self.out is not None and any(p.device.type == "meta" for p in self.network.parameters()):
            self.network = load(self.out, mode="fake")
        return self.network

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
        self.out = write_streamed(
            journal,
            shards,
            model,
            store,
            self.tokenizer,
            out,
            format=chosen,
            manifest=self._manifest(),
            overwrite=overwrite,
            finish=self._finisher(model, chosen, verified),
        )

    def _manifest(self) -> dict[str, Any]:
        return {"recipe": self.recipe.model_dump(mode="json"), "plan": self.plan.summary(), "data": self._drawn()}


@dataclass(kw_only=True)
class Tuned(Outcome):
    """What ``tune`` gives: the model, in its report the loss before every step, and how the model it began with was
    made.
    """

    recipe: TuneRecipe
    origin: dict[str, Any]

    def _manifest(self) -> dict[str, Any]:
        return {**self.origin, "tuning": self.recipe.model_dump(mode="json"), "tuning_data": self._drawn()}
