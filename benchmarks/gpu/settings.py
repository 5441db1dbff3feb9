"""Sizes of the measurements, chosen by the memory of the card, and the argument of every part."""

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.step_time import STUDENT_VOCABULARY, TEACHER_VOCABULARY
from utils.machine.hardware import choose_precision

ROOT = Path(__file__).resolve().parents[2]
"""Folder of the checkout, with train.py and verify_fixes.py."""


@dataclass(frozen=True)
class Scale:
    """Sizes of the measurements."""

    name: str
    shape: str
    """Of the two models, as `benchmarks.step_time.shapes` names it."""
    teacher_vocabulary: int
    student_vocabulary: int
    steps: tuple[tuple[int, int], ...]
    """(windows, tokens of each) of the measured micro-batches."""
    heads: tuple[tuple[int, int], ...]
    """(vocabulary, tokens) of the measured heads."""
    head_width: int
    train_windows: tuple[int, int]
    """(micro-batch, accumulation) of the end-to-end runs."""
    train_length: int
    train_steps: int
    matrix: int
    """Side of the square matrices whose product is timed."""
    copied: int
    """Bytes of the copy that is timed."""
    attended: int
    """Tokens of a window that attention reads."""
    repeats: int

    @property
    def is_toy(self) -> bool:
        """True: figures say only that the measurement runs."""
        return self.name == "toy"


# All sizes but the toy ones are of true models; the memory of a card decides how many tokens there are at once.
_TRUE = {
    "teacher_vocabulary": TEACHER_VOCABULARY,
    "student_vocabulary": STUDENT_VOCABULARY,
    "head_width": 960,
    "train_length": 512,
    "train_steps": 24,
    "matrix": 8192,
    "copied": 2**31,
    "attended": 1024,
    "repeats": 5,
}

TOY = Scale(
    name="toy",
    shape="tiny",
    teacher_vocabulary=3_000,
    student_vocabulary=1_000,
    steps=((2, 32),),
    heads=((1_000, 64),),
    head_width=64,
    train_windows=(2, 1),
    train_length=64,
    train_steps=3,
    matrix=64,
    copied=2**20,
    attended=64,
    repeats=2,
)
SMALL = Scale(
    name="8 GB",
    shape="smollm2-135m",
    steps=((2, 512),),
    heads=((STUDENT_VOCABULARY, 1024),),
    train_windows=(2, 8),
    **_TRUE,
)
MEDIUM = Scale(
    name="16 GB",
    shape="smollm2-360m",
    steps=((2, 512), (4, 512)),
    heads=((STUDENT_VOCABULARY, 1024), (STUDENT_VOCABULARY, 4096)),
    train_windows=(2, 8),
    **_TRUE,
)
LARGE = Scale(
    name="32 GB and more",
    shape="smollm2-360m",
    steps=((2, 512), (8, 1024)),
    heads=((STUDENT_VOCABULARY, 1024), (STUDENT_VOCABULARY, 8192), (TEACHER_VOCABULARY, 4096)),
    train_windows=(8, 2),
    **_TRUE,
)
BY_MEMORY = (
    # Somewhat less than the names say: the driver takes a part of every card.
    (30, LARGE),
    (14, MEDIUM),
    (7.5, SMALL),
)
"""(least GiB of the card, sizes)."""


def choose_scale(device: torch.device, toy: bool) -> Scale:
    """Return the largest sizes that the memory of a card allows; toy sizes on a CPU and on request."""
    if toy or device.type != "cuda":
        return TOY

    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    for least, scale in BY_MEMORY:
        if memory >= least:
            return scale
    return TOY


class Skipped(Exception):
    """A part, or the rest of it, cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Bench:
    """Argument of every part: the device, the sizes, and the folders."""

    device: torch.device
    scale: Scale
    work: Path
    """Folder for models and runs; removed at the end of the command."""
    data: Path | None = None
    """The user's folder with tokenizers/ and models/."""
    pair: tuple[str, str] | None = None
    """Names below models/ of the real teacher and student."""
    seconds: float = 600.0
    """Time limit of the part."""

    def require_precision(self, precision: str) -> None:
        """Raise `Skipped` where the device does not train in a precision, with the reason."""
        choice = choose_precision(precision, self.device)
        if choice.value != precision:
            raise Skipped(choice.reason)

    def precisions(self) -> list[str]:
        """Return those of bf16, fp16 and float32 ("no") in which the device trains."""
        names = []
        for name in ("bf16", "fp16", "no"):
            if choose_precision(name, self.device).value == name:
                names.append(name)
        return names
