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
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from unittest import mock

import torch

from benchmarks.gpu.made import PairFolders, real_pair, small_pair, true_pair
from benchmarks.gpu.settings import ROOT, Bench, Skipped

TEACHER_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}
WAITING = re.compile(r"([\d.]+) % of this session was spent waiting for batches")
HALVED = "the step is done again"
"""What the log says where memory ran out and the micro-batch was halved."""
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
        """Whether it left a student."""
        return (self.folder / "student").is_dir()

    @property
    def log(self) -> str:
        """train.log, or nothing where the run did not come as far."""
        file = self.folder / "train.log"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def steps(self) -> list[dict]:
        """Return the records of logged steps."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        records = [json.loads(line) for line in lines]
        return [record for record in records if "tokens_per_second" in record]

    def summary(self) -> dict:
        """Return what a row of the table says of the run."""
        row = {"exit": self.status, "seconds": self.seconds, "exported": self.exported}

        if steps := self.steps():
            row["steps"] = steps[-1]["step"]
            row["tokens_per_s"] = median(step["tokens_per_second"] for step in steps[1:] or steps)
            row["peak_GiB"] = max(step["peak_memory_mb"] for step in steps) / 1024
        if waiting := WAITING.search(self.log):
            row["waiting"] = float(waiting[1]) / 100
        if self.status:
            row["result"] = self.last_error()
        return row

    def last_error(self) -> str:
        """Return the last line of the log that tells of a failure."""
        errors = [line for line in self.log.splitlines() if re.search(r" (CRITICAL|ERROR) ", line)]
        return errors[-1][20:220] if errors else "nothing in train.log; the part's own log has more"


def _flags(pair: PairFolders, folder: Path, settings: list[str]) -> list[str]:
    """Return the command line of train.py for a pair; its text is all there is, the user's recipe has no say."""
    return [
        *("--teacher", str(pair.teacher)),
        *("--student", str(pair.student)),
        *("--train-data", str(pair.text)),
        *("--output-dir", str(folder)),
        "--set",
        "data.eval=null",
        "data.document_start=null",
        "evaluation.max_windows=16",
        "evaluation.samples=1",
        *settings,
    ]


def _in_a_process(pair: PairFolders, folder: Path, settings: list[str]) -> Run:
    """Run train.py as users do."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    command = [sys.executable, "train.py", *_flags(pair, folder, settings)]
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
    return Run(folder, done.returncode, time.perf_counter() - began)


def _in_this_process(pair: PairFolders, folder: Path, settings: list[str]) -> Run:
    """Run train.py here: many short runs, and one whose memory is taken away, need no start each."""
    from accelerate.state import AcceleratorState

    import train

    AcceleratorState._reset_state(reset_partial_state=True)  # that of a run before may have another precision
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        status = train.main(_flags(pair, folder, settings))
    return Run(folder, status, time.perf_counter() - began)


def _precision_settings(precision: str) -> list[str]:
    return [f"training.mixed_precision={precision}", f"teacher.dtype={TEACHER_DTYPES[precision]}"]


# -------------------------------------------------------------------------------------------------- end to end


def train(bench: Bench, precision: str) -> Iterator[dict]:
    """Yield what a run on true shapes says: speed, waiting, memory, and whether it ended with a student."""
    bench.require_precision(precision)
    pair = true_pair(bench)
    windows, accumulation = bench.scale.train_windows

    settings = [
        *_precision_settings(precision),
        f"training.batch_size={windows}",
        f"training.gradient_accumulation_steps={accumulation}",
        f"training.max_steps={bench.scale.train_steps}",
        f"training.max_hours={0.6 * bench.seconds / 3600:.4f}",
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
    """Yield whether a run has the same weights, bit for bit, when it is run again and when it is continued.

    Args:
        deterministic: with the setting that asks torch for deterministic kernels.
    """
    extra = []
    if deterministic:
        _require_setting("deterministic")
        extra = ["training.deterministic=true"]

    pair = small_pair(bench)
    precisions = [name for name in bench.precisions() if name != "no"] or ["no"]
    for precision in precisions[:1] if bench.scale.is_toy else precisions:
        settings = [*_precision_settings(precision), *_small_settings(8), "training.save_every=4", *extra]
        folders = [bench.work / f"repeat-{precision}-{number}-{deterministic}" for number in (1, 2)]

        runs = [_in_this_process(pair, folder, settings) for folder in folders]
        if failed := [run for run in runs if run.status]:
            yield {"precision": precision, "result": failed[0].last_error()}
            continue
        first, second = (_digest(folder / "student") for folder in folders)

        # as if the second run had been killed behind step 4
        shutil.rmtree(folders[1] / "checkpoints" / "step-00000008")
        shutil.rmtree(folders[1] / "student")
        continued = _in_this_process(pair, folders[1], settings)

        yield {
            "precision": precision,
            "deterministic": deterministic,
            "again": "same bits" if first == second else "other bits",
            "continued": _compared(continued, second),
            "seconds_a_run": median(run.seconds for run in runs),
        }


def _require_setting(name: str) -> None:
    from utils.config.settings import TrainingConfig

    if name not in {field.name for field in fields(TrainingConfig)}:
        raise Skipped(f"this version has no setting training.{name}")


def _small_settings(steps: int) -> list[str]:
    return [
        "training.batch_size=4",
        "training.gradient_accumulation_steps=1",
        f"training.max_steps={steps}",
        "data.max_length=64",
        "logging.every=1",
    ]


def _digest(folder: Path) -> str:
    """Hash of a student's weights."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        total.update(file.read_bytes())
    return total.hexdigest()


def _compared(run: Run, digest: str) -> str:
    if run.status:
        return run.last_error()
    return "same bits" if _digest(run.folder / "student") == digest else "other bits"


# ---------------------------------------------------------------------------------------------- short of memory


def tight(bench: Bench) -> Iterator[dict]:
    """Yield how a run ends whose fourth step has less memory than its third took."""
    from utils.training.loop import TrainingLoop

    precision = next(name for name in bench.precisions())
    settings = [*_precision_settings(precision), *_small_settings(6)]
    advance = TrainingLoop.advance
    limited = []

    def with_less_memory(loop: TrainingLoop, *arguments: object) -> object:
        if loop.step == 2:
            torch.cuda.reset_peak_memory_stats(bench.device)
        if loop.step == 3 and not limited:
            limited.append(_leave_less_memory(bench.device))
        return advance(loop, *arguments)

    with mock.patch.object(TrainingLoop, "advance", with_less_memory):
        run = _in_this_process(small_pair(bench), bench.work / "tight", settings)

    yield {
        "precision": precision,
        "limit_MiB": limited[0] / 2**20 if limited else None,
        "halved": run.log.count(HALVED),
        **run.summary(),
    }


def _leave_less_memory(device: torch.device) -> float:
    """Take memory away from torch's allocator; returns the bytes it may hold from now on."""
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(device)
    peak = torch.cuda.max_memory_allocated(device)
    limit = held + TIGHT * (peak - held)

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

    precisions = bench.precisions()
    for precision in precisions[:1] if bench.scale.is_toy else precisions:
        settings = [
            *_precision_settings(precision),
            "training.batch_size=4",
            "training.gradient_accumulation_steps=1",
            f"training.max_steps={bench.scale.train_steps}",
            f"training.max_hours={0.15 * bench.seconds / 3600:.4f}",
            "data.max_documents=2000",
            "data.max_length=256",
            "logging.every=1",
        ]
        run = _in_a_process(pair, bench.work / f"pair-{precision}", settings)
        yield {"teacher": teacher.name, "student": student.name, "precision": precision, **_evaluated(run)}


def _evaluated(run: Run) -> dict:
    file = run.folder / "evaluation_report.json"
    if not file.exists():
        return run.summary()

    report = json.loads(file.read_text(encoding="utf-8"))
    names = {"teacher": "teacher_bits_per_byte", "initial_student": "before", "student": "after"}
    scores = {column: report[model]["bits_per_byte"] for model, column in names.items() if report.get(model)}
    return scores | run.summary()
