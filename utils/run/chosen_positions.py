"""The positions that KD is learned at where the student before training decides (`loss.select_by: first_student`).

They are a column of the windows, chosen once and kept on disk: neither the teacher nor its cache sees the others.
"""

import io
import json
import logging
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from ..config.protocols import share_chosen_before
from ..files import write_bytes
from ..logs.lines import in_percent
from ..paths import cache_dir
from ..pretrained import loading
from ..pretrained import student as students
from .prepare import Job
from .session import Session

log = logging.getLogger("train")

COLUMN = "places"
"""Name that the collator reads (`models.text.collate.PLACES`)."""


def choose(job: Job, session: Session) -> Job:
    """Return the job whose windows know the positions that KD is learned at; of several processes the first chooses.

    Raises:
        UserError: the student cannot be loaded.
    """
    rows, lengths = session.main_first(lambda: _read(_file(job)) or _choose_and_store(job, session))
    share = share_chosen_before(job.config)
    log.info(
        "positions for KD: %s of %s, at most %s of a window, where the student before training is most in doubt",
        f"{int((rows >= 0).sum()):,}",
        f"{len(rows):,}",
        in_percent(share),
    )
    return replace(job, windows=with_column(job.windows, rows, lengths))


def with_column(windows: Dataset, rows: np.ndarray, lengths: np.ndarray) -> Dataset:
    """Return windows with a column of their positions' places.

    Args:
        rows: places of all windows, one behind the other.
        lengths: number of places of each window.
    """
    ends = np.append(0, np.cumsum(lengths)).astype(np.int64)
    column = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(rows))
    return windows.add_column(COLUMN, column)


def _choose_and_store(job: Job, session: Session) -> tuple[np.ndarray, np.ndarray]:
    """Return (places of all windows, number of places of each), after a pass of the student over the training text."""
    config = job.config
    student = students.make(config.student, config.training, job.accelerator, job.layers)
    size = cast(int, config.training.batch_size)  # `auto` is a number by now
    share = share_chosen_before(config)

    places: list[np.ndarray] = []
    with session.progress.over("choosing positions", len(job.windows), "student window") as note:
        for first in range(0, len(job.windows), size):
            part = range(first, min(first + size, len(job.windows)))
            batch: Any = job.collate([job.windows[index] for index in part])
            places += job.pair.places_of(batch, student, share)
            note(len(part))
    del student
    if job.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()

    # A window has fewer rows than its tokens, of which there are hardly ever more than 32,767.
    rows = np.concatenate(places)
    narrow = np.int16 if rows.max(initial=0) <= np.iinfo(np.int16).max else np.int32
    lengths = np.array([len(part) for part in places])
    content = io.BytesIO()
    np.savez(content, rows=rows.astype(narrow), lengths=lengths)
    file = _file(job)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, content.getvalue())
    return rows.astype(narrow), lengths


def _file(job: Job) -> Path:
    """Return the file of a choice, whose name is a hash of all that it depends on."""
    config = job.config
    made_from = {
        "student": loading.weights_fingerprint(cast(str, config.student.name), "student"),
        "layers": None if job.layers is None else asdict(job.layers)["indices"],
        "vocabulary_map": job.vocabulary.fingerprint,
        "max_depth": config.loss.max_depth,
        "share": share_chosen_before(config),
        **{key: job.fingerprint[key] for key in ("training_text", "tokenizers_and_length")},
    }
    key = blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_dir() / "positions" / f"{key}.npz"


def _read(file: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a stored choice; None: there is none, or it cannot be read."""
    try:
        with np.load(file) as stored:
            return stored["rows"], stored["lengths"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
