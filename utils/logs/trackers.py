"""Experiment trackers: the records of metrics.jsonl, sent to those that accelerate knows."""

import json
import logging
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
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
    available = {str(tracker) for tracker in get_available_trackers()}
    missing = [name for name in names if name not in available]
    if missing:
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
        trackers_folder = folder / TRACKERS
        trackers_folder.mkdir(exist_ok=True)
        accelerator.project_configuration.logging_dir = str(trackers_folder)

        # The name of the run is kept, so that its next session goes on in the same place.
        run_id = trackers_folder / RUN_ID
        is_new = not run_id.is_file()
        if is_new:
            write_text(run_id, uuid.uuid4().hex)
        options = {
            "wandb": {
                "id": run_id.read_text(encoding="utf-8"),
                "resume": "allow",
                "name": str(folder),
                "dir": str(trackers_folder),
            },
            "tensorboard": {"purge_step": done + 1 if done else 0},
        }

        # Hyperparameters are those of the run, not of each session.
        hyperparameters = _hyperparameters(settings) if is_new else None
        try:
            accelerator.init_trackers(PROJECT, hyperparameters, options)
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
        # Without trackers accelerate logs to nobody, which is what is wanted from now on.
        trackers = self.accelerator.trackers
        self.accelerator.trackers = []

        for tracker in trackers:
            try:
                tracker.finish()
            except Exception as error:
                log.warning("%s could not be closed: %s", tracker.name, error)


def flat_record(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a record's numbers by path: `train/terms/kd/raw`, `eval/bits_per_byte`; only those that are finite."""
    group = "train" if "terms" in record else record.get("split", "eval")
    values = {key: value for key, value in record.items() if key not in ("step", "split")}
    return dict(_numbers(group, values))


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield (path, number) of all finite numbers in nested containers."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{path}/{key}", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _numbers(f"{path}/{index}", inner)
    elif isinstance(value, int | float) and math.isfinite(value):
        yield path, value


def _hyperparameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings flat, with lists and ramps as text: trackers take numbers, words and truth values only."""
    hyperparameters: dict[str, Any] = {}
    for key, value in flatten(settings).items():
        if isinstance(value, str | int | float):
            hyperparameters[key] = value
        elif value is not None:
            hyperparameters[key] = json.dumps(value)
    return hyperparameters
