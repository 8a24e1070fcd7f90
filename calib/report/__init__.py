"""What a run tells a reader: report.json, and report.html, which is made from it alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib.report.page import page
from calib.report.record import SCHEMA, record

HTML, JSON = "report.html", "report.json"


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Both files into a folder."""
    (folder / JSON).write_text(json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    (folder / HTML).write_text(page(report), encoding="utf-8")


__all__ = ["HTML", "JSON", "SCHEMA", "page", "record", "write"]
