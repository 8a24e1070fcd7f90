"""Exact changes of a model, each proven on real input. Knows no statistics."""

from calib.transforms.shift_scale import SiteTransform, relative_error, tolerance_for, undone_on_failure
from calib.transforms.site import FoldProducer, FoldTarget

__all__ = ["FoldProducer", "FoldTarget", "SiteTransform", "relative_error", "tolerance_for", "undone_on_failure"]
