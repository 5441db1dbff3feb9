"""The layers that a student takes from a bigger model: chosen once in a run, and stored in its folder."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..data import loader
from ..files import write_json
from ..interfaces import Batch
from ..pretrained import layers, loading
from ..pretrained.layers import LayerChoice
from ..pretrained.precision import frozen_dtype
from ..run_layout import LAYERS
from .prepare import Job

log = logging.getLogger("train")

MEASURED_WINDOWS = 16
"""Windows of the training text on which the layers are measured."""


def choose(job: Job, folder: Path) -> LayerChoice:
    """Return the layers that the student of a run takes: those in its folder, or chosen now and stored there.

    Call it in one process; raises like `measure`.
    """
    student = job.config.student
    made_from = {
        "student": loading.weights_fingerprint(student.name, "student"),
        "count": student.layers,
        **{key: job.fingerprint[key] for key in ("training_text", "tokenizers_and_length")},
        "seed": job.config.training.seed,
    }
    stored = _read(folder / LAYERS, made_from)
    if stored is not None:
        log.info("student: %s (as chosen when this run began)", stored)
        return stored

    choice = measure(job)
    log.info("student: %s", choice)
    if choice.changes:
        log.debug("angle by which each layer turns the hidden states: %s", _described(choice))

    write_json(folder / LAYERS, {"made_from": made_from, **asdict(choice)})
    return choice


def measure(job: Job) -> LayerChoice:
    """Choose layers for the student by a whole model, which is loaded for it; a model can be made of them.

    Raises:
        UserError: the model cannot be loaded, has fewer layers, or cannot be made of these.
    """
    student = job.config.student
    device = job.accelerator.device
    # A GPU may have too little memory for all of it in float32; no weight of it is trained.
    dtype = torch.float32
    if device.type != "cpu":
        dtype = frozen_dtype("auto", device, job.accelerator.mixed_precision).value

    model = loading.load_model(student.name, "student", dtype, device, allow_pickle=student.allow_pickle)
    choice = layers.choose_layers(model, student.layers, measured_windows(job))
    # Now, and not after the hours that a cache of the teacher may take.
    layers.require_kept(model, choice.indices)
    return choice


def measured_windows(job: Job) -> list[torch.Tensor]:
    """Return windows of the training text as token ids [n] of the student, without padding."""
    batches: list[Batch] = loader.some_batches(
        job.windows, job.collate, MEASURED_WINDOWS, MEASURED_WINDOWS, job.config.training.seed
    )
    windows = []
    for batch in batches:
        for ids, mask in zip(batch.student_ids, batch.student_mask, strict=True):
            windows.append(ids[mask.bool()])
    return windows


def _described(choice: LayerChoice) -> str:
    """Return the angles in degrees, those of the layers that were taken in brackets."""
    angles = []
    for index, change in enumerate(choice.changes):
        angle = f"{180 * change:.1f}"
        angles.append(f"[{angle}]" if index in choice.indices else angle)
    return " ".join(angles)


def _read(file: Path, made_from: dict[str, Any]) -> LayerChoice | None:
    """Return the stored choice; None: there is none, or it was made from something else."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored.pop("made_from") != made_from:
            return None
        return LayerChoice(tuple(stored["indices"]), stored["depth"], stored["reason"], tuple(stored["changes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
