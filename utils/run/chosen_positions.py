"""The positions that KD is learned at where the student before training decides (`loss.select_by: first_student`).

They are a column of the windows: neither the teacher nor its cache sees the others. A choice is made once, and kept in
the run's folder, so that the run goes on with it on another machine too, and beside the user's other caches, for the
next run.
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
from ..run_layout import POSITIONS
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
    rows, lengths = session.main_first(lambda: _stored(job, session))
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


Choice = tuple[np.ndarray, np.ndarray]
"""Places of all windows, and the number of places of each."""


def _stored(job: Job, session: Session) -> Choice:
    """Return the choice of the run's folder, else that of the cache, else one that is made now; both have it then."""
    key = _key(job)
    files = [cache_dir() / "positions" / f"{key}.npz"]
    # Where a cache is only built, the run itself has not begun.
    if not job.config.cache.build_only:
        files.insert(0, session.output / POSITIONS)

    read = [_read(file, key) for file in files]
    choice = next((stored for stored in read if stored is not None), None) or _choose(job, session)
    for file, stored in zip(files, read, strict=True):
        if stored is None:
            _write(file, key, choice)
    return choice


def _choose(job: Job, session: Session) -> Choice:
    """Return a choice, after a pass of the student over the training text."""
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
    return rows.astype(narrow), np.array([len(part) for part in places])


def _key(job: Job) -> str:
    """Return a hash of all that a choice depends on."""
    config = job.config
    made_from = {
        "student": loading.weights_fingerprint(cast(str, config.student.name), "student"),
        "layers": None if job.layers is None else asdict(job.layers)["indices"],
        "vocabulary_map": job.vocabulary.fingerprint,
        "max_depth": config.loss.max_depth,
        "share": share_chosen_before(config),
        **{key: job.fingerprint[key] for key in ("training_text", "tokenizers_and_length")},
    }
    return blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write(file: Path, key: str, choice: Choice) -> None:
    """Store a choice."""
    rows, lengths = choice
    content = io.BytesIO()
    np.savez(content, rows=rows, lengths=lengths, key=np.array(key))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, content.getvalue())


def _read(file: Path, key: str) -> Choice | None:
    """Return a stored choice; None: there is none, it is that of something else, or it cannot be read."""
    try:
        with np.load(file) as stored:
            if str(stored["key"]) != key:
                return None
            return stored["rows"], stored["lengths"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
