"""What a network is: blocks, sites found by tracing one real batch, the plan. Knows no methods."""

from calib.model.blocks import (
    Batch,
    BlockInputs,
    Call,
    HiddenList,
    Stack,
    call_model,
    capture,
    device_of,
    find_stacks,
    in_float32,
    observing,
    on_device,
    positions,
    run_after,
    to_dtype,
)
from calib.model.linears import apply_rewrites, linears
from calib.model.plan import Entry, Plan, make_plan, small_batch, takes_rotation, target_of
from calib.model.sites import Site
from calib.model.store import Resident, Streamed, TensorFiles, is_finite

__all__ = [
    "Batch",
    "BlockInputs",
    "Call",
    "Entry",
    "HiddenList",
    "Plan",
    "Resident",
    "Site",
    "Stack",
    "Streamed",
    "TensorFiles",
    "apply_rewrites",
    "call_model",
    "capture",
    "device_of",
    "find_stacks",
    "in_float32",
    "is_finite",
    "linears",
    "make_plan",
    "observing",
    "on_device",
    "positions",
    "run_after",
    "small_batch",
    "takes_rotation",
    "target_of",
    "to_dtype",
]
