"""Results of a run, and the words for them in every form of the report.

The results are one dict, in the form of evaluation_report.json:
`{student, teacher, initial_student, retention, samples, run}` and, where there was one, `baseline`: the same student
after the same steps without the teacher. Everything is measured on the same text, but for `tasks`: those of lm_eval, a
row for each metric (see `utils.evaluation.lm_eval_tasks`). And beside the models:

- `student_init`: `pretrained` or `random`, the weights that training began with.
- `prompted`: the samples answer prompts, as the student learned to from conversations or from examples; else they go
  on from the beginnings of texts, behind the tokens `text_starts` of each side.
- `alignment` and `differences`: views of single tokens, see `token_views`.
- `chosen_positions`: the first `tokens` of a window of the training text, each with true if KD is learned at it under
  the smallest `share` of the run, as `select_by` chooses. `window` of `windows`, and the first `step` that learned from
  it, are counted from 1, and null where nobody can tell; `largest_share` is that of the run.
- `own_text`: texts of the last round that the student wrote to learn from, see `utils.on_policy.rounds`.
"""

from collections.abc import Mapping
from typing import Any

from ..logs.lines import in_percent
from ..logs.progress import duration

MODELS = {
    "teacher": "Teacher",
    "student": "Distilled student",
    "baseline": "Same student without the teacher",
    "initial_student": "Student before training",
}
"""Keys of the results that describe a model, in the order they are shown -> their names."""

EQUAL = 0.0005
"""Relative difference of bits per byte below which two models are equal: 0.05 % is no more in the tables' digits."""


# ---------------------------------------------------------------------------------------- sentences


def model_name(key: str, results: Mapping[str, Any]) -> str:
    """Return the name of a model of the results; without a teacher nothing was distilled."""
    if key == "student" and not results.get("teacher"):
        return "Trained student"
    if key == "initial_student" and is_random_start(results):
        return "Student with random weights"
    return MODELS[key]


def teacher_of(settings: Mapping[str, Any]) -> str | None:
    """Return the name of a run's teacher; of one behind a server not the address, which says nothing to others."""
    teacher = settings.get("teacher") or {}
    name = teacher.get("name")
    if name is not None and name.startswith(("http://", "https://")):
        return teacher.get("model") or teacher.get("tokenizer") or name
    return name


def is_random_start(results: Mapping[str, Any]) -> bool:
    """Return True if training began with random weights; a student that was trained before has a start worth naming."""
    return results.get("student_init") == "random"


def bits_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the bits per byte of every model of the results; one whose figure was not finite is left out."""
    bits = {}
    for key in MODELS:
        value = (results.get(key) or {}).get("bits_per_byte")
        if value is not None:
            bits[key] = value
    return bits


def headline(results: Mapping[str, Any]) -> str:
    """Return the result of the run in a few sentences, the bad news first."""
    bits = bits_of(results)
    sentences = [
        worse_than_before(results),
        _against_baseline(bits) if "baseline" in bits and "student" in bits else None,
        _against_start(results, bits),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def worse_than_before(results: Mapping[str, Any]) -> str | None:
    """Return the sentence on a student that training has made worse; None: it has not, or nobody can tell."""
    bits = bits_of(results)
    if not {"student", "initial_student"} <= bits.keys() or bits["student"] <= bits["initial_student"]:
        return None

    name = model_name("student", results)
    start = "with its random weights" if is_random_start(results) else "before training"
    return (
        f"The {name.lower()} got worse: {figure(bits['student'])} bits per byte on unseen text, "
        f"{figure(bits['initial_student'])} {start}."
    )


def is_better_without_teacher(results: Mapping[str, Any]) -> bool:
    """Return True if the same student learned more from the text alone."""
    bits = bits_of(results)
    return {"student", "baseline"} <= bits.keys() and _change_by_teacher(bits) >= EQUAL


def has_passed_teacher(results: Mapping[str, Any]) -> bool:
    """Return True if the student, which began behind its teacher, needs fewer bits per byte than it by now.

    Where the two read different bytes, as a tokenizer changes text, nobody can tell.
    """
    bits = bits_of(results)
    is_comparable = not (results.get("retention") or {}).get("not_comparable")
    if not is_comparable or not {"student", "initial_student", "teacher"} <= bits.keys():
        return False
    return bits["student"] < bits["teacher"] < bits["initial_student"]


def _change_by_teacher(bits: Mapping[str, float]) -> float:
    """Return the share of bits per byte that the teacher adds; below 0 it helps."""
    return bits["student"] / bits["baseline"] - 1


def _against_baseline(bits: Mapping[str, float]) -> str:
    """Return the sentence that compares bits per byte with those of the student without the teacher."""
    change = _change_by_teacher(bits)
    other = "the same student trained for the same steps without the teacher"
    if abs(change) < EQUAL:
        return f"The distilled student needs as many bits per byte as {other}."
    if change > 0:
        return f"The teacher did not help: the distilled student needs {change:.1%} more bits per byte than {other}."
    return f"The distilled student needs {-change:.1%} fewer bits per byte than {other}."


def _against_start(results: Mapping[str, Any], bits: Mapping[str, float]) -> str | None:
    """Return the sentence on the way from the start to the teacher, or from the start alone without a teacher."""
    name = model_name("student", results).lower()
    start = "with random weights" if is_random_start(results) else "before training"
    retention = results.get("retention") or {}
    if reason := retention.get("not_comparable"):
        return f"How much of the gap to the teacher the {name} closed is not told: {reason}."
    if "student" not in bits or "initial_student" not in bits:
        return None

    teacher = bits.get("teacher")
    if teacher is not None and teacher >= bits["initial_student"]:
        return f"The teacher is no better on this text than the student was {start}."

    # Bad news is a sentence of its own.
    if bits["student"] > bits["initial_student"]:
        return None
    if teacher is None:
        saved = 1 - bits["student"] / bits["initial_student"]
        return f"The {name} needs {saved:.1%} fewer bits per byte than {start}."
    if has_passed_teacher(results):
        return f"The {name} needs fewer bits per byte than the teacher."
    closed = retention.get("gap_closed")
    return (
        None if closed is None else f"The {name} closed {closed:.1%} of the gap between itself {start} and the teacher."
    )


def own_text_samples(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return texts that the student wrote to learn from, in the form of samples: prompt, and text by model."""
    return [dict(text) for text in (results.get("own_text") or {}).get("texts") or []]


def own_text_note(results: Mapping[str, Any]) -> str:
    """Return what these texts are."""
    step = (results.get("own_text") or {}).get("step") or 0
    return (
        f"What the student wrote after step {step:,} and learned from, beside what the teacher writes behind the same "
        "beginnings. Both are sampled."
    )


CHOSEN_BY = {
    "student_entropy": "the student, as it is after training, is most in doubt",
    "first_student": "the student before training was most in doubt",
    "teacher_entropy": "the teacher is most in doubt",
    "divergence": "the student, as it is after training, is farthest from the teacher (KL divergence)",
    "excess_loss": "the loss of the student, as it is after training, is most above the teacher's",
}
"""Name in `loss.select_by` -> where KD is learned, and which student says so."""

CHANGING_STUDENT = " Each step of the run chose by the student as it was then."


def chosen_note(results: Mapping[str, Any]) -> str:
    """Return the sentences above the text in which the positions that KD is learned at are marked; empty without it."""
    view = results.get("chosen_positions") or {}
    if not view:
        return ""

    if view["window"] is None:
        text = "The beginning of a window from the beginning of the stream; the run cut its text anew, block by block."
    else:
        text = f"The beginning of window {view['window']:,} of {view['windows']:,} of the training text, "
        text += f"learned from in step {view['step']:,}." if view["step"] else "which no step of the run learned from."

    share = f"{in_percent(view['share'])} of the window's positions"
    if view["share"] < view["largest_share"]:
        share += ", the least in this run"
    by = view["select_by"]
    return (
        f"{text} Marked are the tokens that KD is learned at where the share (curriculum.select) is {share}: those "
        f"where {CHOSEN_BY[by]} (loss.select_by {by}).{CHANGING_STUDENT * ('after training' in CHOSEN_BY[by])}"
    )


def samples_title(results: Mapping[str, Any]) -> str:
    """Return the title of the samples."""
    if results.get("prompted"):
        return "Greedy answers to the same prompts"
    return "Greedy continuations of the same beginnings"


# ------------------------------------------------------------------------------------------- tables


def retention_lines(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, figure) of how close the student came to the teacher; nothing without a teacher."""
    retention = results.get("retention") or {}
    if not retention:
        return []

    # Tokens that leave text out make bits per byte too small, so they come first.
    lines = []
    for key, name in (("student", "student's"), ("teacher", "teacher's")):
        model = results.get(key) or {}
        if missing := model.get("unspelt_bytes"):
            lines.append((f"Bytes of the text that the {name} tokens leave out", percent(missing / model["bytes"])))

    # Of several teachers the best one is called the teacher, and their mixture is what is learned from.
    several = (results.get("teacher") or {}).get("teachers", [])
    nearest, taught_by = ("best teacher", "teachers' mixture") if several else ("teacher", "teacher")
    divergence = figure(retention.get("kl_nats_per_token"))
    lines += [
        (f"Bits per byte, student over {nearest}", figure(retention.get("bits_per_byte_ratio"), 3)),
        (f"Share of the gap to the {nearest} closed", gap_closed(results)),
        (f"Same most probable token as the {taught_by}", percent(retention.get("top1_agreement"))),
        (f"KL from the {taught_by} at common boundaries", f"{divergence} nats per token"),
    ]
    for teacher in several:
        lines.append((f"Bits per byte of the teacher {teacher['name']}", figure(teacher["bits_per_byte"])))
    return lines


def task_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return lm_eval's tasks as a table for people: its heads and its rows; no rows where none was measured."""
    tasks = results.get("tasks") or []
    keys = [key for key in MODELS if any(task.get(key) for task in tasks)]
    heads = ["task", "metric", "documents", *(model_name(key, results) for key in keys)]

    rows = []
    for task in tasks:
        # The arrow points to the better side; some metrics have none.
        arrow = {True: " ↑", False: " ↓"}.get(task["higher_is_better"], "")
        scores = [_task_score(task.get(key) or {}) for key in keys]
        rows.append([task["task"], task["metric"] + arrow, figure(task["documents"]), *scores])
    return heads, rows


def task_table(results: Mapping[str, Any]) -> str:
    """Return the same in Markdown; nothing where none was measured."""
    heads, rows = task_rows(results)
    if not rows:
        return ""

    # Task and metric are text, on the left; everything else is a number.
    alignment = ["---", "---", *["---:"] * (len(heads) - 2)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, alignment, *rows])


def _task_score(score: Mapping[str, Any]) -> str:
    """Return a score of lm_eval with its standard error, if it has one."""
    value = figure(score.get("value"))
    if score.get("stderr") is None:
        return value
    return f"{value} ± {figure(score['stderr'])}"


def run_lines(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, value) of the run: its steps, its duration, its end."""
    summary = dict(results.get("run") or {})
    if summary.get("stopped_by") == "finished":
        del summary["stopped_by"]
        summary["training"] = "finished"

    # The run ends with an error where it is not about 0.
    summary.pop("loss_difference_loaded_anew", None)
    seconds = summary.pop("seconds", None)
    if isinstance(seconds, int | float):
        summary["duration"] = duration(seconds)

    lines = []
    for key, value in summary.items():
        label = str(key).replace("_", " ")
        lines.append((label, _plain(value)))
    return lines


# ------------------------------------------------------------------------------------------ numbers


def figure(value: float | None, digits: int = 4) -> str:
    """Return a number for people: a whole one with commas, another with some digits, a dash where there is none."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}f}"


def gap_closed(results: Mapping[str, Any]) -> str:
    """Return the share of the gap between start and teacher that the student closed; a student that got worse has none.

    A share below 0 would be read as one that was closed.
    """
    share = (results.get("retention") or {}).get("gap_closed")
    if share is not None and share < 0:
        return "none, it got worse"
    return percent(share)


def percent(value: float | None) -> str:
    """Return a share for people."""
    return "-" if value is None else f"{value:.1%}"


def _plain(value: Any) -> str:
    """Return any value for people; Python counts True and False as whole numbers, people do not."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_number else str(value)
