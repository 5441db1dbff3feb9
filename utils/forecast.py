"""How much memory and disk a run will take: plain sums, to find out in a second what would fail after an hour.

The factors were measured on the losses of `models/` with Llama-like models (torch 2.13): the student's logits exist in
chunks of a bounded size, the gradient of its head is one more copy of the head's weight, and a layer keeps 17 hidden
and 4 intermediate widths per token for its gradient. Expect the truth within a third for other architectures.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from .config import LoraConfig, TrainingConfig
from .errors import UserError

RUNTIME = 700 * 2**20
"""Bytes of CUDA context and kernels, or of Python with its libraries."""
LOGIT_COPIES = 2
"""Float32 copies of the student's chunk of logits: the buffer, one in half precision, and what is small beside them."""
HIDDEN_KEPT, INTERMEDIATE_KEPT = 17, 4
"""Widths that a layer keeps per token for the backward pass."""
TEACHER_COPIES = 2
"""Float32 copies of the teacher's chunk of logits: itself, one in half precision, and what is small beside them."""
WINDOW_BYTES_PER_TEXT_BYTE = 9
"""Tokenised windows of both models in the cache of `datasets`."""
ROUTED_KEPT = 10
"""Teacher widths in float32 that the router keeps per student layer and token for the backward pass, all terms used."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal language model."""

    parameters: int
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shape":
        """From a model's config; no weights are read or allocated."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            layers=text.num_hidden_layers,
            vocabulary=model.get_output_embeddings().weight.shape[0],
        )


def training_memory(
    student: Shape,
    teacher: Shape | None,
    *,
    tokens: int,
    precision: str,
    teacher_dtype: torch.dtype,
    logit_rows: int,
    routed_layers: int = 0,
    routed_teacher_layers: int = 0,
) -> dict[str, int]:
    """Bytes at the peak of a training step, by what holds them.

    Args:
        tokens: per forward pass (windows times their length).
        precision: `no`, `fp16` or `bf16`.
        teacher_dtype: of the teacher's weights.
        logit_rows: positions whose logits a head computes at a time, at most.
        routed_layers: student layers whose states a router compares with the teacher's; 0: there is none.
        routed_teacher_layers: teacher layers whose states it keeps.
    """
    width = 4 if precision == "no" else 2
    kept = HIDDEN_KEPT * student.hidden + INTERMEDIATE_KEPT * student.intermediate
    parts = {
        "student weights": student.parameters * (4 if precision == "no" else 6),  # autocast keeps half copies
        "gradients": student.parameters * 4,
        "optimizer": student.parameters * 8,
        "student activations": tokens * student.layers * kept * width,
        "student logits": min(tokens, logit_rows) * student.vocabulary * 4 * LOGIT_COPIES,
        "head gradient": student.vocabulary * student.hidden * 4,  # before it is added to the others
    }
    if teacher is not None:
        bytes_each = torch.finfo(teacher_dtype).bits // 8
        chunk = min(tokens, logit_rows) * teacher.vocabulary
        passing = tokens * (HIDDEN_KEPT * teacher.hidden + INTERMEDIATE_KEPT * teacher.intermediate) * bytes_each
        parts["teacher weights"] = teacher.parameters * bytes_each
        parts["teacher logits"] = chunk * 4 * TEACHER_COPIES + passing
        if routed_layers:
            ours, theirs = min(routed_layers, student.layers), min(routed_teacher_layers, teacher.layers)
            states = ours * (student.hidden + ROUTED_KEPT * teacher.hidden) + theirs * teacher.hidden
            trained = ours * student.hidden * (teacher.hidden + theirs)  # projections and gates
            parts["router"] = 4 * tokens * states + 16 * trained  # with gradient and two moments
    return parts | {"runtime": RUNTIME}


def disk(
    student: Shape,
    training: TrainingConfig,
    lora: LoraConfig,
    *,
    text_bytes: int = 0,
    runs: int = 1,
    in_memory: int = 0,
) -> dict[str, int]:
    """Bytes that a run writes, by what they are.

    Args:
        lora: with an adapter only that is saved, and exported unless it is merged.
        text_bytes: of the training text.
        runs: how many students are trained (2 with a comparison without the teacher).
        in_memory: up to so many bytes of text, windows are not written.
    """
    # a new checkpoint is whole before the oldest goes; with patience the best one stays besides
    checkpoints = training.keep_checkpoints + 1 + bool(training.patience)
    # attention has four layers of the hidden width, the rest three between it and the intermediate one
    widths = 8 * student.hidden + 3 * (student.hidden + student.intermediate)
    saved = student.layers * lora.rank * widths if lora.enabled else student.parameters
    return {
        "checkpoints": saved * 12 * checkpoints * runs,  # weights and two moments of AdamW
        "student": (student.parameters if lora.merge else saved) * 4,
        "windows": text_bytes * WINDOW_BYTES_PER_TEXT_BYTE if text_bytes > in_memory else 0,
    }


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def require_disk(folder: Path, parts: dict[str, int]) -> None:
    """Make sure, before models are loaded, that what a run will write finds room; what it wrote before counts.

    Raises:
        UserError: the estimate, and how much is free.
    """
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed, free = max(0, sum(parts.values()) - written), free_disk(folder)
    if needed > free:
        raise UserError(
            f"too little disk for {folder}: this run needs about {needed / 1e6:,.1f} MB more (checkpoints "
            f"{parts['checkpoints'] / 1e6:,.1f} and student {parts['student'] / 1e6:,.1f}, of which "
            f"{written / 1e6:,.1f} are there), and {free / 1e6:,.1f} MB are free. Free some space, choose another "
            "--output-dir, or lower training.keep_checkpoints."
        )


def largest(parts: dict[str, int], count: int = 3) -> str:
    """The total and its largest parts, such as `5.2 GiB (student logits 2.1, ...)`."""
    top = sorted(parts.items(), key=lambda part: -part[1])[:count]
    named = ", ".join(f"{name} {size / 2**30:.2g}" for name, size in top if size)
    return f"{sum(parts.values()) / 2**30:.3g} GiB ({named})"
