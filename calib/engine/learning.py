"""What a block learns by its own output error, once it is quantized."""

from __future__ import annotations

import zlib

from torch import Tensor

from calib.engine.block import BlockCalibration
from calib.engine.state import SiteState
from calib.errors import NumericsError
from calib.methods import ShiftScale
from calib.model import HiddenList, device_of
from calib.nn import QuantLinear
from calib.tuning import FoldableSite, reconstruct


def refine(work: BlockCalibration, targets: HiddenList) -> None:
    """Learn what the recipe's ``learn`` names from the block's error against ``targets``, one hidden state a batch."""
    if not work.floats:  # all of the block is excluded
        return
    device = device_of(work.block)
    found = reconstruct(
        work.block,
        {path: weight.to(device) for path, weight in work.floats.items()},
        work.runs_of,
        lambda i: targets[i].to(device),
        [None if mask is None else mask.to(device) for mask in work.given.masks],
        steps=work.recipe.refine,
        seed=zlib.crc32(work.name.encode()) + work.recipe.seed,
        held=work.given.probes,
        learn=work.recipe.learn,
        sites=[foldable(state) for state in work.states],
    )
    if found.taken and found.after > 1.05 * found.before:  # rounding may flip a code
        cause = f"folding what was learned in {work.name} undid it: error {found.before:.2e} to {found.after:.2e}"
        raise NumericsError(cause, "leave scale and shift out of learn, and report this model")
    if not found.taken:
        work.notes.append(f"{work.name}: learned rounding did not lower the held-out error, the solver's stays")
    if found.missing:
        work.notes.append(f"{work.name}: no site here learns {' or '.join(found.missing)}")
    for state in work.states:
        record = work.record[f"{work.name}.{state.target.name}"]
        record["refined"] = [found.before, found.after]
        module = work.block.get_submodule(state.site.consumers[0])
        if isinstance(module, QuantLinear) and module.input.scale is not None:
            record["input_scale"] = float(module.input.scale)


def foldable(state: SiteState) -> FoldableSite:
    """The site as learning sees it: a norm takes what is learned of its channels, where all who read it change."""
    paths, producer = tuple(state.site.consumers), state.target.producer
    if not (state.whole and state.foldable and producer is not None and producer.offset is not None):
        return FoldableSite(paths)

    def fold(shift: Tensor | None, scale: Tensor | None) -> None:
        shift, scale = (None if each is None else each.cpu() for each in (shift, scale))
        if shift is not None and not state.takes_shift:
            state.transform.fuse(shift, None)
        state.transform.fold(shift if state.takes_shift else None, scale)
        state.moved(ShiftScale(shift, scale))  # no prefix moves: behind a norm its keys and values stay

    return FoldableSite(paths, fold, state.takes_shift)
