"""The corpus of the first run: texts that ship with Python."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

MIN_DOCUMENT = 200
"""Characters; docstrings below are mostly one-liners that say little beyond a name."""


LEFT_OUT = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"),
    *("site-packages", "dist-packages", "__pycache__"),
}


def collect_text() -> list[str]:
    """Language reference and standard-library docstrings: distinct documents, in an order that is always the same.

    Sources are parsed, never imported.
    """
    documents = dict.fromkeys(
        text for text in (*_topics(), *_docstrings(Path(sysconfig.get_paths()["stdlib"]))) if len(text) >= MIN_DOCUMENT
    )
    if sum(map(len, documents)) < 500_000:
        raise UserError(
            f"Found only {len(documents)} documents in this Python ({sysconfig.get_paths()['stdlib']}): expected its "
            "standard library with sources. Install a full Python, or give --train-data and a --config."
        )
    return list(documents)


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions split it off
        return
    for name in sorted(topics):
        yield _tidy(topics[name])


def _docstrings(library: Path) -> Iterator[str]:
    """One document per module, function and class; a class comes with its methods."""
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        if LEFT_OUT.intersection(parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        if text := ast.get_docstring(tree):
            yield _tidy(f"module {module}\n\n{text}")
        for node in tree.body:
            if text := "\n\n".join(_described(node)):
                yield _tidy(text)


def _described(node: ast.stmt) -> Iterator[str]:
    """Signature and docstring of a function or class and of what it contains; nothing where there is no docstring."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    if text := ast.get_docstring(node):
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
    """Without trailing blanks, and without what is no text (lone surrogates in examples)."""
    lines = (line.rstrip() for line in text.encode("utf-8", "replace").decode().strip().splitlines())
    return "\n".join(lines)
