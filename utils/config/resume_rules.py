"""Settings that may change, or must not, when a run is continued."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .plain import flatten

log = logging.getLogger(__name__)


FREE_TO_CHANGE = {
    "output_dir",
    "resume",
    "resume_changed",
    "logging",
    "evaluation.every",
    "evaluation.samples",
    "evaluation.prompt_tokens",
    "evaluation.new_tokens",
    "evaluation.without_teacher",
    "evaluation.tasks",
    "evaluation.tasks_path",
    "evaluation.tasks_limit",
    "hub",
    "teacher.name",
    "teacher.device",
    "teacher.allow_pickle",
    "student.name",
    "student.lora.merge",
    "student.allow_pickle",
    "data.train",
    "data.train_only",
    "data.num_workers",
    "cache.folder",
    "cache.build_only",
    "cache.accept_mismatch",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.gradient_checkpointing",
    "training.max_hours",
    "training.save_every",
    "training.keep_checkpoints",
}
"""Settings a resumed run may have otherwise: they do not change what is computed, or their content is compared."""


MICRO_BATCH = {"training.batch_size", "training.gradient_accumulation_steps"}
"""Free only as long as no term of the loss depends on how a step is cut: `contr` compares within a micro-batch."""


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, by dotted key, that must stay the same when a run is continued."""
    contrast = config.get("curriculum", {}).get("contr", {}).get("weight", 0)
    values = [value for _, value in contrast["points"]] if isinstance(contrast, Mapping) else [contrast]
    free = FREE_TO_CHANGE - MICRO_BATCH if any(values) else FREE_TO_CHANGE
    if not config.get("training", {}).get("deterministic"):  # as runs were before there was such a setting
        free = free | {"training.deterministic"}
    return {key: value for key, value in flatten(config).items() if not {key, key.partition(".")[0]} & free}


CHANGEABLE = ("curriculum.", "loss.", "training.max_grad_norm", "training.patience")
"""Settings, or beginnings of their keys, that a run can be continued with otherwise if that is asked for: they weigh
what is learned from, and nothing in a checkpoint was cut or sized by them."""


def check_same_run(where: str, there: Mapping[str, Any], here: Mapping[str, Any], changed: bool) -> None:
    """Compare what a run was made from with what it would be continued with, by dotted key.

    Args:
        where: the run or checkpoint, for the message.
        changed: other values of `CHANGEABLE` settings were asked for; they are logged.

    Raises:
        UserError: every difference, what to do, and the override where there is one.
    """
    keys = [key for key in sorted({*there, *here}) if there.get(key, "-") != here.get(key, "-")]
    if not keys:
        return
    lines = "".join(f"\n  - {key}: {_told(there, key)} -> {_told(here, key)}" for key in keys)
    can_change = all(key.startswith(CHANGEABLE) for key in keys)
    if can_change and changed:
        log.warning("continuing %s with other settings, as asked for (that run -> now):%s", where, lines)
        return
    override = " To continue it with the new values nevertheless: --set resume_changed=true." if can_change else ""
    raise UserError(
        f"{where} belongs to a run with other settings (that run -> now):{lines}\n"
        "Expected the same, or the result would be neither run. Put them back to continue it, or choose another "
        f"--output-dir, with --resume never, for a new run.{override}"
    )


def _told(values: Mapping[str, Any], key: str) -> str:
    text = json.dumps(values[key], ensure_ascii=False, default=str) if key in values else "(absent)"
    return text if len(text) <= 60 else f"{text[:57]}..."
