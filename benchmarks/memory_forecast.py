"""Forecast of memory for the shipped recipes, and for what changes it: the table of docs/recipes.md.

    python -m benchmarks.memory_forecast

It is the forecast that `train.py` logs before it loads anything (`utils.forecast`), for hardware that need not be
there. Models: the shapes of Qwen2.5-1.5B and of SmolLM2, or of the quickstart's pair, without content; nothing is
downloaded, and nothing is measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from transformers import PretrainedConfig

import train
from benchmarks.measure import table
from benchmarks.step_time import STUDENT_VOCABULARY, TEACHER_VOCABULARY, shapes
from models.losses.chunk_size import chunk_rows
from utils.config import quickstart_names
from utils.forecast import step_memory
from utils.machine.hardware import choose_precision
from utils.run import quickstart

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
GIB = 2**30


class Card(NamedTuple):
    """Facts about a card that decide the precision, and how many logits there are at a time."""

    capability: tuple[int, int]
    gigabytes: int
    """Nominal: 1e9 bytes."""


CARDS = {
    "P100": Card((6, 0), 16),
    "T4": Card((7, 5), 16),
    # Of two GPUs each has the whole pair: DDP keeps no second copy of the gradients.
    "T4 x2, each": Card((7, 5), 16),
    "24 GB": Card((8, 6), 24),
}


class Row(NamedTuple):
    """A row of the table: a run of `train.py` on a card."""

    card: str
    """A key of `CARDS`, or CPU."""
    recipe: str
    student: str
    flags: str = ""
    """Flags beside the recipe."""


# Larger micro-batches at the same number of windows per step.
BATCH_4 = "--batch-size 4 --gradient-accumulation-steps 4"
BATCH_8 = "--batch-size 8 --gradient-accumulation-steps 2"
BATCH_4_ON_TWO = "--batch-size 4 --gradient-accumulation-steps 2"

HIDDEN_STATE_TERMS = "--set curriculum.feat.weight=1 curriculum.attn.weight=1"

ROWS = (
    # The smallest card, with all that makes a run larger or smaller.
    Row("P100", "kaggle_p100", "smollm2-360m"),
    Row("P100", "kaggle_p100", "smollm2-360m", BATCH_4),
    Row("P100", "kaggle_p100", "smollm2-360m", BATCH_8),
    Row("P100", "kaggle_p100", "smollm2-360m", "--gradient-checkpointing"),
    Row("P100", "kaggle_p100", "smollm2-360m", "--lora"),
    Row("P100", "kaggle_p100", "smollm2-360m", "--teacher-dtype 4bit"),
    Row("P100", "kaggle_p100", "smollm2-360m", "--teacher-device cuda:1"),
    Row("P100", "kaggle_p100", "smollm2-360m", HIDDEN_STATE_TERMS),
    Row("P100", "kaggle_p100", "smollm2-135m"),
    Row("P100", "kaggle_p100", "smollm2-135m", BATCH_8),
    # The same recipe in another precision.
    Row("T4", "kaggle_p100", "smollm2-360m"),
    Row("T4", "kaggle_p100", "smollm2-360m", BATCH_4),
    Row("T4 x2, each", "kaggle_t4x2", "smollm2-360m"),
    Row("T4 x2, each", "kaggle_t4x2", "smollm2-360m", BATCH_4_ON_TWO),
    # Larger machines and none at all.
    Row("24 GB", "single_24gb", "smollm2-360m"),
    Row("24 GB", "single_24gb", "smollm2-360m", BATCH_4),
    Row("24 GB", "single_24gb", "smollm2-360m", BATCH_8),
    Row("CPU", "quickstart", quickstart_names.STUDENT),
    Row("CPU", "quickstart", "smollm2-135m"),
)


def forecast(card: str, recipe: str, student: str, flags: str) -> dict[str, int]:
    """Return the bytes at the peak of a step by their purpose.

    Args:
        card, recipe, student, flags: as in `Row`.
    """
    config = train.configure(["--config", recipe, *flags.split()])[0]
    teacher_config, student_config = pair_of(student)
    if card == "CPU":
        return forecast_on(CPU, config, student_config, teacher_config)

    with pretended(card):
        return forecast_on(GPU, config, student_config, teacher_config)


@contextmanager
def pretended(card: str) -> Iterator[None]:
    """Let torch say, for a while, that this machine has a card."""
    capability, gigabytes = CARDS[card]
    properties = SimpleNamespace(total_memory=int(gigabytes * 1e9))
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "get_device_name", return_value=card),
    ):
        yield


def pair_of(student: str) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Return the configs of (teacher, student) for the name of a student."""
    if student != quickstart_names.STUDENT:
        return shapes(student, TEACHER_VOCABULARY, STUDENT_VOCABULARY)

    teacher = quickstart.teacher_config(quickstart.TEACHER_VOCABULARY)
    return teacher, quickstart.student_config(quickstart.STUDENT_VOCABULARY)


def forecast_on(
    device: torch.device, config: train.RunConfig, student: PretrainedConfig, teacher: PretrainedConfig
) -> dict[str, int]:
    """Return the bytes at the peak of a run's step on a device, by their purpose."""
    setting = step_memory.StepSetting(
        student=student,
        teachers=(teacher,),
        length=config.data.max_length,
        precision=choose_precision(config.training.mixed_precision, device).value,
        device=device,
        chunk_rows=chunk_rows,
    )
    return step_memory.demand_of(config, setting).memory(config.training.batch_size)


def largest(parts: dict[str, int], number: int) -> str:
    """Return the largest parts of a forecast in words, in GiB."""
    by_size = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in by_size[:number])


def main() -> None:
    """Print the table."""
    cells = []
    for row in ROWS:
        parts = forecast(row.card, row.recipe, row.student, row.flags)
        cells.append(
            [
                row.card,
                row.recipe,
                row.student,
                f"`{row.flags}`" if row.flags else "",
                f"{sum(parts.values()) / GIB:.1f}",
                largest(parts, 3),
            ]
        )

    print("FORECAST; nothing here was measured. Teacher: Qwen2.5-1.5B, or the quickstart's.\n")
    print(table(["card", "recipe", "student", "flags beside", "GiB", "largest parts, GiB"], cells))


if __name__ == "__main__":
    main()
