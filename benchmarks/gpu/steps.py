"""Parts about a training step: its time beside the bare models and its peers, its memory beside the forecast."""

import gc
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from unittest import mock

import torch

from benchmarks.gpu.settings import Bench
from benchmarks.gpu.timing import measure_fitting, ratio, seconds
from benchmarks.peers import KD, LM, OPTIONS
from benchmarks.step_time import DTYPES, StepWorks, random_batch, random_framework, random_windows, vocabulary_map
from models.config import LossConfig
from models.distillation_framework import DistillationFramework
from models.language_model import body_states
from models.losses import head_passes
from models.losses.losses import kd_loss, next_token_loss
from models.text.collate import PairCollator
from models.text.vocabulary import VocabularyMap
from utils.machine.hardware import configure_backends

GIB = 2**30
T4_CAPABILITY = (7, 5)
LIGER_ROWS = 1024
"""Rows of logits that Liger's loss has at once."""

# Titles of the works of a step.
OURS = "this project"
BARE = "bare models"
PLAIN = "plain PyTorch"
TEACHER = "its teacher"
LIGER = "Liger"


def step(bench: Bench, precision: str, as_t4: bool = False) -> Iterator[dict]:
    """Yield, per size, the time and memory of a micro-batch and of what does comparable work.

    Args:
        as_t4: no kernel that a T4 lacks, and a compute capability to choose by that is a T4's.
    """
    bench.require_precision(precision)

    with pretend_t4() if as_t4 else nullcontext():
        configure_backends(bench.device)
        vocabulary = _vocabulary(bench)
        framework = _framework(bench, vocabulary, precision)

        for windows, length in bench.scale.steps:
            batch = random_batch(vocabulary, windows, length).to(bench.device)
            works = PeerWorks(framework, batch, precision)
            for row in _rows(bench, works):
                yield {"size": f"{windows} x {length}", **row}

            # The works have logits of this size.
            del works
            _free(bench.device)


@contextmanager
def pretend_t4() -> Iterator[None]:
    """Enter a context in which attention and this project choose as on a T4, whatever the card.

    Passes of the head go step by step: compiled for a T4 they would not run here.
    """
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)

    step_by_step = (False, "step by step: this card is another one")
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=T4_CAPABILITY),
        mock.patch.object(head_passes, "can_compile", return_value=step_by_step),
    ):
        yield


class PeerWorks(StepWorks):
    """The works of a step, and others that come to a comparable gradient."""

    def bare_models(self) -> None:
        """Run both models by themselves: no loss is computed."""
        self.teacher_alone()
        self.student_alone()

    def plain(self) -> None:
        """Compute the same loss from all logits at once, with autograd."""
        with torch.no_grad():
            projection = self.framework.projection.to(self.batch.student_ids.device)
            target = projection(self.signal(), self.batch)
        with self.autocast():
            logits = self._student_logits()

        # LM at supervised positions, KD at those of them that have a target.
        logits = logits.flatten(0, 1)[self.batch.supervised].float()
        labels = self.batch.labels.flatten()[self.batch.supervised]
        lm = next_token_loss(logits, labels) / len(logits)
        kd = kd_loss(logits[self.batch.row_supervised], target, **OPTIONS) / len(target.ids)
        ((LM * lm + KD * kd) * self.loss_scale).backward()

    def liger(self) -> None:
        """Compute Liger's fused loss towards the teacher's full distribution.

        It knows one vocabulary only: the teacher's head is cut to the student's, and its states are repeated to as
        many as the student has. The values mean nothing, the work is that of such a pair.
        """
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

        student = self.framework.student
        teacher = self.framework.teacher.model
        weight = student.get_output_embeddings().weight
        teacher_weight = teacher.get_output_embeddings().weight[: len(weight)]
        loss = LigerFusedLinearJSDLoss(LM, KD, beta=0.0, compiled=False, chunk_size=LIGER_ROWS)

        with torch.no_grad():
            teacher_states = body_states(teacher, self.batch.teacher_ids).flatten(0, 1)
        with self.autocast():
            states = body_states(student, self.batch.student_ids).flatten(0, 1)
            rows = torch.arange(len(states), device=states.device) % len(teacher_states)
            labels = self.batch.labels.flatten()
            total = loss(states, weight, teacher_states[rows], teacher_weight, labels)
        (total * self.loss_scale).backward()


def _rows(bench: Bench, works: PeerWorks) -> Iterator[dict]:
    """Yield the rows of one size: works that were measured, then those that were not and why."""
    named = {
        OURS: works.step,
        BARE: works.bare_models,
        PLAIN: works.plain,
        TEACHER: works.signal,
    }
    if importlib.util.find_spec("liger_kernel"):
        named[LIGER] = works.liger
    measured = measure_fitting(
        named,
        bench.device,
        repeats=bench.scale.repeats,
        before=works.clear,
        foreign={LIGER},
    )

    for name, runs in measured.runs.items():
        row = {
            "what": name,
            "ms": seconds(runs) * 1e3,
            "host_ms": median(run.host for run in runs) * 1e3,
            "tokens_per_s": works.batch.counts["lm"] / seconds(runs),
            "MiB_above_models": max(run.peak for run in runs) / 2**20,
        }
        # A card that is too small for the bare models has no ratio.
        if BARE in measured.runs:
            row["times_bare"] = ratio(runs, measured.runs[BARE])
        if busy := measured.busy.get(name):
            row["busy_ms"] = busy * 1e3
            if bare := measured.busy.get(BARE):
                row["busy_times_bare"] = busy / bare
        yield row

    for name, reason in measured.failures.items():
        yield {"what": name, "result": reason}
    if LIGER not in named:
        yield {"what": LIGER, "result": "liger_kernel is not installed"}


# ------------------------------------------------------------------------------------------------------ memory


def forecast(bench: Bench) -> Iterator[dict]:
    """Yield, per precision and size, the counted peak of two optimizer steps of the real loop beside the forecast."""
    configure_backends(bench.device)

    for precision in bench.precisions():
        # The time goes to the precisions that people train in.
        if precision == "no":
            continue

        for windows, length in bench.scale.steps:
            row = {"precision": precision, "size": f"{windows} x {length}"}
            try:
                yield row | _peak_and_forecast(bench, precision, windows=windows, length=length)
            except torch.OutOfMemoryError:
                yield row | {"result": "out of memory"}
            _free(bench.device)


def _peak_and_forecast(bench: Bench, precision: str, *, windows: int, length: int) -> dict:
    """Train, and return the peak of memory in GiB beside its forecast."""
    vocabulary = _vocabulary(bench)

    # Both count the models, too.
    before = torch.cuda.memory_allocated(bench.device)
    framework = _framework(bench, vocabulary, precision)

    torch.cuda.reset_peak_memory_stats(bench.device)
    _train_two_steps(framework, vocabulary, precision, windows=windows, length=length)
    peak = torch.cuda.max_memory_allocated(bench.device) - before
    reserved = torch.cuda.max_memory_reserved(bench.device)

    predicted = _predicted(bench, framework, precision, windows=windows, length=length)
    return {
        "peak_GiB": peak / GIB,
        "reserved_GiB": reserved / GIB,
        "forecast_GiB": predicted / GIB,
        "forecast_over_peak": predicted / peak,
    }


def _train_two_steps(
    framework: DistillationFramework,
    vocabulary: VocabularyMap,
    precision: str,
    *,
    windows: int,
    length: int,
) -> None:
    """Train with the project's own loop and optimizer: two steps of two micro-batches."""
    from utils.config.settings import TrainingConfig
    from utils.logs.step_logger import StepLogger
    from utils.parallel.accelerator import temporary_accelerator
    from utils.training.loop import fit
    from utils.training.options import LoopOptions

    collate = PairCollator(vocabulary, (None, None), LossConfig().max_depth)
    text = random_windows(vocabulary, 4 * windows, length)
    config = TrainingConfig(batch_size=windows, gradient_accumulation_steps=2, epochs=1, max_steps=2)
    options = LoopOptions(logger=StepLogger(None, 10**6, 100, main_process=False))

    with temporary_accelerator(precision, cpu=False) as accelerator:
        fit(
            framework,
            text,
            collate,
            config,
            accelerator=accelerator,
            options=options,
        )


def _predicted(
    bench: Bench,
    framework: DistillationFramework,
    precision: str,
    *,
    windows: int,
    length: int,
) -> int:
    """Return the bytes that train.py would log for such a run, without those of CUDA itself."""
    import train
    from benchmarks.memory_forecast import forecast_on
    from utils.config.settings import DataConfig, ModelConfig, StudentConfig, TrainingConfig

    teacher = framework.teacher.model
    config = train.RunConfig(
        teacher=ModelConfig("teacher", dtype=str(teacher.dtype).removeprefix("torch.")),
        student=StudentConfig("student"),
        data=DataConfig(train=["text"], max_length=length),
        training=TrainingConfig(batch_size=windows, mixed_precision=precision),
    )
    parts = forecast_on(bench.device, config, student=framework.student.config, teacher=teacher.config)

    # torch's counters do not see CUDA's own memory.
    return sum(parts.values()) - parts["runtime"]


# ------------------------------------------------------------------------------------------------------ shared


def _vocabulary(bench: Bench) -> VocabularyMap:
    """Return a random map between vocabularies of the scale's sizes."""
    return vocabulary_map(bench.scale.teacher_vocabulary, bench.scale.student_vocabulary)


def _framework(bench: Bench, vocabulary: VocabularyMap, precision: str) -> DistillationFramework:
    """Return random models of the scale's shapes, the teacher in the dtype of the precision."""
    torch.manual_seed(0)
    return random_framework(
        bench.scale.shape,
        vocabulary,
        teacher_vocabulary=bench.scale.teacher_vocabulary,
        student_vocabulary=bench.scale.student_vocabulary,
        teacher_dtype=DTYPES[precision],
        device=bench.device,
    )


def _free(device: torch.device) -> None:
    """Give the memory of a measured size back to the card."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
