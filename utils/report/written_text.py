"""The report's table of written text: figures of what each model writes, sampled at temperature 1."""

from collections.abc import Mapping
from typing import Any

from .results import MODELS, figure, model_name, percent

WRITTEN_TEXT_HEADS = (
    "model",
    "teacher's bits per byte",
    "repeated 4-grams",
    "texts",
    "texts that end",
    "length, tokens",
)

NOTE = (
    "Texts that each model writes, sampled at temperature 1, from the same beginnings. Bits per byte: few where the "
    "teacher finds a text likely, which it also does where a text repeats itself."
)
UNJUDGED = (
    " They are missing where no teacher could read the texts: none was loaded, since a cache had all that the run "
    "needed, or its model is behind a server, of captures, in parts over the processes, or has an encoder."
)
SEVERAL = " Of several teachers the first one reads them; of its own texts, the best one."


def written_text_note(results: Mapping[str, Any]) -> str:
    """Return the sentences above the table: what is in it, and why figures of it are missing."""
    generation = results.get("generation") or {}
    written = [metrics for key in MODELS if (metrics := generation.get(key))]
    teacher = results.get("teacher") or {}
    is_unjudged = bool(teacher) and any(metrics.get("teacher_bits_per_byte") is None for metrics in written)
    return NOTE + SEVERAL * ("teachers" in teacher) + UNJUDGED * is_unjudged


def written_text_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of cells for each model that wrote texts, in the order of `WRITTEN_TEXT_HEADS`."""
    generation = results.get("generation") or {}
    rows = []
    for key in MODELS:
        if metrics := generation.get(key):
            rows.append(
                [
                    model_name(key, results),
                    figure(metrics.get("teacher_bits_per_byte")),
                    percent(metrics["repeated_4grams"]),
                    str(metrics["samples"]),
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
    alignment = ["---", *["---:"] * (len(WRITTEN_TEXT_HEADS) - 1)]
    lines = [f"| {' | '.join(cells)} |" for cells in [WRITTEN_TEXT_HEADS, alignment, *rows]]
    return f"## Written text\n\n{written_text_note(results)}\n\n" + "\n".join(lines)
