"""The results of a run, and the words for them, whatever they are written into.

The results are one dict, in the form of evaluation_report.json:
`{student, teacher, initial_student, retention, samples, run}` and, where there was one, `baseline`: the same
student after the same steps without the teacher. Everything is measured on the same text, but for `tasks`: those of
lm_eval, a row for each metric (see `utils.evaluation.lm_eval_tasks`). `prompted`: the samples answer prompts, as the
student learned to from conversations or from examples; else they go on from the beginnings of texts.
"""

from collections.abc import Mapping
from typing import Any

from ..logs.progress import duration

MODELS = {
    "teacher": "Teacher",
    "student": "Distilled student",
    "baseline": "Same student without the teacher",
    "initial_student": "Student before training",
}
"""Keys of the results that describe a model, in the order they are shown."""


def model_name(key: str, results: Mapping[str, Any]) -> str:
    """What a model of the results is called; without a teacher nothing was distilled."""
    return "Trained student" if key == "student" and not results.get("teacher") else MODELS[key]


def headline(results: Mapping[str, Any]) -> str:
    """What the run achieved, in a sentence or two."""
    known = {key: (results.get(key) or {}).get("bits_per_byte") for key in MODELS}
    bits = {key: value for key, value in known.items() if value is not None}  # null: it was not a number
    sentences = []
    if {"baseline", "student"} <= bits.keys():
        less = 1 - bits["student"] / bits["baseline"]
        word = "fewer" if less >= 0 else "more"
        sentences.append(
            f"The distilled student needs {abs(less):.1%} {word} bits per byte than the same student trained for the "
            "same steps without the teacher."
        )
    retention = results.get("retention") or {}
    closed = retention.get("gap_closed")
    if reason := retention.get("not_comparable"):
        sentences.append(f"How much of the gap to the teacher it closed is not told: {reason}.")
    elif closed is not None:
        sentences.append(f"It closed {closed:.1%} of the gap between the untrained student and the teacher.")
    elif {"teacher", "initial_student"} <= bits.keys() and bits["teacher"] >= bits["initial_student"]:
        sentences.append("The teacher is no better on this text than the student was before training.")
    return " ".join(sentences)


def retention_lines(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, figure) of how close the student came to the teacher; empty without a teacher."""
    kept = results.get("retention") or {}
    if not kept:
        return []
    unspelt = []
    for key, name in (("student", "student's"), ("teacher", "teacher's")):
        model = results.get(key) or {}
        if missing := model.get("unspelt_bytes"):
            unspelt.append((f"Bytes of the text that the {name} tokens leave out", percent(missing / model["bytes"])))
    return [
        *unspelt,
        ("Bits per byte, student over teacher", figure(kept.get("bits_per_byte_ratio"), 3)),
        ("Share of the gap to the teacher closed", percent(kept.get("gap_closed"))),
        ("Same most probable token as the teacher", percent(kept.get("top1_agreement"))),
        ("KL from the teacher at common boundaries", f"{figure(kept.get('kl_nats_per_token'))} nats per token"),
    ]


def task_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """lm_eval's tasks as a table for people: its heads, and its rows; no rows where none was measured."""
    rows = results.get("tasks") or []
    keys = [key for key in MODELS if any(row.get(key) for row in rows)]
    cells = []
    for row in rows:
        arrow = {True: " ↑", False: " ↓"}.get(row["higher_is_better"], "")
        about = [row["task"], row["metric"] + arrow, figure(row["documents"])]
        cells.append([*about, *(_measured(row, key) for key in keys)])
    return ["task", "metric", "documents", *(model_name(key, results) for key in keys)], cells


def task_table(results: Mapping[str, Any]) -> str:
    """The same in Markdown; empty where none was measured."""
    heads, rows = task_rows(results)
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if rows else ""


def _measured(row: Mapping[str, Any], key: str) -> str:
    """Value and standard error."""
    found = row.get(key) or {}
    error = "" if found.get("stderr") is None else f" ± {figure(found['stderr'])}"
    return figure(found.get("value")) + error


def run_lines(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of how the run went."""
    shown = dict(results.get("run") or {})
    if shown.get("stopped_by") == "finished":
        del shown["stopped_by"]
        shown["training"] = "finished"
    if isinstance(seconds := shown.pop("seconds", None), int | float):
        shown["duration"] = duration(seconds)
    return [(str(key).replace("_", " "), _plain(value)) for key, value in shown.items()]


def samples_title(results: Mapping[str, Any]) -> str:
    """What the samples are."""
    prompted = results.get("prompted")
    return "Greedy " + ("answers to the same prompts" if prompted else "continuations of the same beginnings")


def figure(value: float | None, digits: int = 4) -> str:
    """A number for people; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """A share for people."""
    return "-" if value is None else f"{value:.1%}"


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
