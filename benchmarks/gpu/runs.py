"""Parts that are whole runs of train.py: end to end on true shapes, repeated, short of memory, with a real pair."""

import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest import mock

import torch

from benchmarks.gpu.made import PairFolders, real_pair, small_pair, true_pair
from benchmarks.gpu.settings import ROOT, Bench

TEACHER_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}
WAITING = re.compile(r"([\d.]+) % of this session was spent waiting for batches")
HALVED = "the step is done again"
"""Words of the log where memory ran out and the micro-batch was halved."""
TIGHT = 0.8
"""Share of the memory of a step that is left in the step after it."""


@dataclass(frozen=True)
class Run:
    """Folder of a run that has ended."""

    folder: Path
    status: int
    seconds: float

    @property
    def exported(self) -> bool:
        """True if the run has written a student."""
        return (self.folder / "student").is_dir()

    @property
    def log(self) -> str:
        """Text of train.log; empty where the run did not come as far."""
        file = self.folder / "train.log"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def steps(self) -> list[dict]:
        """Return the records of logged steps."""
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return []

        # Other records are of evaluations.
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [record for record in records if "tokens_per_second" in record]

    def summary(self) -> dict:
        """Return the cells of the run in a row of the table."""
        row = {"exit": self.status, "seconds": self.seconds, "exported": self.exported}

        # The first record has the time in which kernels are chosen and memory is reserved.
        if steps := self.steps():
            later_steps = steps[1:] or steps
            row["steps"] = steps[-1]["step"]
            row["tokens_per_s"] = median(step["tokens_per_second"] for step in later_steps)
            row["peak_GiB"] = max(step["peak_memory_mb"] for step in steps) / 1024
        if waiting := WAITING.search(self.log):
            row["waiting"] = float(waiting[1]) / 100
        if self.status:
            row["result"] = self.last_error()
        return row

    def last_error(self) -> str:
        """Return the last line of the log that tells of a failure."""
        errors = [line for line in self.log.splitlines() if re.search(r" (CRITICAL|ERROR) ", line)]
        if not errors:
            return "nothing in train.log; the part's own log has more"

        # Without the date, and no longer than a cell should be.
        return errors[-1][20:220]


def flags(pair: PairFolders, folder: Path, settings: list[str]) -> list[str]:
    """Return the command line of train.py, and of verify_fixes.py, for a pair.

    Args:
        folder: of the run.
        settings: `key=value`, over the default recipe.
    """
    paths = {
        "--teacher": pair.teacher,
        "--student": pair.student,
        "--train-data": pair.text,
        "--output-dir": folder,
    }
    flags = []
    for flag, path in paths.items():
        flags += [flag, str(path)]

    # What the default recipe says of its own text does not hold for this one.
    of_text = ["data.eval=null", "data.document_start=null"]
    # Longer texts would take most of the time, token by token; two of them, so that the shorter prompt is padded.
    of_evaluation = ["evaluation.max_windows=16", "evaluation.samples=1", "evaluation.generation=2"]
    of_evaluation += ["evaluation.new_tokens=8"]
    return [*flags, "--set", *of_text, *of_evaluation, *settings]


def _in_a_process(pair: PairFolders, folder: Path, settings: list[str]) -> Run:
    """Run train.py as users do."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "train.py", *flags(pair, folder, settings)]

    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
    return Run(folder, done.returncode, time.perf_counter() - began)


def _in_this_process(pair: PairFolders, folder: Path, settings: list[str]) -> Run:
    """Run train.py in this process: for short runs, and for one whose memory is taken away meanwhile."""
    from accelerate.state import AcceleratorState

    import train
    from utils.machine import kernels

    # The state of a run before may have another precision.
    AcceleratorState._reset_state(reset_partial_state=True)

    # Another Python would be started on the card each time, only to see that kernels run there.
    no_check = mock.patch.object(kernels, "check_kernels", return_value=None)

    began = time.perf_counter()
    with no_check, contextlib.redirect_stdout(sys.stderr):
        status = train.main(flags(pair, folder, settings))
    return Run(folder, status, time.perf_counter() - began)


def _precision_settings(precision: str) -> list[str]:
    """Return the settings of a precision, in which the teacher's weights are, too."""
    return [f"training.mixed_precision={precision}", f"teacher.dtype={TEACHER_DTYPES[precision]}"]


# -------------------------------------------------------------------------------------------------- end to end


def train(bench: Bench, precision: str) -> Iterator[dict]:
    """Yield speed, waiting and memory of a run on true shapes, its exit status, and whether it exported a student."""
    bench.require_precision(precision)
    pair = true_pair(bench)
    windows, accumulation = bench.scale.train_windows

    # On a slow card the run ends itself before the part's time is over: evaluation and export come after the steps.
    hours = 0.6 * bench.seconds / 3600
    settings = [
        *_precision_settings(precision),
        f"training.batch_size={windows}",
        f"training.gradient_accumulation_steps={accumulation}",
        f"training.max_steps={bench.scale.train_steps}",
        f"training.max_hours={hours:.4f}",
        f"data.max_length={bench.scale.train_length}",
        f"logging.every={max(1, bench.scale.train_steps // 8)}",
    ]
    folder = bench.work / f"train-{precision}"
    run = _in_a_process(pair, folder, settings)

    size = f"{windows} x {bench.scale.train_length}, {accumulation} micro-batches a step"
    yield {"precision": precision, "size": size, "tokenizers": pair.tokenizers, **run.summary()}
    shutil.rmtree(folder, ignore_errors=True)


# -------------------------------------------------------------------------------------------------- repetition


def repeat(bench: Bench, deterministic: bool) -> Iterator[dict]:
    """Yield, per precision, whether weights are the same bits when a run is repeated and when it is continued.

    Args:
        deterministic: with the setting that asks torch for deterministic kernels.
    """
    settings = [*_small_settings(8), "training.save_every=4"]
    if deterministic:
        settings.append("training.deterministic=true")

    # Float32 only where there is nothing else: the time goes to the precisions that people train in.
    precisions = [name for name in bench.precisions() if name != "no"] or ["no"]
    pair = small_pair(bench)
    for precision in precisions[:1] if bench.scale.is_toy else precisions:
        folders = [bench.work / f"repeat-{precision}-{number}-{deterministic}" for number in (1, 2)]
        row = _repeat_and_continue(pair, folders, [*_precision_settings(precision), *settings])
        if "result" not in row:
            row = {"deterministic": deterministic, **row}
        yield {"precision": precision, **row}


def _repeat_and_continue(pair: PairFolders, folders: list[Path], settings: list[str]) -> dict:
    """Do a run of eight steps twice, then the second half of it once more; return the comparison of their weights.

    Args:
        folders: of the two runs.
    """
    runs = [_in_this_process(pair, folder, settings) for folder in folders]
    if failed := [run for run in runs if run.status]:
        return {"result": failed[0].last_error()}

    first_digest = _digest(folders[0] / "student")
    second_digest = _digest(folders[1] / "student")

    # As if the second run had been killed behind step 4.
    shutil.rmtree(folders[1] / "checkpoints" / "step-00000008")
    shutil.rmtree(folders[1] / "student")
    continued = _in_this_process(pair, folders[1], settings)

    return {
        "again": "same bits" if first_digest == second_digest else "other bits",
        "continued": _compare_digest(continued, second_digest),
        "seconds_a_run": median(run.seconds for run in runs),
    }


def _small_settings(steps: int) -> list[str]:
    """Return the settings of a run on the small pair that logs every step."""
    return [
        "training.batch_size=4",
        "training.gradient_accumulation_steps=1",
        f"training.max_steps={steps}",
        "data.max_length=64",
        "logging.every=1",
    ]


def _digest(folder: Path) -> str:
    """Return the hash of a student's weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _compare_digest(run: Run, digest: str) -> str:
    """Return, in words, whether a run has weights of this hash."""
    if run.status:
        return run.last_error()
    return "same bits" if _digest(run.folder / "student") == digest else "other bits"


# ---------------------------------------------------------------------------------------------- short of memory


def tight(bench: Bench) -> Iterator[dict]:
    """Yield the end of a run whose fourth step has less memory than its third took."""
    from utils.training.loop import TrainingLoop

    # Windows enough that what they take counts: torch's allocator takes memory in blocks of 20 MiB.
    precision = bench.precisions()[0]
    settings = [*_precision_settings(precision), *_small_settings(6)]
    if not bench.scale.is_toy:
        settings += ["training.batch_size=64", "data.max_length=256"]
    advance = TrainingLoop.advance
    limits: list[float] = []

    def advance_with_less_memory(loop: TrainingLoop, *arguments: object) -> object:
        if loop.step == 2:
            torch.cuda.reset_peak_memory_stats(bench.device)
        # Once: the fourth step comes here again when it is done with smaller micro-batches.
        if loop.step == 3 and not limits:
            limits.append(_leave_less_memory(bench.device))
        return advance(loop, *arguments)

    with mock.patch.object(TrainingLoop, "advance", advance_with_less_memory):
        run = _in_this_process(small_pair(bench), bench.work / "tight", settings)

    yield {
        "precision": precision,
        "limit_MiB": limits[0] / 2**20 if limits else None,
        "halved": run.log.count(HALVED),
        **run.summary(),
    }


def _leave_less_memory(device: torch.device) -> float:
    """Take memory away from torch's allocator; return the bytes that it may have from now on."""
    torch.cuda.empty_cache()
    allocated = torch.cuda.memory_allocated(device)
    peak = torch.cuda.max_memory_allocated(device)
    limit = allocated + TIGHT * (peak - allocated)

    # The allocator knows the limit only as a share of the card.
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    return limit


# ------------------------------------------------------------------------------------------------- a real pair


def real_pair_run(bench: Bench) -> Iterator[dict]:
    """Yield the evaluation of the user's own pair before and after some steps, in each precision."""
    teacher, student = real_pair(bench)
    corpora = sorted((bench.data / "corpora").glob("*.txt"))
    text = corpora[0] if corpora else small_pair(bench).text
    pair = PairFolders(teacher, student, text, "their own")

    # Each precision has a run of its own, float32 only where there is no other. Its time includes what comes before
    # the first step; another evaluation and the export come after the last one.
    precisions = [name for name in bench.precisions() if name != "no"] or ["no"]
    if bench.scale.is_toy:
        precisions = precisions[:1]
    hours = 0.7 * bench.seconds / len(precisions) / 3600
    for precision in precisions:
        settings = [
            *_precision_settings(precision),
            "training.batch_size=4",
            "training.gradient_accumulation_steps=1",
            f"training.max_steps={bench.scale.train_steps}",
            f"training.max_hours={hours:.4f}",
            "data.max_documents=2000",
            "data.max_length=256",
            "logging.every=1",
        ]
        run = _in_a_process(pair, bench.work / f"pair-{precision}", settings)
        yield {"teacher": teacher.name, "student": student.name, "precision": precision, **_evaluated(run)}


def _evaluated(run: Run) -> dict:
    """Return bits per byte of the teacher and of the student before and after, and the cells of the run."""
    file = run.folder / "evaluation_report.json"
    if not file.exists():
        return run.summary()

    report = json.loads(file.read_text(encoding="utf-8"))
    columns = {"teacher": "teacher_bits_per_byte", "initial_student": "before", "student": "after"}
    scores = {}
    for model, column in columns.items():
        # A model that a run did not come to measure is null.
        if report.get(model):
            scores[column] = report[model]["bits_per_byte"]
    return scores | run.summary()
