"""AdamW with warm-up and cosine decay over calibration batches, resumed to the same bits from a safetensors file.

Several processes (torchrun) take different batches of each step and average their gradients: two of them do what one
does that accumulates over twice as many batches, to rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from calib.errors import InputError, NumericsError
from calib.files import sync
from calib.model import Batch

Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Tuning:
    """steps: of ``accumulate`` batches each, on every process. lr: of its peak; each group of parameters multiplies it
    by a factor of its own. precision: of the forward pass (autocast); parameters keep their dtype.
    """

    steps: int
    lr: float = 1e-4
    warmup: float = 0.03
    decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    every: int = 50  # steps between checkpoints
    accumulate: int = 1
    precision: Literal["no", "bf16"] = "no"


def tune(
    groups: Sequence[tuple[Mapping[str, nn.Parameter], float]],
    loss: Loss,
    batches: Sequence[Batch],
    tuning: Tuning,
    *,
    buffers: Mapping[str, Tensor] | None = None,
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[], None] | None = None,
    file: Path | None = None,
    progress: bool = False,
) -> list[float]:
    """Train the groups' parameters, each at its multiple of the rate, in place; the loss before every step.

    Batches come in an order drawn anew for each epoch from the seed. file: where state is kept; a run that finds one
    goes on from it. buffers: what else is state, changed in place by before_step(step). after_step: puts parameters
    back where they must be. NumericsError for a loss that is not finite; InputError for a file of another run.
    """
    named = {name: p for parameters, _ in groups for name, p in parameters.items()}
    state = {**named, **(buffers or {})}
    on_cpu = next(iter(named.values())).device.type == "cpu"
    accelerator = Accelerator(cpu=on_cpu)
    world, rank = accelerator.num_processes, accelerator.process_index
    optimizer = torch.optim.AdamW(
        [{"params": list(p.values()), "lr": tuning.lr * factor} for p, factor in groups], weight_decay=tuning.decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, tuning))
    optimizer = accelerator.prepare(optimizer)
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    about = json.dumps({**asdict(tuning), "processes": world, "state": shapes}, sort_keys=True)
    losses = [] if file is None or not file.is_file() else _restore(file, about, named, state, optimizer, schedule)
    for parameter in named.values():
        parameter.requires_grad_(True)
    try:
        with (
            torch.enable_grad(),
            tqdm(total=tuning.steps, initial=len(losses), desc="tuning", disable=not progress or rank > 0) as bar,
        ):
            for step in range(len(losses), tuning.steps):
                if before_step is not None:
                    before_step(step)
                value = 0.0
                for part in range(tuning.accumulate):
                    place = (step * tuning.accumulate + part) * world + rank
                    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=tuning.precision == "bf16"):
                        each = loss(_batch(batches, place, tuning.seed)) / tuning.accumulate
                    accelerator.backward(each)
                    value += float(each.detach())
                losses.append(_mean_over_processes(accelerator, value, named.values()))
                if not math.isfinite(losses[-1]):
                    raise NumericsError(f"the loss of step {step} is not finite", "lower the learning rate")
                accelerator.clip_grad_norm_(named.values(), tuning.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                if after_step is not None:
                    after_step()
                bar.update()
                bar.set_postfix_str(f"loss {losses[-1]:.3f}")
                if file is not None and rank == 0 and ((step + 1) % tuning.every == 0 or step + 1 == tuning.steps):
                    _save(file, about, named, state, optimizer, losses)
    finally:
        for parameter in named.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    return losses


def _mean_over_processes(accelerator: Accelerator, loss: float, parameters: Iterable[nn.Parameter]) -> float:
    """The loss, and the parameters' gradients in place, averaged over processes."""
    if accelerator.num_processes == 1:
        return loss
    for parameter in parameters:
        if parameter.grad is None:  # an expert that no token of this process reached
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = accelerator.reduce(parameter.grad, "mean")
    return float(accelerator.reduce(torch.tensor(loss, dtype=torch.float64), "mean"))


def _rate(step: int, tuning: Tuning) -> float:
    warm = max(1, round(tuning.warmup * tuning.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, tuning.steps - warm)))


def _batch(batches: Sequence[Batch], place: int, seed: int) -> Batch:
    """The batch at a place in the run, every epoch in an order of its own."""
    epoch, index = divmod(place, len(batches))
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return batches[int(order[index])]


def _save(
    file: Path,
    about: str,
    named: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    losses: Sequence[float],
) -> None:
    tensors = {f"state:{name}": tensor.detach().contiguous() for name, tensor in state.items()}
    for name, parameter in named.items():
        tensors |= {f"{key}:{name}": value.contiguous() for key, value in optimizer.state[parameter].items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    save_file(tensors, str(part), metadata={"about": about})
    sync(part)
    part.replace(file)


def _restore(
    file: Path,
    about: str,
    named: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> list[float]:
    """Take back what ``_save`` wrote; the losses so far."""
    try:
        with safe_open(str(file), framework="pt") as stored:
            if (stored.metadata() or {}).get("about") != about:
                raise InputError(f"{file} is of a run with other settings", "remove it, or give the same settings")
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.copy_(stored.get_tensor(f"state:{name}"))
            keys = list(stored.keys())
            for name, parameter in named.items():
                kept = [key for key in keys if key.endswith(f":{name}") and not key.startswith("state:")]
                optimizer.state[parameter] = {key.partition(":")[0]: stored.get_tensor(key) for key in kept}
            losses: list[float] = stored.get_tensor("losses").tolist()
    except SafetensorError as error:
        raise InputError(f"{file} is damaged ({error})", "remove it") from error
    schedule.last_epoch = len(losses)
    for group, base in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = base * schedule.lr_lambdas[0](len(losses))  # type: ignore[attr-defined]
    return losses
