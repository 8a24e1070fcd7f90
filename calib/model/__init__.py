"""What a network is: blocks, sites found by tracing one real batch, the plan. Knows no methods."""

from calib.model.blocks import Batch, BlockInputs, Call, Stack, call_model, capture, observing
from calib.model.linears import apply_rewrites, linears
from calib.model.plan import Entry, Plan, check_runs, make_plan, small_batch, takes_rotation, target_of
from calib.model.sites import Site

__all__ = [
    "Batch",
    "BlockInputs",
    "Call",
    "Entry",
    "Plan",
    "Site",
    "Stack",
    "apply_rewrites",
    "call_model",
    "capture",
    "check_runs",
    "linears",
    "make_plan",
    "observing",
    "small_batch",
    "takes_rotation",
    "target_of",
]
