"""What a recovery training is: its loss, what it trains, its steps. Validated data with named presets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from calib.errors import InputError

Trainable = Literal["scales", "norms", "factors", "all"]
TRAINABLE: tuple[Trainable, ...] = ("scales", "norms", "factors", "all")


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Terms(_Data):
    """Weights of a loss's terms, and their settings; see calib.tuning.losses.

    task: next tokens, or the data's labels. logits: ``dad`` at gamma (0: plain KD) and temperature. hidden, attention:
    mean squared differences. contrast: ``contrastive`` on each layer's pooled states at tau, hardness, focus.
    """

    task: float = Field(default=0.0, ge=0)
    logits: float = Field(default=0.0, ge=0)
    hidden: float = Field(default=0.0, ge=0)
    attention: float = Field(default=0.0, ge=0)
    contrast: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    gamma: float = Field(default=0.0, ge=0)
    tau: float = Field(default=0.1, gt=0)
    hardness: float | None = Field(default=None, gt=0)
    focus: float | None = Field(default=None, gt=0)

    @property
    def distils(self) -> bool:
        return any((self.logits, self.hidden, self.attention, self.contrast))


LOSSES: dict[str, Terms] = {
    "ce": Terms(task=1),
    "kd": Terms(logits=1),
    "dad": Terms(logits=1, gamma=1),
    "tbt": Terms(logits=1, hidden=1, attention=1),
    "ackd": Terms(task=1, logits=1, hidden=1, contrast=0.1, hardness=0.5, focus=0.5),
}


class TuneRecipe(_Data):
    """trainable: ``scales`` of weights and static inputs, codes held; ``norms``; float low-rank ``factors``; ``all``:
    these, latent weights behind the grids, biases, embeddings and head. steps: of ``accumulate`` batches each, on
    every process. lr: of its peak, after ``warmup`` of the steps; cosine decay to 0. every: steps between checkpoints.
    """

    trainable: tuple[Trainable, ...] = ("scales",)
    loss: Terms = LOSSES["kd"]
    steps: int = Field(default=200, ge=1)
    lr: float = Field(default=1e-4, gt=0)
    warmup: float = Field(default=0.03, ge=0, le=1)
    decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    accumulate: int = Field(default=1, ge=1)
    precision: Literal["no", "bf16"] = "no"
    checkpointing: bool = False
    every: int = Field(default=50, ge=1)
    samples: int = Field(default=128, ge=1)
    seq_len: int = Field(default=512, ge=2)
    batch_size: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("trainable")
    @classmethod
    def _something(cls, value: tuple[Trainable, ...]) -> tuple[Trainable, ...]:
        if not value:
            raise ValueError(f"nothing to train; choose from {', '.join(TRAINABLE)}")
        return value

    @field_validator("loss")
    @classmethod
    def _minimises(cls, value: Terms) -> Terms:
        if not (value.task or value.distils):
            raise ValueError(f"no term has a weight; choose from {', '.join(LOSSES)}")
        return value


# Learning rates, decay and warm-up as published; steps for minutes: ParetoQ's are 120,000 (40,000 at 3 and 4 bits).
# DB-LLM's and ACKD's rates are not public to us. Schedules are cosine for all (TBT's is linear).
PRESETS: dict[str, TuneRecipe] = {
    "paretoq": TuneRecipe(trainable=("all",), loss=LOSSES["ce"], lr=2e-5, warmup=0.0, steps=400),
    "tbt": TuneRecipe(trainable=("all",), loss=LOSSES["tbt"], lr=3e-4, warmup=0.05, steps=400),
    "db-llm": TuneRecipe(trainable=("scales",), loss=LOSSES["dad"].model_copy(update={"task": 1.0}), lr=5e-4),
    "ackd": TuneRecipe(trainable=("scales", "norms"), loss=LOSSES["ackd"], lr=5e-4),
}


def tune_recipe(preset: str | None = None, loss: str | Terms | None = None, **changes: object) -> TuneRecipe:
    """A preset (or the defaults) with changes, one-line errors; None keeps what is there. loss: a name or terms.

    changes: fields of TuneRecipe; ``gamma`` and ``temperature`` change the loss.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}", f"choose from {', '.join(PRESETS)}")
    if isinstance(loss, str) and loss not in LOSSES:
        raise InputError(f"unknown loss {loss!r}", f"choose from {', '.join(LOSSES)}")
    base = TuneRecipe() if preset is None else PRESETS[preset]
    terms = base.loss if loss is None else LOSSES[loss] if isinstance(loss, str) else loss
    given = {key: value for key, value in changes.items() if value is not None}
    within = {key: given.pop(key) for key in ("gamma", "temperature") if key in given}
    fields: dict[str, Any] = {**base.model_dump(), "loss": {**terms.model_dump(), **within}, **given}
    try:
        return TuneRecipe(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        cause = f"option {where}: {first['msg'].removeprefix('Value error, ')}"
        raise InputError(cause, "see calib tune --help") from error
