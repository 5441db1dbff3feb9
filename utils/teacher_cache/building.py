"""What a run needs of a teacher cache, what it will take, and how it is filled beforehand."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from itertools import islice
from operator import or_
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from ..data import batch_order, loader
from ..errors import UserError
from ..evaluation.held_out import HeldOut
from ..files import free_disk
from ..logs.progress import Progress, duration
from ..machine.stop_signals import STOP_REASONS, StopSignal
from ..parallel.processes import main_process_first
from ..pretrained import loading as pretrained
from ..pretrained import precision
from ..training.measurements import HostSum
from ..training.plan import Plan
from .codec import Codec
from .conversation_date import IDENTITY
from .manifest import open_cache
from .store import TeacherCache, Written

log = logging.getLogger(__name__)

KAGGLE_OUTPUT = 20e9
"""Bytes of output that a Kaggle notebook may keep."""
NEAR = 0.75
"""Share of it from which it is named."""
FLUSH_EVERY = 30.0
"""Seconds of the teacher's work that a kill may cost while a cache is only built: where the teacher is slow, a whole
shard would be hours. Shorter, and there would be more shards than a later run likes to open."""
TEMPERED_TOP_K = 256
"""Outcomes per row with which a temperature above 1 does what it does with the running teacher, as measured."""


def open_teacher_cache(job: Any, remember: Callable[..., Any]) -> Any:
    """The job whose batches come with what its cache knows of them; as it is, where no cache is asked for.

    Args:
        job: a dataclass; `train.Job`.
        remember: (collate, cache, ahead=) -> collate.
    """
    config, dtype = job.config, str(job.teacher_dtype.value).removeprefix("torch.")
    if config.cache.folder is None:
        return job
    identity = {
        "teacher": pretrained.weights_fingerprint(config.teacher.name, "teacher"),
        "teacher_dtype": config.teacher.dtype if config.teacher.dtype in precision.QUANTISED else dtype,
        "tokenizers_and_length": job.fingerprint["tokenizers_and_length"],
        "vocabulary_map": job.vocabulary.fingerprint,
        "max_depth": config.loss.max_depth,
    }
    if IDENTITY in job.fingerprint:
        identity[IDENTITY] = job.fingerprint[IDENTITY]
    codec = Codec(len(job.vocabulary.segments), config.cache.top_k, config.cache.storage)
    _warn_of_top_k(config, codec)
    text, main = job.fingerprint["training_text"], job.accelerator.is_main_process
    names = {"teacher": config.teacher.name, "student": config.student.name, "max_length": config.data.max_length}
    opened = partial(open_cache, config.cache, codec, identity, text, main=main, asked=names)
    cache = main_process_first(job.accelerator, opened)
    return replace(
        job,
        config=replace(config, loss=replace(config.loss, top_k=cache.top_k)),
        collate=remember(job.collate, cache),
        held_out=replace(job.held_out, collate=remember(job.collate, cache, ahead=False)),
        cache=cache,
    )


def _warn_of_top_k(config: Any, codec: Codec) -> None:
    """Say where the number of outcomes that are kept makes another loss of what was asked for."""
    asked, kept, hottest = config.loss.top_k, config.cache.top_k, max(_values(config.loss.temperature))
    if asked != kept:
        level = logging.INFO if asked == type(config.loss)().top_k else logging.WARNING
        log.log(level, "cache.top_k %s takes the place of loss.top_k %d (--cache-top-k changes it)", kept, asked)
    if hottest > 1 and (kept == "adaptive" or codec.most < min(TEMPERED_TOP_K, codec.vocabulary)):
        log.warning(
            "the temperature rises to %g, and cache.top_k is %s: tempering lifts what is not kept, one outcome here, "
            "so that the KD term is not that of the running teacher (with 64 tokens up to 46 %% larger at "
            "temperature 4, see docs/teacher_cache.md). Give --cache-top-k %d.",
            hottest, kept, TEMPERED_TOP_K,
        )  # fmt: skip


def _values(schedule: Any) -> list[float]:
    """The values of a constant or of a ramp's points."""
    return [value for _, value in schedule.points] if hasattr(schedule, "points") else [schedule]


def flush_cache(job: Any) -> None:
    """Put what a cache still holds in memory on the disk, in all processes."""
    if job.cache is not None:
        job.cache.flush()
        job.accelerator.wait_for_everyone()


def cache_statistics(job: Any) -> Written:
    """What all processes have added to the job's cache; they call this together."""
    return reduce(or_, gather_object([job.cache.written]))


@dataclass(frozen=True)
class CacheBuilding:
    """A cache and the windows that a run will ask it for."""

    cache: TeacherCache
    windows: Sequence[dict]
    """To train on."""
    held_out: HeldOut
    plan: Plan
    seed: int
    num_workers: int = 0

    @classmethod
    def of(cls, job: Any) -> "CacheBuilding":
        """For a job `with_cache`."""
        training, workers = job.config.training, job.config.data.num_workers
        plan = Plan.of(training, len(job.windows), job.accelerator.num_processes)
        return cls(job.cache, job.windows, job.held_out, plan, training.seed, workers)

    @cached_property
    def _keys(self) -> list[bytes]:
        return self.cache.keys(_rows(self.windows))

    @cached_property
    def _held_out_keys(self) -> list[bytes]:
        return self.cache.keys(_rows(self.held_out.windows))

    @property
    def _visited(self) -> list[int]:
        """Training windows that the run comes to."""
        seen = self.plan.total_steps * self.plan.global_batch
        return batch_order.permutation(len(self.windows), self.seed, 0)[:seen].tolist()

    def needs_teacher(self, states_for: set[str]) -> bool:
        """Whether the teacher must be loaded; the log tells what for.

        Args:
            states_for: terms that need its hidden states, which are not kept.

        Raises:
            UserError: something is missing, and the cache cannot be written to.
        """
        wanted = {"training": [self._keys[i] for i in self._visited], "held-out": self._held_out_keys}
        found = []
        for name, keys in wanted.items():
            if lacking := sum(not self.cache.holds([key]) for key in keys):
                found.append(f"{lacking:,} of {len(keys):,} {name} windows")
        if self.cache.evaluation(self.held_out.fingerprint()) is None:
            found.append("its evaluation on the held-out text")
        if found and not self.cache.writable:
            raise UserError(
                f"teacher cache {self.cache.folder} lacks {', '.join(found)} and cannot be written to. Copy it to a "
                "folder that can be, or give the text, windows and evaluation settings that it was built with."
            )
        found += [f"the hidden states that {', '.join(sorted(states_for))} need in every step"] if states_for else []
        if found:
            log.info("the teacher is loaded for %s", "; ".join(found))
        else:
            log.info("the teacher is not loaded: all that it says is in %s", self.cache.folder)
        return bool(found)

    def build(self, teacher: Any, collate: Callable[[list[dict]], Any], whole: bool, stop: StopSignal) -> str | None:
        """Evaluate the teacher and fill in the held-out windows, say what the training windows will take and, if
        `whole`, fill these in too.

        Args:
            teacher: `signal(batch)` puts what it says into the cache; `model` is evaluated.
            collate: of the training windows.

        Returns:
            why a process was asked to stop, the same in every process; None: none was. What has been computed is kept.

        Raises:
            UserError: there is too little disk for the rest.
        """
        self.cache.evaluation(self.held_out.fingerprint(), lambda: self.held_out.measure(teacher.model, "teacher"))
        held_out = self.held_out
        self._fill(held_out.windows, self._held_out_keys, held_out.indices(), held_out.collate, teacher.signal, stop)
        self.forecast()
        if whole:
            self._fill(self.windows, self._keys, self._first_epoch(), collate, teacher.signal, stop)
        return self._reason_to_stop(stop)

    def _reason_to_stop(self, stop: StopSignal) -> str | None:
        """Why a process was asked to stop: a process that ends alone would leave the others waiting for it."""
        host = HostSum(self.held_out.accelerator, [])
        try:
            return host.any_of(stop.requested(), STOP_REASONS)
        finally:
            host.close()

    def forecast(self) -> None:
        """Say what the missing training windows will take, judging by the held-out windows.

        Raises:
            UserError: there is less free disk than that.
        """
        cache = self.cache
        lacking = [i for i in self._visited if not cache.holds([self._keys[i]])]
        if not lacking:
            return
        known = [self.held_out.windows[i] for i in range(len(self.held_out.windows))]
        text = sum(int(window["bytes"]) for window in known)
        tokens = self.held_out.coverage()["lm"]  # what is learned: of a conversation not all that is read
        size = cache.size(self._held_out_keys)
        share = int(np.asarray(self.windows["bytes"][:])[lacking].sum()) / max(text, 1)
        expected, free = share * size, free_disk(cache.folder)
        speed = self.plan.processes * cache.written.tokens / cache.written.seconds if cache.written.seconds else 0
        log.info(
            "teacher cache: %.1f bytes per student token; %s windows are missing and will take %s MB%s; %s MB are free",
            size / max(tokens, 1), f"{len(lacking):,}", f"{expected / 1e6:,.1f}",
            f" and {duration(share * tokens / speed)} of the teacher" if speed else "", f"{free / 1e6:,.0f}",
        )  # fmt: skip
        if expected > free:
            raise UserError(
                f"teacher cache {cache.folder}: needs {expected / 1e6:,.1f} MB more, {free / 1e6:,.1f} MB are free. "
                "Free some space, lower --cache-top-k, or give another --cache-teacher DIR."
            )
        if (total := cache.bytes_on_disk() + expected) > NEAR * KAGGLE_OUTPUT:
            log.warning("the teacher cache will hold %.1f GB; Kaggle keeps at most 20 GB of output", total / 1e9)

    def _first_epoch(self) -> list[list[int]]:
        """This process's batches of the first epoch, as training would meet them: the signals are then the same."""
        plan, epoch = self.plan, min(self.plan.total_steps, self.plan.steps_per_epoch)
        sizes = {"global_batch": plan.global_batch, "micro_batch": plan.micro_batch, "processes": plan.processes}
        count = sum(batch_order.micro_batches_in_step(plan.windows, step, **sizes) for step in range(epoch))
        rank = self.held_out.accelerator.process_index
        geometry = batch_order.BatchGeometry(**sizes, rank=rank)
        return list(islice(batch_order.step_batches(plan.windows, geometry, seed=self.seed, epoch=0), count))

    def _fill(
        self,
        windows: Sequence[dict],
        keys: Sequence[bytes],
        batches: Iterable[list[int]],
        collate: Callable[[list[dict]], Any],
        compute: Callable[[Any], Any],
        stop: StopSignal,
    ) -> None:
        """Compute and store the batches of which a window is missing, in all processes."""
        cache, accelerator = self.cache, self.held_out.accelerator
        todo = [batch for batch in batches if batch and not cache.holds([keys[i] for i in batch])]
        flushed = time.monotonic()
        progress = Progress(len(todo), unit="batch") if accelerator.is_main_process and todo else None
        for done, batch in enumerate(loader.loader(windows, todo, collate, self.num_workers), start=1):
            compute(batch.to(accelerator.device))
            if stop.requested():
                break
            if time.monotonic() - flushed >= FLUSH_EVERY:
                cache.flush()
                flushed = time.monotonic()
            if progress is not None:
                progress.update(done, {"written": f"{cache.written.bytes / 1e6:,.0f} MB"})
        if progress is not None:
            progress.close()
        cache.flush()
        accelerator.wait_for_everyone()
        cache.refresh()


def _rows(windows: Sequence[dict]) -> Iterator[dict]:
    """The windows one by one; those of a data set are read many at a time, which is five times as fast."""
    if not hasattr(windows, "iter"):
        yield from windows
        return
    for batch in windows.iter(100):
        for row in zip(*batch.values(), strict=True):
            yield dict(zip(batch, row, strict=True))
