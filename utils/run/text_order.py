"""The order of the training windows by difficulty (`data.order`), and how much of it is open in which step.

The teacher's bits per byte are asked for once and kept on disk: the order of a run that is continued is the same.
"""

import io
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
from accelerate.utils import gather_object

from ..config.protocols import values_of
from ..data.batch_order import Pacing
from ..files import write_bytes
from ..interfaces import Teacher
from ..logs.lines import in_percent
from ..paths import cache_dir
from ..training.plan import Plan
from .prepare import Job
from .session import Session
from .stages import flush_caches, teacher_identity

log = logging.getLogger("train")

UNITS = {"length": "bytes of a document", "teacher_loss": "bits per byte of the teacher"}
"""Orders of the training text -> what their scores are."""


def with_order(jobs: Sequence[Job], teacher: Teacher | None, session: Session) -> Sequence[Job]:
    """Return forms of one job whose windows are opened from the easiest on; as they are where the order is random.

    Called by all processes together.

    Args:
        jobs: the first one asks the teacher, through its cache if it has one.
    """
    job = jobs[0]
    order = job.config.data.order
    if order == "random":
        return jobs

    scores = job.lengths
    if order == "teacher_loss":
        assert teacher is not None, "refused by the contradictions"
        scores = _teacher_scores(job, teacher, session)
    assert scores is not None, "measured with the windows"

    # A stable sort: windows that are equally hard stay in the order of the text.
    by_ease = np.argsort(scores, kind="stable")
    plan = Plan.of(job.config.training, len(job.windows), job.accelerator.num_processes)
    pacing = Pacing(by_ease, job.method.open_text(plan.total_steps))
    _log_order(job, scores)
    session.notes["order of the text"] = f"{order}: {_range(order, scores)}"

    # A run is not continued in another order, should the scores come out otherwise.
    digest = blake2b(by_ease.astype("<i8").tobytes(), digest_size=16).hexdigest()
    return [replace(form, pacing=pacing, fingerprint={**form.fingerprint, "order_of_windows": digest}) for form in jobs]


def _log_order(job: Job, scores: np.ndarray) -> None:
    """Log the range of the scores, and the shares of the text that are open."""
    shares = values_of(job.config.curriculum.open_text)
    order = job.config.data.order
    log.info(
        "order of the text: the easiest of %s windows first, by %s; open (curriculum.open_text): %s",
        f"{len(scores):,}",
        _range(order, scores),
        " -> ".join(map(in_percent, shares)),
    )


def _range(order: str, scores: np.ndarray) -> str:
    """Return the scores in words: the least, the middle one and the greatest."""
    least, middle, most = np.quantile(scores, [0, 0.5, 1])
    digits = 0 if order == "length" else 3
    return f"{UNITS[order]}, {least:,.{digits}f} to {most:,.{digits}f}, half of them below {middle:,.{digits}f}"


# ---------------------------------------------------------------------------------------- the teacher's scores


def _teacher_scores(job: Job, teacher: Teacher, session: Session) -> np.ndarray:
    """Return the teacher's bits per byte of every window, stored or asked for now, by all processes together."""
    file = _file(job, teacher)
    stored = session.on_main(lambda: _read(file, len(job.windows)))
    if stored is not None:
        log.info("the teacher's bits per byte of the training text are in %s", file)
        return stored

    scores = _ask(job, teacher, session)
    content = io.BytesIO()
    np.savez(content, scores=scores)

    def store() -> None:
        """Write the scores to disk."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, content.getvalue())

    session.on_main(store)
    return scores


def _ask(job: Job, teacher: Teacher, session: Session) -> np.ndarray:
    """Return the teacher's bits per byte of every window, each process having asked about its share."""
    accelerator = job.accelerator
    size = cast(int, job.config.training.batch_size)  # `auto` is a number by now

    scores: dict[int, float] = {}
    share = _share(len(job.windows), accelerator.process_index, accelerator.num_processes)
    with session.progress.over("the teacher reads the training text", len(share), "teacher window") as note:
        for first in range(0, len(share), size):
            part = share[first : first + size]
            scores |= dict(zip(part, _bits_per_byte(job, teacher, part), strict=True))
            note(len(part))

    # A cache now has what the teacher said.
    flush_caches(job)
    every_score: dict[int, float] = {}
    for of_process in gather_object([scores]):
        every_score |= of_process
    return np.array([every_score[number] for number in range(len(job.windows))])


def _share(windows: int, rank: int, processes: int) -> list[int]:
    """Return the windows that a process asks about: the same number in each, for a sharded teacher they ask together.

    Some windows are asked about twice where they cannot be divided.
    """
    count = math.ceil(windows / processes)
    return [number % windows for number in range(rank * count, (rank + 1) * count)]


def _bits_per_byte(job: Job, teacher: Teacher, numbers: list[int]) -> Iterator[float]:
    """Yield the teacher's bits per byte of some windows."""
    batch: Any = job.collate([job.windows[number] for number in numbers])
    batch = batch.to(job.accelerator.device)

    signal = teacher.signal(batch, 1).to(job.accelerator.device)
    nats = batch.teacher_nll_by_window(signal).tolist()
    for of_window, size in zip(nats, batch.bytes.tolist(), strict=True):
        yield of_window / (max(size, 1) * math.log(2))


def _file(job: Job, teacher: Teacher) -> Path:
    """Return the file of the scores, whose name is a hash of all that they depend on."""
    made_from = {
        "teacher": teacher_identity(job, teacher),
        "dtype": str(job.teacher_dtype.value),
        **{key: job.fingerprint[key] for key in ("training_text", "tokenizers_and_length")},
    }
    key = blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_dir() / "difficulty" / f"{key}.npz"


def _read(file: Path, windows: int) -> np.ndarray | None:
    """Return stored scores; None: there are none for so many windows, or they cannot be read."""
    try:
        with np.load(file) as stored:
            scores = stored["scores"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return scores if len(scores) == windows else None
