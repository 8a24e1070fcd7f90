"""What hypothesis draws in these tests, and how often: ``CALIB_EXAMPLES=2000 pytest tests/faults`` for the long run."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

settings.register_profile(
    "faults",
    max_examples=int(os.environ.get("CALIB_EXAMPLES", "25")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
faults = settings(settings.get_profile("faults"))

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON: st.SearchStrategy[Any] = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one of its parts replaced or removed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 5)):
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: draw(changed(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], draw(changed(value[i])), *value[i + 1 :]]
    return draw(JSON)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes cut, with some of them overwritten."""
    out = bytearray(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)
    for _ in range(draw(st.integers(0, 4)) if out else 0):
        out[draw(st.integers(0, min(len(out) - 1, 400)))] = draw(st.integers(0, 255))
    return bytes(out)
