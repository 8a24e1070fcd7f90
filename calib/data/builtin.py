"""Calibration text that needs no network: the prose that ships with Python itself."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import warnings
from pathlib import Path

from calib.errors import DataError

# Well documented modules of many subjects. They are parsed, never imported.
_MODULES = (
    "argparse", "asyncio.tasks", "calendar", "collections", "configparser", "contextlib", "csv",
    "dataclasses", "datetime", "decimal", "difflib", "doctest", "email.message", "enum", "fractions",
    "functools", "gettext", "heapq", "html.parser", "http.client", "http.cookiejar", "imaplib", "inspect",
    "ipaddress", "json", "locale", "logging", "mailbox", "multiprocessing.managers", "nntplib", "optparse",
    "os", "pathlib", "pdb", "pickle", "pickletools", "platform", "plistlib", "poplib", "random", "sched",
    "shelve", "shutil", "smtplib", "socket", "socketserver", "statistics", "string", "subprocess",
    "tarfile", "tempfile", "textwrap", "threading", "timeit", "trace", "traceback", "turtle", "typing",
    "unittest.case", "unittest.mock", "urllib.parse", "urllib.request", "uuid", "weakref",
    "wsgiref.handlers", "xmlrpc.client", "zipfile",
)  # fmt: skip


def builtin_documents(*, paragraphs: bool = False) -> list[str]:
    """Python's language reference (``pydoc``'s topics) with the standard library's docstrings between, in
    a fixed order.

    With `paragraphs` one paragraph of at least five words each, on one line. About 200,000 SmolLM2
    tokens. The text depends on the Python version, which the data's fingerprint then shows. Raises
    DataError on a Python stripped of both.
    """
    topics, docstrings = _topics(), [text for module in _MODULES if (text := _docstrings(module))]
    documents: list[str] = []
    for start in range(max(len(topics), len(docstrings))):
        documents += topics[start : start + 1] + docstrings[start : start + 1]
    if not documents:
        raise DataError("this Python ships without its documentation", "give a text file with --data")
    if not paragraphs:
        return documents
    rows = (" ".join(part.split()) for text in documents for part in text.split("\n\n"))
    return [row for row in rows if row.count(" ") >= 4]


def _topics() -> list[str]:
    if importlib.util.find_spec("pydoc_data") is None:
        return []
    from pydoc_data import topics

    return [text.strip() for _, text in sorted(topics.topics.items()) if text.strip()]


@functools.cache
def _docstrings(module: str) -> str:
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return ""
    path = Path(spec.origin).parent.joinpath(*rest.split(".")).with_suffix(".py") if rest else Path(spec.origin)
    if not path.is_file():
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the standard library's own strings
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(inspect.cleandoc(text) for text in found if text and len(text) > 80)
