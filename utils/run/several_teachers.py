"""A run with several teachers: its job with each of them alone, and these put together again.

Whatever a run does with a single teacher (load it, measure it, keep what it says in a cache) is done with each part.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from datasets import Dataset

from ..interfaces import Teacher
from ..pretrained import teacher as teachers
from ..pretrained.named import teachers_by_role
from ..pretrained.precision import frozen_dtype
from .prepare import Job, text_starts

log = logging.getLogger("train")


def with_parts(job: Job) -> Job:
    """Return the job with a part for each of several teachers; as it is, where there is one.

    Raises:
        UserError: a teacher's device does not exist.
    """
    if not job.config.several_teachers:
        return job
    roles = enumerate(teachers_by_role(job.config))
    return replace(job, parts=tuple(_part(job, number, role) for number, role in roles))


def _part(job: Job, number: int, role: str) -> Job:
    """Return the job with one of several teachers.

    Args:
        number: of the teacher, from 0.
        role: name of its side in the windows.
    """
    # 1. The settings of a run with this teacher; each has a cache of its own.
    model = job.config.several_teachers[number]
    cache = job.config.cache
    if cache.folder is not None:
        cache = replace(cache, folder=f"{cache.folder}/{role}")
    config = replace(job.config, teachers=[], teacher=model, cache=cache)
    device = teachers.choose_teacher_device(config, job.accelerator)

    # 2. The text as the student and this teacher read it.
    pair = job.pair.members[number]
    held_out = replace(
        job.held_out,
        windows=windows_of_part(job.held_out.windows, role),
        collate=pair.collate,
        tokenizers=pair.tokenizers,
        starts=text_starts(config, pair),
    )
    return replace(
        job,
        config=config,
        method=pair.method,
        pair=pair,
        collate=pair.collate,
        windows=windows_of_part(job.windows, role),
        held_out=held_out,
        teacher_name=model.name,
        weight_at=partial(job.pair.weight_of_member, number),
        routes=job.config.routes_of_teachers[number],
        teacher_device=device,
        teacher_dtype=frozen_dtype(model.dtype, device, job.accelerator.mixed_precision),
    )


def windows_of_part(windows: Any, role: str) -> Dataset:
    """Return windows with the columns of the student and of one teacher, which are called as a single teacher's."""
    others = [name for name in windows.column_names if name.startswith("teacher") and name.rpartition("_")[0] != role]
    windows = windows.remove_columns(others)
    renamed = {name: f"teacher_{name.rpartition('_')[2]}" for name in windows.column_names if name.startswith(role)}
    return windows.rename_columns({before: after for before, after in renamed.items() if before != after})


def joined(job: Job, parts: Sequence[Job]) -> Job:
    """Return the job of all teachers with other parts, whose collators may remember what their teachers said."""
    # A cache decides how many outcomes of its teacher there are.
    top_k = max(part.config.loss.top_k for part in parts)  # type: ignore[type-var]
    config = replace(job.config, loss=replace(job.config.loss, top_k=top_k))
    held_out = replace(job.held_out, collate=job.pair.collate_mixed([part.held_out.collate for part in parts]))
    return replace(
        job,
        config=config,
        collate=job.pair.collate_mixed([part.collate for part in parts]),
        held_out=held_out,
        parts=tuple(parts),
    )


def measure(parts: Sequence[Job], measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what was measured of the best of several teachers on the held-out text, with the metrics of all.

    The mixture itself has no bits per byte: what it says of a token in pieces depends on the student's tokens.

    Args:
        measured: `HeldOut.measure_teacher` of each.
    """
    of_all = []
    for part, of_one in zip(parts, measured, strict=True):
        name = part.config.teacher.name
        of_all.append({"name": name, **of_one["metrics"]})
        log.info("teacher %s: %.4f bits/byte on held-out text", name, of_one["metrics"]["bits_per_byte"])

    best = min(measured, key=lambda of_one: of_one["metrics"]["bits_per_byte"])
    return {**best, "metrics": {**best["metrics"], "teachers": of_all}}


def mixture(job: Job, of_parts: Sequence[Teacher | None]) -> Teacher:
    """Return one teacher of those of the parts."""
    return job.pair.mixture([teacher for teacher in of_parts if teacher is not None])
