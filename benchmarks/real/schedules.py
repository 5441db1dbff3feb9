"""Schedules and their opponents (`benchmarks.curricula`) on the pair of real models."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.curricula import CANDIDATES, Candidate, Demands, arms_of
from benchmarks.curricula import tables as tables_of_schedules
from models.distillation import Method
from models.losses.selection import STORED

from .arms import LOSS, WHOLE, Arm
from .pair import TEACHER

KIND = "schedule"
"""Kind of these results."""

DEMANDS = Demands(seeds=3, has_equal_time=False)
"""Every window is read once, so that there is no text for a constant that is trained as long as a schedule."""

Result = Mapping[str, Any]


def _is_of_one_step(candidate: Candidate) -> bool:
    """Return False of a schedule whose steps need what the step before has measured, or a choice made before them."""
    method = candidate.variant(candidate.schedule)
    curriculum = method.curriculum
    weighs_samples = curriculum.sample_weights != 0
    return curriculum.balance == "none" and not weighs_samples and method.loss.select_by != STORED


NAMES = [name for name, candidate in CANDIDATES.items() if _is_of_one_step(candidate)]
"""Schedules that can be tried on this pair."""


def arms(name: str, layers: int) -> Iterator[Arm]:
    """Yield the arms of a schedule: of a student of so many layers (0: the whole one), taught by the other model."""
    candidate = CANDIDATES[name]
    for arm, schedule in arms_of(candidate).items():
        variant = candidate.variant(schedule)
        loss = replace(variant.loss, top_k=LOSS.top_k)
        yield Arm(layers, TEACHER, arm, Method(loss, variant.curriculum), schedule=name)


def tables(results: Sequence[Result]) -> str:
    """Return a table for each schedule, and what it has earned."""
    return tables_of_schedules([_line(result) for result in results if result["kind"] == KIND], DEMANDS)


def _line(result: Result) -> dict[str, Any]:
    """Return a result as `benchmarks.curricula` writes it."""
    depth = "all" if result["layers"] == WHOLE else result["layers"]
    text = f"{result['tokens']:,} tokens, learning rate {result['rate']:g}"
    run = {
        "pair": f"SmolLM2-135M ({depth} of its layers) and Gemma 3 270M, {text}",
        "share": 1.0,
        "arm": result["name"],
    }
    run |= {name: result[name] for name in ("steps", "size", "schedule", "seed", "seconds", "kl", "top1")}

    written = result["written"]
    figures = {
        "bits_per_byte": result["bits"]["all"],
        "written": {
            "teacher_bits_per_byte": written["the teacher_bits_per_byte"],
            "repeated_4grams": written["repeated_4grams"],
        },
    }
    return run | figures
