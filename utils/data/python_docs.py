"""Text of the first run, which needs no network: the language reference and the docstrings that ship with Python."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

MIN_DOCUMENT = 200
"""Characters; docstrings below are mostly one-liners that say little beyond a name."""

LEAST_TEXT = 500_000
"""Characters of a corpus that a model can learn something from; a complete Python has many times more."""

LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
"""Folders of the standard library with tests, tools and packages of others, which differ from machine to machine."""


def collect_text() -> list[str]:
    """Return language reference and standard-library docstrings as distinct documents, always in the same order.

    Sources are parsed, never imported.

    Raises:
        UserError: this Python has no standard library with sources.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [*_topics(), *_docstrings(library)]

    # A dict has each text once and keeps the order, which a set does not.
    documents = dict.fromkeys(text for text in texts if len(text) >= MIN_DOCUMENT)
    if sum(map(len, documents)) < LEAST_TEXT:
        raise UserError(
            f"Found only {len(documents)} documents in this Python ({library}): expected its "
            "standard library with sources. Install a full Python, or give --train-data and a --config."
        )
    return list(documents)


def _topics() -> Iterator[str]:
    """Yield the topics of `help()`: the language reference, in plain text."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions split it off
        return
    for name in sorted(topics):
        yield _tidy(topics[name])


def _docstrings(library: Path) -> Iterator[str]:
    """Yield one document per module, function and class; a class comes with its methods."""
    # Sorted: file systems list their files in different orders.
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        if LEFT_OUT.intersection(parts):
            continue

        # Some files are templates, or broken on purpose.
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue

        module = ".".join(part for part in parts if part != "__init__")
        module_text = ast.get_docstring(tree)
        if module_text:
            yield _tidy(f"module {module}\n\n{module_text}")

        for node in tree.body:
            text = "\n\n".join(_described(node))
            if text:
                yield _tidy(text)


def _described(node: ast.stmt) -> Iterator[str]:
    """Yield signature and docstring of a function or class, then of the methods of a class.

    Nothing where there is no docstring.
    """
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return

    text = ast.get_docstring(node)
    if text:
        indented = "\n".join(f"    {line}" if line.strip() else "" for line in text.splitlines())
        yield f"{_signature(node)}:\n{indented}"

    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            yield from _described(inner)


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"def {node.name}({ast.unparse(node.args)})"


def _tidy(text: str) -> str:
    """Return a text without blanks at the ends of lines, and without what is no text (lone surrogates in examples)."""
    encodable = text.encode("utf-8", "replace").decode()
    lines = [line.rstrip() for line in encodable.strip().splitlines()]
    return "\n".join(lines)
