"""The records of metrics.jsonl, sent to experiment trackers as well: those that accelerate knows."""

import json
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ..config.plain import flatten
from ..errors import UserError
from ..files import write_text
from ..run_layout import TRACKERS

log = logging.getLogger(__name__)

PROJECT = "curriculum-distillation"
RUN_ID = "run_id"
"""File, where trackers write, with the name of the run at those with an account."""


def require(names: Sequence[str]) -> None:
    """Make sure, before anything is loaded, that these trackers can be used.

    Raises:
        UserError: a package is not installed.
    """
    here = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in names if name not in here]:
        raise UserError(
            f"--track {' '.join(missing)}: not installed. Expected packages that are; "
            f"install with: pip install {' '.join(missing)}"
        )


class Tracking:
    """The trackers of one run. Only in the main process.

    A continued run goes on in the same place: TensorBoard drops what a killed session told after the checkpoint, and
    Weights & Biases, which cannot, is told the same values once more. Other trackers begin a new run.

    Args:
        accelerator: built with `log_with`.
        folder: of the run.
        settings: of the run, nested; kept as hyperparameters.
        done: steps done before (resume).

    Raises:
        UserError: a tracker cannot be started.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, settings: Mapping[str, Any], done: int = 0) -> None:
        self.accelerator = accelerator
        place = folder / TRACKERS
        place.mkdir(exist_ok=True)
        is_new = not (place / RUN_ID).is_file()
        if is_new:
            write_text(place / RUN_ID, uuid.uuid4().hex)
        account = {"id": (place / RUN_ID).read_text(encoding="utf-8"), "resume": "allow", "name": str(folder)}
        options = {"wandb": {**account, "dir": str(place)}, "tensorboard": {"purge_step": done + 1 if done else 0}}
        accelerator.project_configuration.logging_dir = str(place)
        try:
            accelerator.init_trackers(PROJECT, _hyperparameters(settings) if is_new else None, options)
        except Exception as error:  # each library has errors of its own
            raise UserError(
                f"--track {' '.join(map(str, accelerator.log_with))}: cannot be started. {type(error).__name__}: "
                f"{error}. Without a network or an account, wandb keeps a run in its folder with WANDB_MODE=offline."
            ) from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a record. A tracker that fails is given up, and the run goes on."""
        try:
            self.accelerator.log(flat_record(record), step=record["step"])
        except Exception as error:
            log.warning("no longer tracked from step %d on: %s: %s", record["step"], type(error).__name__, error)
            self.close()

    def close(self) -> None:
        """End the trackers' runs."""
        trackers, self.accelerator.trackers = self.accelerator.trackers, []
        for tracker in trackers:
            try:
                tracker.finish()
            except Exception as error:
                log.warning("%s could not be closed: %s", tracker.name, error)


def flat_record(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by path: `train/terms/kd/raw`, `eval/bits_per_byte`; what is not finite is left out."""
    group = "train" if "terms" in record else record.get("split", "eval")
    found: dict[str, float] = {}

    def collect(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                collect(f"{path}/{key}", inner)
        elif isinstance(value, list | tuple):
            for place, inner in enumerate(value):
                collect(f"{path}/{place}", inner)
        elif isinstance(value, int | float) and math.isfinite(value):
            found[path] = value

    collect(group, {key: value for key, value in record.items() if key not in ("step", "split")})
    return found


def _hyperparameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flat, and lists and ramps as text: trackers take numbers, words and truth values only."""
    plain = {key: value for key, value in flatten(settings).items() if value is not None}
    return {key: value if isinstance(value, str | int | float) else json.dumps(value) for key, value in plain.items()}
