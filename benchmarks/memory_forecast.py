"""Forecast of memory for the shipped recipes, and for what changes it: the table of docs/recipes.md.

    python -m benchmarks.memory_forecast

It is the forecast that `train.py` logs before it loads anything (`utils.memory`), for GPUs that need not be there.
Models: the shapes of Qwen2.5-1.5B and of SmolLM2 without content; nothing is downloaded. Nothing here is measured.
"""

from types import SimpleNamespace
from unittest import mock

import torch

import train
from benchmarks.measure import table
from benchmarks.step_time import STUDENT_VOCABULARY, TEACHER_VOCABULARY, shapes
from models.fused_head import chunk_rows
from utils import memory
from utils.hardware import choose_precision

GPU = torch.device("cuda", 0)
CARDS = {"P100": ((6, 0), 16), "T4": ((7, 5), 16), "24 GB": ((8, 6), 24)}
"""Compute capability and nominal GB; they decide the precision, and how many logits there are at a time."""
WIDER = ["--batch-size 4 --gradient-accumulation-steps 4", "--batch-size 8 --gradient-accumulation-steps 2"]
STATES = "--set curriculum.feat.weight=1 curriculum.attn.weight=1"
SMALLER = ["--gradient-checkpointing", "--lora", "--teacher-dtype 4bit", "--teacher-device cuda:1"]
ROWS = (
    [("P100", "kaggle_p100", "smollm2-360m", flags) for flags in ("", *WIDER, *SMALLER, STATES)]
    + [("P100", "kaggle_p100", "smollm2-135m", flags) for flags in ("", WIDER[1])]
    + [("T4", "kaggle_p100", "smollm2-360m", flags) for flags in ("", WIDER[0])]
    + [("24 GB", "single_24gb", "smollm2-360m", flags) for flags in ("", *WIDER)]
)
"""Card, recipe, student, flags."""


def forecast(card: str, recipe: str, student: str, flags: str) -> dict[str, int]:
    """Bytes at the peak of a step, by what holds them."""
    config = train.configure(["--config", recipe, *flags.split()])[0]
    capability, size = CARDS[card]
    properties = SimpleNamespace(total_memory=int(size * 1e9))
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "get_device_name", return_value=card),
    ):
        precision = choose_precision(config.training.mixed_precision, GPU).value
        models = shapes(student, TEACHER_VOCABULARY, STUDENT_VOCABULARY)[::-1]
        demand = memory.demand_of(config, *models, config.data.max_length, precision, GPU, chunk_rows)
        return demand.memory(config.training.batch_size)


def main() -> None:
    rows = []
    for card, recipe, student, flags in ROWS:
        parts = forecast(card, recipe, student, flags)
        largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
        told = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in largest)
        rows.append([card, recipe, student, f"`{flags}`" if flags else "", f"{sum(parts.values()) / 2**30:.1f}", told])
    print("FORECAST; nothing here was measured. Teacher: Qwen2.5-1.5B.\n")
    print(table(["card", "recipe", "student", "flags beside", "GiB", "largest parts, GiB"], rows))


if __name__ == "__main__":
    main()
