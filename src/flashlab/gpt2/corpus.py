"""The embedded corpus: what every Python installation carries, so that a model can be trained without a download.

It is the documentation of `help()` (pydoc's topics), and the sources of the standard library with their docstrings,
without tests, tables and what distributions package apart: 8.0 MB of English and Python under Python 3.11, in some 450
documents. It differs from one Python version to the next; a manifest records which one it was, and its fingerprint.
"""

import hashlib
import platform
import sys
import sysconfig
import tokenize
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from flashlab.errors import UserError

# Folders and modules of the standard library that are left out: tests, tables of numbers, and what some distributions
# leave out or change.
LEFT_OUT = {
    *("test", "tests", "idlelib", "lib2to3", "distutils", "ensurepip", "encodings", "pydoc_data", "tkinter"),
    *("turtledemo", "turtle", "venv", "config", "site", "sysconfig", "sitecustomize", "__pycache__", "__phello__"),
    *("msilib", "_pyrepl"),
}
SMALLEST = 2_000_000  # bytes; an installation with less has been stripped of its sources


def embedded_documents() -> list[tuple[str, str]]:
    """Return the corpus as (name, text) in a fixed order.

    Raises:
        UserError: this Python was installed without the sources of its standard library.
    """
    topics: dict[str, str] = {}
    with suppress(ImportError):  # distributions may leave it out: the size says whether enough is left
        topics = import_module("pydoc_data.topics").topics
    documents = [(f"topics/{name}", text) for name, text in sorted(topics.items())]
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix())
    for path in paths:
        name = path.relative_to(library)
        module = name.parts[0].removesuffix(".py")
        is_left_out = LEFT_OUT.intersection({part.removesuffix(".py") for part in name.parts})
        if module in sys.stdlib_module_names and not is_left_out:
            with tokenize.open(path) as file:  # decodes as the file itself says
                documents.append((f"lib/{name.as_posix()}", file.read()))
    if (size := sum(len(text.encode()) for _, text in documents)) < SMALLEST:
        raise UserError(
            f"{library} has {size / 1e6:.1f} MB of the sources of Python's standard library, too little for a corpus; "
            "give text as SRC, or use another Python installation"
        )
    return documents


def describe(documents: list[tuple[str, str]]) -> dict[str, Any]:
    """Return what a manifest says of the corpus."""
    digest = hashlib.sha256()
    for name, text in documents:
        digest.update(f"{name}\0{text}\0".encode())
    return {
        "python": platform.python_version(),
        "documents": len(documents),
        "bytes": sum(len(text.encode()) for _, text in documents),
        "sha256": digest.hexdigest(),
    }
