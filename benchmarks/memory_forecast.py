"""Forecast of memory for the shipped recipes, and for what changes it: the table of docs/recipes.md.

    python -m benchmarks.memory_forecast

It is the forecast that `train.py` logs before it loads anything (`utils.forecast`), for hardware that need not be
there. Models: the shapes of Qwen2.5-1.5B and of SmolLM2, or of the quickstart's pair, without content; nothing is
downloaded, and nothing is measured.
"""

from types import SimpleNamespace
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

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CARDS = {"P100": ((6, 0), 16), "T4": ((7, 5), 16), "T4 x2, each": ((7, 5), 16), "24 GB": ((8, 6), 24)}
"""Compute capability and nominal GB; they decide the precision, and how many logits there are at a time. Of two GPUs
each holds the whole pair (DDP keeps no second copy of the gradients)."""
WIDER = ["--batch-size 4 --gradient-accumulation-steps 4", "--batch-size 8 --gradient-accumulation-steps 2"]
TWICE = "--batch-size 4 --gradient-accumulation-steps 2"
STATES = "--set curriculum.feat.weight=1 curriculum.attn.weight=1"
SMALLER = ["--gradient-checkpointing", "--lora", "--teacher-dtype 4bit", "--teacher-device cuda:1"]
ROWS = (
    [("P100", "kaggle_p100", "smollm2-360m", flags) for flags in ("", *WIDER, *SMALLER, STATES)]
    + [("P100", "kaggle_p100", "smollm2-135m", flags) for flags in ("", WIDER[1])]
    + [("T4", "kaggle_p100", "smollm2-360m", flags) for flags in ("", WIDER[0])]
    + [("T4 x2, each", "kaggle_t4x2", "smollm2-360m", flags) for flags in ("", TWICE)]
    + [("24 GB", "single_24gb", "smollm2-360m", flags) for flags in ("", *WIDER)]
    + [("CPU", "quickstart", student, "") for student in (quickstart_names.STUDENT, "smollm2-135m")]
)
"""Card, recipe, student, flags."""


def forecast(card: str, recipe: str, student: str, flags: str) -> dict[str, int]:
    """Bytes at the peak of a step, by what holds them."""
    config = train.configure(["--config", recipe, *flags.split()])[0]
    teacher, own = pair_of(student)
    if card == "CPU":
        return forecast_on(CPU, config, own, teacher)
    capability, size = CARDS[card]
    properties = SimpleNamespace(total_memory=int(size * 1e9))
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "get_device_name", return_value=card),
    ):
        return forecast_on(GPU, config, own, teacher)


def pair_of(student: str) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Configs of (teacher, student)."""
    if student != quickstart_names.STUDENT:
        return shapes(student, TEACHER_VOCABULARY, STUDENT_VOCABULARY)
    teacher = quickstart.teacher_config(quickstart.TEACHER_VOCABULARY)
    return teacher, quickstart.student_config(quickstart.STUDENT_VOCABULARY)


def forecast_on(device: torch.device, config: train.RunConfig, *models: PretrainedConfig) -> dict[str, int]:
    """Bytes at the peak of a step on a device, by what holds them; models: configs of (student, teacher)."""
    precision = choose_precision(config.training.mixed_precision, device).value
    setting = step_memory.StepSetting(
        *models, config.data.max_length, precision=precision, device=device, chunk_rows=chunk_rows
    )
    return step_memory.demand_of(config, setting).memory(config.training.batch_size)


def main() -> None:
    rows = []
    for card, recipe, student, flags in ROWS:
        parts = forecast(card, recipe, student, flags)
        largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
        told = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in largest)
        rows.append([card, recipe, student, f"`{flags}`" if flags else "", f"{sum(parts.values()) / 2**30:.1f}", told])
    print("FORECAST; nothing here was measured. Teacher: Qwen2.5-1.5B, or the quickstart's.\n")
    print(table(["card", "recipe", "student", "flags beside", "GiB", "largest parts, GiB"], rows))


if __name__ == "__main__":
    main()
