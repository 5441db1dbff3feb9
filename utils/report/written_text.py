"""The report's table of written text: figures of what each model writes, sampled at temperature 1."""

from collections.abc import Mapping
from typing import Any

from .results import MODELS, figure, model_name, percent

HEADS = ("", "teacher's bits per byte", "repeated 4-grams", "texts that end", "length, tokens")

NOTE = (
    "Texts that each model writes, sampled at temperature 1, from the same beginnings. Bits per byte: few where the "
    "teacher finds a text likely, which it also does where a text repeats itself."
)
"""Sentences above the table."""


def written_text_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of cells for each model that wrote texts, in the order of `HEADS`."""
    generation = results.get("generation") or {}
    rows = []
    for key in MODELS:
        if metrics := generation.get(key):
            rows.append(
                [
                    model_name(key, results),
                    figure(metrics.get("teacher_bits_per_byte")),
                    percent(metrics["repeated_4grams"]),
                    percent(metrics["ended"]),
                    figure(metrics["tokens"], 1),
                ]
            )
    return rows


def written_text_table(results: Mapping[str, Any]) -> str:
    """Return the section in Markdown; nothing where no model wrote texts."""
    rows = written_text_rows(results)
    if not rows:
        return ""

    # The model's name is text, on the left; everything else is a number.
    alignment = ["---", *["---:"] * (len(HEADS) - 1)]
    lines = [f"| {' | '.join(cells)} |" for cells in [HEADS, alignment, *rows]]
    return f"## Written text\n\n{NOTE}\n\n" + "\n".join(lines)
