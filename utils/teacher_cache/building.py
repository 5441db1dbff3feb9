"""The teacher cache of a run: opened for it, forecast, and filled beforehand where that is asked for."""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import islice
from operator import or_
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from accelerate.utils import gather_object

from ..captures.source import captured_name
from ..config.protocols import RunConfig, share_chosen_before, values_of
from ..data.batch_order import BatchGeometry, micro_batches_in_step, permutation, step_batches
from ..data.loader import begun_ahead, loader
from ..errors import UserError
from ..evaluation.held_out import HeldOut
from ..files import free_disk
from ..interfaces import Batch, CachingTeacher, Collator, Job
from ..logs.progress import Progress, duration
from ..machine.stop_signals import STOP_REASONS, StopSignal
from ..parallel.processes import main_process_first
from ..paths import user_path
from ..pretrained.loading import weights_fingerprint
from ..pretrained.precision import QUANTISED
from ..served.teacher import SERVED, served_name
from ..training.measurements import HostSum
from ..training.plan import Plan
from .codec import Codec
from .conversation_date import IDENTITY
from .manifest import open_cache, stored_teacher
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
BYTES_OF_CHOSEN = 1.3
"""Bytes of a row where a student is in doubt, over those of any row: measured 1.27, of the stories at 20 %."""
ROWS_AT_ONCE = 100
"""Windows that are read from a data set in one go: five times as fast as one by one."""


# ----------------------------------------------------------------------------------------------------- types


class CachedJob(Job, Protocol):
    """A job that may have a cache, as `train.Job` may; a dataclass."""

    @property
    def held_out(self) -> HeldOut:
        """Text that the teacher is evaluated on."""

    @property
    def cache(self) -> TeacherCache | None: ...
    @property
    def stored_share(self) -> float: ...
    @property
    def weight_at(self) -> Callable[[float], float] | None:
        """Weight of its teacher by the progress of the run; None: it always has one."""

    @property
    def routes(self) -> Collection[str]:
        """Routes of text that its teacher is asked about; none: all."""


JobT = TypeVar("JobT", bound=CachedJob)


class Remember(Protocol):
    """Makes a collator whose batches come with what a cache knows of them (`models.RememberingCollator`)."""

    def __call__(self, collate: Any, memory: Any, ahead: bool = True, *, is_learned: bool = False) -> Collator: ...


# ----------------------------------------------------------------------------------------- the cache of a job


def open_teacher_cache(job: JobT, remember: Remember) -> JobT:
    """Return the job whose batches come with what its cache knows of them; as it is, where no cache is asked for.

    Args:
        job: a dataclass; `train.Job`.
        remember: (collate, cache, ahead=) -> collate.

    Raises:
        UserError: the cache was built from something else, or is damaged and may not be written to.
        RunError: it cannot be made.
    """
    config = job.config
    if config.cache.folder is None:
        return job

    # fingerprints decide whether a cache fits; names tell a user why it does not
    identity = _identity(job)
    codec = Codec(len(job.vocabulary.segments), top_k=config.cache.top_k, storage=config.cache.storage)
    warn_of_top_k(config, codec)
    names = {
        "teacher": config.teacher.name,
        "student": config.student.name,
        "max_length": config.data.max_length,
    }

    def opened() -> TeacherCache:
        """Open the cache in this process."""
        return open_cache(
            config.cache,
            codec,
            identity,
            job.fingerprint["training_text"],
            main=job.accelerator.is_main_process,
            asked=names,
        )

    cache = main_process_first(job.accelerator, opened)

    # the loss gets as many outcomes as are stored; held-out batches are asked for once, and not ahead
    loss = replace(config.loss, top_k=cache.top_k)
    held_out = replace(job.held_out, collate=remember(job.collate, cache, ahead=False))
    return replace(
        job,
        config=replace(config, loss=loss),
        collate=remember(job.collate, cache, is_learned=True),
        held_out=held_out,
        cache=cache,
    )


def _identity(job: CachedJob) -> dict[str, Any]:
    """Return everything that a teacher's signals depend on."""
    config = job.config
    teacher_dtype = str(job.teacher_dtype.value).removeprefix("torch.")
    if config.teacher.dtype in QUANTISED:
        teacher_dtype = config.teacher.dtype

    if config.teacher.is_elsewhere:
        teacher_dtype = "captured" if config.teacher.is_captured else "served"

    identity = {
        "teacher": _teacher_fingerprint(config),
        "teacher_dtype": teacher_dtype,
        "tokenizers_and_length": job.fingerprint["tokenizers_and_length"],
        "vocabulary_map": job.vocabulary.fingerprint,
        "max_depth": config.loss.max_depth,
    }

    # only where some rows are left out, so that caches that keep all of them stay what they are
    if job.stored_share < 1:
        identity["rows"] = f"{job.stored_share:g} of each window, by the teacher's entropy, {_choice(config)}"

    # only where a chat template writes the date, so that other caches serve on every day
    if IDENTITY in job.fingerprint:
        identity[IDENTITY] = job.fingerprint[IDENTITY]
    return identity


def _choice(config: RunConfig) -> str:
    """Return what else decides which rows the teacher's entropy chooses: those that it can judge come first."""
    return f"with min_prefix_mass {config.loss.min_prefix_mass:g} and correction {config.loss.correction}"


def _teacher_fingerprint(config: RunConfig) -> str:
    """Return what tells teachers apart: a hash of weights, or the name of a served one.

    A run whose cache has all that it needs does not need the server: where that is off, the cache is taken at its word.

    Raises:
        UserError: there is neither the teacher nor a cache of a served one.
    """
    if config.teacher.is_captured:
        return captured_name(config)
    if not config.teacher.is_served:
        return weights_fingerprint(config.teacher.name, "teacher")

    try:
        return served_name(config)
    except UserError as error:
        stored = stored_teacher(user_path(config.cache.folder))
        if stored is None or not stored.startswith(SERVED):
            raise
        log.info("%s", error)
        log.info("the cache is that of a teacher %s, and is taken for that of this run", stored)
        return stored


def warn_of_top_k(config: RunConfig, codec: Codec) -> None:
    """Log where the number of outcomes in the cache makes another loss of what was asked for."""
    loss_top_k = config.loss.top_k
    cache_top_k = config.cache.top_k
    if loss_top_k != cache_top_k:
        is_default = loss_top_k == type(config.loss)().top_k
        log.log(
            logging.INFO if is_default else logging.WARNING,
            "cache.top_k %s takes the place of loss.top_k %d (--cache-top-k changes it)",
            cache_top_k,
            loss_top_k,
        )

    hottest = max(values_of(config.loss.temperature))
    is_narrow = cache_top_k == "adaptive" or codec.most < min(TEMPERED_TOP_K, codec.vocabulary)
    if hottest > 1 and is_narrow:
        log.warning(
            "the temperature rises to %g, and cache.top_k is %s: tempering lifts what is not kept, one outcome here, "
            "so that the KD term is not that of the running teacher (with 64 tokens up to 46 %% larger at "
            "temperature 4, see docs/teacher_cache.md). Give --cache-top-k %d.",
            hottest,
            cache_top_k,
            TEMPERED_TOP_K,
        )


def flush_cache(job: CachedJob) -> None:
    """Write buffered windows to disk, in all processes; called before every checkpoint."""
    if job.cache is not None:
        job.cache.flush()
        job.accelerator.wait_for_everyone()


def cache_statistics(job: CachedJob) -> Written:
    """Return what all processes have added to the job's cache; they call this together."""
    return reduce(or_, gather_object([job.cache.written]))


# ------------------------------------------------------------------------------------------ filling a cache


class _Expected(NamedTuple):
    """Disk and time that missing training windows will take."""

    windows: int
    bytes: float
    seconds: float | None
    """Of the teacher; None: its speed is not known."""
    bytes_per_token: float
    """Of the student's tokens that are learned."""


@dataclass(frozen=True)
class CacheBuilding:
    """A cache and the windows that a run will ask it for."""

    cache: TeacherCache
    windows: Any
    """To train on."""
    held_out: HeldOut
    plan: Plan
    seed: int
    """Of the order of the windows."""
    num_workers: int = 0
    """Processes that collate batches."""
    in_order: bool = False
    """The run comes to the windows in an order by difficulty, which the teacher may have to be asked about."""
    rows_share: float = 1.0
    """Share of its KD rows that are stored of a training window; of a held-out window all are."""
    teacher: str | None = None
    """Its name, for the log of a run with several; None: there is one."""
    weight_at: Callable[[float], float] | None = None
    """Weight of the teacher by the progress of the run; None: it always has one."""
    routes: Collection[str] = ()
    """Routes of text that it is asked about; none: all."""

    @classmethod
    def of(cls, job: CachedJob) -> "CacheBuilding":
        """Return the building of the cache that `open_teacher_cache` has given a job."""
        training = job.config.training
        return cls(
            cache=job.cache,
            windows=job.windows,
            held_out=job.held_out,
            plan=Plan.of(training, len(job.windows), job.accelerator.num_processes),
            seed=training.seed,
            num_workers=job.config.data.num_workers,
            in_order=job.config.data.order != "random",
            rows_share=min(share_chosen_before(job.config), job.stored_share),
            teacher=job.teacher_name,
            routes=job.routes,
            weight_at=job.weight_at,
        )

    @property
    def _of_teacher(self) -> str:
        """The end of a line of the log: which teacher it is about, where there are several."""
        return "" if self.teacher is None else f" (teacher {self.teacher})"

    @cached_property
    def _keys(self) -> list[bytes]:
        """Keys of all training windows."""
        return self.cache.keys(_rows(self.windows))

    @cached_property
    def _held_out_keys(self) -> list[bytes]:
        """Keys of the held-out windows."""
        return self.cache.keys(_rows(self.held_out.windows))

    @cached_property
    def _is_asked(self) -> np.ndarray:
        """[windows] whether the teacher is asked about each training window."""
        return _is_for(self.windows, self.routes)

    @cached_property
    def _held_out_asked(self) -> list[int]:
        """Held-out windows that the teacher is asked about."""
        return _is_for(self.held_out.windows, self.routes).nonzero()[0].tolist()

    @property
    def _visited(self) -> list[int]:
        """Training windows that the run comes to, and asks the teacher about."""
        # In an order by difficulty it may be any.
        if self.in_order:
            return self._is_asked.nonzero()[0].tolist()
        if self.weight_at is None:
            count = self.plan.total_steps * self.plan.global_batch
            visited = permutation(len(self.windows), self.seed, 0)[:count]
        else:
            visited = self._while_it_weighs(self.weight_at)
        return visited[self._is_asked[visited]].tolist()

    def _while_it_weighs(self, weight_at: Callable[[float], float]) -> np.ndarray:
        """Return the training windows of the steps at which the teacher has a weight; it is asked in no other."""
        plan = self.plan
        orders: dict[int, np.ndarray] = {}
        parts = [np.empty(0, dtype=np.int64)]
        for step in range(plan.total_steps):
            # At a step's beginning or at its end: one that is asked about too few would be missing.
            if not any(weight_at(done / plan.total_steps) for done in (step, step + 1)):
                continue

            epoch, number = divmod(step, plan.steps_per_epoch)
            if epoch not in orders:
                orders[epoch] = permutation(len(self.windows), self.seed, epoch)
            parts.append(orders[epoch][number * plan.global_batch : (number + 1) * plan.global_batch])
        return np.unique(np.concatenate(parts))

    # --- what is missing --------------------------------------------------------------------------------------------

    def needs_teacher(self, states_for: set[str], *, answers_student: bool = False) -> bool:
        """Return whether the teacher must be loaded; the log tells what for.

        Args:
            states_for: terms that need its hidden states, which are not stored.
            answers_student: it is asked about text that the student writes, which nobody knows beforehand.

        Raises:
            UserError: something is missing, and the cache cannot be written to.
        """
        reasons = self._missing()
        if answers_student:
            reasons.append("the text that the student writes itself")
        if reasons and not self.cache.writable:
            raise UserError(
                f"teacher cache {self.cache.folder} lacks {', '.join(reasons)} and cannot be written to. Copy it to a "
                "folder that can be, or give the text, windows and evaluation settings that it was built with."
            )

        # hidden states are no reason to refuse: they are never written
        if states_for:
            reasons.append(f"the hidden states that {', '.join(sorted(states_for))} need in every step")
        if not reasons:
            log.info("the teacher is not loaded: all that it says is in %s%s", self.cache.folder, self._of_teacher)
            return False
        log.info("the teacher is loaded for %s%s", "; ".join(reasons), self._of_teacher)
        return True

    def _missing(self) -> list[str]:
        """Return what the cache lacks of this run, a message each."""
        keys_of = {
            "training": [self._keys[i] for i in self._visited],
            "held-out": [self._held_out_keys[i] for i in self._held_out_asked],
        }
        messages = []
        for name, keys in keys_of.items():
            missing = sum(not self.cache.holds([key]) for key in keys)
            if missing:
                messages.append(f"{missing:,} of {len(keys):,} {name} windows")

        if self.cache.evaluation(self.held_out.fingerprint()) is None:
            messages.append("its evaluation on the held-out text")
        return messages

    # --- filling in -------------------------------------------------------------------------------------------------

    def build(
        self,
        teacher: CachingTeacher,
        collate: Callable[[list[dict]], Any],
        whole: bool,
        stop: StopSignal,
    ) -> str | None:
        """Evaluate the teacher and fill in the held-out windows, log what the training windows will take and, if
        `whole`, fill these in too.

        Args:
            teacher: `signal(batch)` puts its answer into the cache; `model` is evaluated.
            collate: of the training windows.

        Returns:
            why a process was asked to stop, the same in every process; None: none was. What has been computed is
            stored.

        Raises:
            UserError: there is too little disk for the rest.
        """
        # 1. The held-out text, which is small.
        held_out = self.held_out
        self.cache.evaluation(held_out.fingerprint(), lambda: held_out.measure_teacher(teacher))
        self._fill(
            held_out.windows,
            self._held_out_keys,
            batches=_chosen(held_out.indices(), self._held_out_asked),
            collate=held_out.collate,
            teacher=teacher,
            stop=stop,
        )

        # 2. It tells what the training windows will take: refused here, where little is lost.
        self.forecast()

        # 3. The training windows.
        if whole:
            self._fill(
                self.windows,
                self._keys,
                batches=_chosen(self._first_epoch(), self._is_asked.nonzero()[0]),
                collate=collate,
                teacher=teacher,
                stop=stop,
            )
        return self._reason_to_stop(stop)

    def _fill(
        self,
        windows: Sequence[dict],
        keys: Sequence[bytes],
        *,
        batches: Iterable[list[int]],
        collate: Callable[[list[dict]], Batch],
        teacher: CachingTeacher,
        stop: StopSignal,
    ) -> None:
        """Compute and store the batches of which a window is missing, in all processes."""
        cache = self.cache
        accelerator = self.held_out.accelerator
        missing = []
        for batch in batches:
            if not cache.holds([keys[i] for i in batch]):  # an empty batch lacks nothing
                missing.append(batch)

        display = Progress(shown=accelerator.is_main_process)
        task = display.begin("teacher cache", len(missing), "other", unit="batch")
        flushed = time.monotonic()
        begun = begun_ahead(loader(windows, missing, collate, self.num_workers), teacher.begin)
        for done, batch in enumerate(begun, start=1):
            teacher.signal(batch.to(accelerator.device))
            if stop.requested():
                break

            # a slow teacher may need hours for a whole shard, and a kill must not cost them
            if time.monotonic() - flushed >= FLUSH_EVERY:
                cache.flush()
                flushed = time.monotonic()
            display.update(task, done)

        display.close()

        # all processes write before any looks what the others have written
        cache.flush()
        accelerator.wait_for_everyone()
        cache.refresh()

    def _first_epoch(self) -> list[list[int]]:
        """Return this process's batches of the first epoch, as training would meet them: the signals are then the
        same."""
        plan = self.plan
        count = 0
        for step in range(min(plan.total_steps, plan.steps_per_epoch)):
            count += micro_batches_in_step(
                plan.windows,
                step,
                global_batch=plan.global_batch,
                micro_batch=plan.micro_batch,
                processes=plan.processes,
            )

        geometry = BatchGeometry(
            plan.global_batch,
            plan.micro_batch,
            plan.processes,
            rank=self.held_out.accelerator.process_index,
        )
        batches = step_batches(plan.windows, geometry, seed=self.seed, epoch=0)
        return list(islice(batches, count))

    def _reason_to_stop(self, stop: StopSignal) -> str | None:
        """Return why a process was asked to stop: one that ends alone would leave the others waiting for it."""
        host = HostSum(self.held_out.accelerator, [])
        try:
            return host.any_of(stop.requested(), STOP_REASONS)
        finally:
            host.close()

    # --- the forecast -----------------------------------------------------------------------------------------------

    def forecast(self) -> None:
        """Log what the missing training windows will take, judging by the held-out windows.

        Raises:
            UserError: there is less free disk than that.
        """
        cache = self.cache
        missing = [i for i in self._visited if not cache.holds([self._keys[i]])]
        if not missing:
            return

        if not self._held_out_asked:
            log.info(
                "teacher cache%s: %s windows are missing; none is held out to judge their size by",
                self._of_teacher,
                f"{len(missing):,}",
            )
            return
        expected = self._expected(missing)
        free = free_disk(cache.folder)
        time_of_teacher = ""
        if expected.seconds is not None:
            time_of_teacher = f" and {duration(expected.seconds)} of the teacher"
        log.info(
            "teacher cache%s: %.1f bytes per student token; %s windows are missing and will take %s MB%s; %s MB are "
            "free",
            self._of_teacher,
            expected.bytes_per_token,
            f"{expected.windows:,}",
            f"{expected.bytes / 1e6:,.1f}",
            time_of_teacher,
            f"{free / 1e6:,.0f}",
        )

        if expected.bytes > free:
            raise UserError(
                f"teacher cache {cache.folder}: needs {expected.bytes / 1e6:,.1f} MB more, {free / 1e6:,.1f} MB are "
                "free. Free some space, lower --cache-top-k, or give another --cache-teacher DIR."
            )

        total = cache.bytes_on_disk() + expected.bytes
        if total > NEAR * KAGGLE_OUTPUT:
            log.warning("the teacher cache will hold %.1f GB; Kaggle keeps at most 20 GB of output", total / 1e9)

    def _expected(self, missing: Sequence[int]) -> _Expected:
        """Estimate what missing training windows will take: what the held-out windows took, by bytes of text.

        The teacher's time is that of all rows also where it is asked about some: its body, at least, reads everything.
        """
        cache = self.cache

        # 1. The held-out windows, which are in the cache.
        asked = self._held_out_asked
        windows = self.held_out.windows
        bytes_of_all = [int(windows[i]["bytes"]) for i in range(len(windows))]
        held_out_bytes = sum(bytes_of_all[i] for i in asked)
        # Those that are learned: of a conversation not all that is read.
        tokens = self.held_out.coverage()["lm"] * held_out_bytes / max(sum(bytes_of_all), 1)
        size = cache.size([self._held_out_keys[i] for i in asked]) * min(1.0, BYTES_OF_CHOSEN * self.rows_share)

        # 2. How much more text is missing.
        missing_bytes = int(np.asarray(self.windows["bytes"][:])[missing].sum())
        share = missing_bytes / max(held_out_bytes, 1)

        # 3. Tokens per second of all processes together, where any was computed.
        seconds = None
        speed = 0.0
        if cache.written.seconds:
            speed = self.plan.processes * cache.written.tokens / cache.written.seconds
        if speed:
            seconds = share * tokens / speed
        return _Expected(
            windows=len(missing),
            bytes=share * size,
            seconds=seconds,
            bytes_per_token=size / max(tokens, 1),
        )


def _is_for(windows: Any, routes: Collection[str]) -> np.ndarray:
    """Return [windows] whether each is of one of some routes; where none is named, each is."""
    if not routes:
        return np.ones(len(windows), dtype=bool)
    return np.array([str(route) in routes for route in windows["route"]], dtype=bool)


def _chosen(batches: Iterable[Sequence[int]], windows: Collection[int]) -> list[list[int]]:
    """Return batches with those of their windows that are among some."""
    among = {*windows}
    return [[index for index in batch if index in among] for batch in batches]


def _rows(windows: Sequence[dict]) -> Iterator[dict]:
    """Yield windows one by one; those of a data set are read many at a time."""
    if not hasattr(windows, "iter"):
        yield from windows
        return

    # a data set gives a batch as columns
    for batch in windows.iter(ROWS_AT_ONCE):
        for row in zip(*batch.values(), strict=True):
            yield dict(zip(batch, row, strict=True))
