"""Settings that may change, or must not, when a run is continued from its checkpoints.

Three sets say it, side by side. A setting that is in none of them must stay as it was.

- `FREE_TO_CHANGE`: may change at any time, without a word.
- `MICRO_BATCH`: the part of it that is free only while no loss term compares windows with one another.
- `CHANGEABLE`: may change if `resume_changed=true` asks for it; the change is logged.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError, shorten
from .plain import flatten

log = logging.getLogger(__name__)


FREE_TO_CHANGE = {
    # where a run writes, and how it is started
    "output_dir",
    "resume",
    "resume_changed",
    "logging",
    "hub",
    # measurements that no weight depends on (evaluation.max_windows is none: early stopping compares its results)
    "evaluation.every",
    "evaluation.samples",
    "evaluation.prompt_tokens",
    "evaluation.new_tokens",
    "evaluation.generation",
    "evaluation.without_teacher",
    "evaluation.tasks",
    "evaluation.tasks_path",
    "evaluation.tasks_limit",
    # names and places of models and texts: it is their content that is compared
    "teacher.name",
    "teacher.tokenizer",
    "teacher.model",
    "teacher.allow_pickle",
    "student.name",
    "student.tokenizer",
    "student.allow_pickle",
    "data.train",
    "data.tokenizer",
    "data.train_only",
    "data.mixture",
    # what `auto` means differs between devices and versions: what was computed in is compared
    "training.mixed_precision",
    "teacher.dtype",
    "cache.folder",
    "cache.build_only",
    "cache.accept_mismatch",
    # how a served teacher is asked
    "served.requests",
    "served.timeout",
    "served.patience",
    "served.key_variable",
    # the same computation at another place, in other pieces or with less memory
    "teacher.device",
    "data.num_workers",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.gradient_checkpointing",
    # when to stop and what to save
    "training.max_hours",
    "training.save_every",
    "training.keep_checkpoints",
    "student.lora.merge",
    "on_policy.stop_on_collapse",
}
"""Settings, or whole sections, that a resumed run may have otherwise: they do not change what is computed, or their
content is compared (the fingerprint of a run holds that of models and texts)."""

MICRO_BATCH = {"training.batch_size", "training.gradient_accumulation_steps"}
"""Settings that cut an optimizer step into micro-batches. They are free only as long as no loss term depends on the
cut; `contr` does, because it compares the windows of a micro-batch with one another."""

CHANGEABLE = (
    "curriculum.",
    "loss.",
    "on_policy.every",
    "on_policy.new_tokens",
    "on_policy.prompt_tokens",
    "on_policy.temperature",
    "on_policy.top_p",
    "training.max_grad_norm",
    "training.patience",
)
"""Settings, or beginnings of their keys, that `resume_changed=true` allows to differ on resume. They weight the loss;
the size of no saved tensor depends on them."""

AS_ASKED_FOR = {"training.mixed_precision", "teacher.dtype"}
"""Settings that earlier versions compared as they were asked for, and that their checkpoints have."""

OWN_TEXT = {"on_policy", "curriculum.on_policy"}
"""Compared only where the student learns from its own text at some time; runs made before it could have none."""

ADDED = {
    "data.streaming": False,
    "data.block_bytes": 32_000_000,
    "data.remembered_documents": 2_000_000,
    "curriculum.balance": "none",
    "curriculum.open_text": 1.0,
    "curriculum.sample_weights": 0.0,
    "curriculum.select": 1.0,
    "data.order": "random",
    "loss.select_by": "student_entropy",
    "loss.interpolation": 1.0,
    "training.deterministic": False,
    "served.listed": None,
}
"""Settings that runs made before they existed have not, and the value that those ran with: compared only where it is
another."""

SEVERAL_TEACHERS = {"teachers", "mix"}
"""Compared only where there are several: runs made before there could be have none of these settings."""

USED_BESIDE = ("mix", "on_policy.")
"""Settings, or beginnings of their keys, that another one switches on; what they were before is told to nobody."""

NOT_COMPARED: dict[str, Any] = {**ADDED, "curriculum.on_policy": 0.0, "teachers": []}
"""Settings that a run is not compared by while they have this value: a run without them has it."""

FREE_OF_A_TEACHER = {key.rpartition(".")[2] for key in FREE_TO_CHANGE if key.startswith("teacher.")}
"""Settings of each of several teachers that may change, as those of a single one may."""

LONGEST_VALUE = 60
"""Characters of a setting that are quoted in the list of differences."""


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, by dotted key, that must stay the same when a run is continued.

    Args:
        config: all settings as plain nested values, of this run or read from the config.yaml of an earlier one.
    """
    free = set(FREE_TO_CHANGE)
    if not config.get("teachers"):
        free |= SEVERAL_TEACHERS
    if _couples_windows(config):
        free -= MICRO_BATCH
    if not _is_above_zero(config.get("curriculum", {}).get("on_policy", 0)):
        free |= OWN_TEXT

    compared = {}
    for key, value in flatten(config).items():
        # Sources have names too, in the mixture; their weights are compared with the text.
        section = "data.mixture" if key.startswith("data.mixture.") else key.partition(".")[0]
        if key == "teachers":
            value = _compared_of_teachers(value)
        is_as_before = key in ADDED and value == ADDED[key]
        if key not in free and section not in free and not is_as_before:
            compared[key] = value
    return compared


def _compared_of_teachers(teachers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return of each of several teachers the settings that must stay the same."""
    return [{key: value for key, value in teacher.items() if key not in FREE_OF_A_TEACHER} for teacher in teachers]


def _couples_windows(config: Mapping[str, Any]) -> bool:
    """Return whether the contrastive term, which compares the windows of a micro-batch, ever has a weight."""
    return _is_above_zero(config.get("curriculum", {}).get("contr", {}).get("weight", 0))


def _is_above_zero(schedule: Any) -> bool:
    """Return whether a constant, or a ramp at one of its points, is above 0."""
    if isinstance(schedule, Mapping):
        return any(value for _, value in schedule["points"])
    return bool(schedule)


HASHES = {
    "training_text": "the training text (a hash of it)",
    "held_out_windows": "the held-out text, as windows (a hash of them)",
    "tokenizers_and_length": "the tokenizers and the length of windows (a hash of them)",
    "student": "the student as it began, its weights or their shapes (a hash of them)",
    "teacher": "the teacher's weights, in the precision that they are read in (a hash of them)",
    "mixed_precision": "the precision that the student computes in",
}
"""Facts of a run that no user has set by these names: most are hashes, and users know the things, not their hashes."""


def check_same_run(where: str, saved: Mapping[str, Any], current: Mapping[str, Any], changed: bool) -> None:
    """Compare the settings that a run was made with and those that it would be continued with.

    Args:
        where: the run or checkpoint, for the message.
        saved: settings of that run, by dotted key; see `identity`.
        current: settings of this command.
        changed: other values of `CHANGEABLE` settings were asked for; they are logged.

    Raises:
        UserError: every difference, what to do, and the override where there is one.
    """
    saved = _without_requests(saved)
    # a key that only one side has is a difference too, also where the other side's value is null
    keys = sorted({*saved, *current})
    differing = [key for key in keys if saved.get(key, "-") != current.get(key, "-")]
    if not differing:
        return

    lines = ""
    for key in differing:
        lines += f"\n  - {HASHES.get(key, key)}: {_quoted(saved, key)} -> {_quoted(current, key)}"

    # One difference that cannot be overruled makes the whole command a mistake.
    can_change = all(key.startswith(CHANGEABLE) for key in differing)
    if can_change and changed:
        log.warning("continuing %s with other settings, as asked for (that run -> now):%s", where, lines)
        return

    override = ""
    if can_change:
        override = " To continue it with the new values nevertheless: --set resume_changed=true."
    elif "mixed_precision" in differing:
        # Often nobody has changed anything: `auto` means another precision on another machine.
        override = f" --mixed-precision {saved['mixed_precision']} computes as that run did."
    raise UserError(
        f"{where} belongs to a run with other settings (that run -> now):{lines}\n"
        "Expected the same, or the result would be neither run. Put them back to continue it, or choose another "
        f"--output-dir, with --resume never, for a new run.{override}"
    )


def _without_requests(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run without the requests that an earlier version compared."""
    kept = {key: value for key, value in saved.items() if key not in AS_ASKED_FOR}
    if "teachers" in kept:
        kept["teachers"] = _compared_of_teachers(kept["teachers"])
    return kept


def _quoted(values: Mapping[str, Any], key: str) -> str:
    """Return a setting as JSON, cut where it is long."""
    if key not in values and key not in NOT_COMPARED:
        return "(without effect)" if key.startswith(USED_BESIDE) else "(absent)"
    value = values.get(key, NOT_COMPARED.get(key))
    return shorten(json.dumps(value, ensure_ascii=False, default=str), LONGEST_VALUE)
