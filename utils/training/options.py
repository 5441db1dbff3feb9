"""Options of `fit`: log, evaluation, checkpoints, a way to stop, and what a teacher elsewhere needs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.batch_order import Pacing
from ..data.stream.batches import Stream
from ..interfaces import Batch
from ..logs.step_logger import StepLogger
from ..machine.stop_signals import StopSignal
from ..on_policy.rounds import Rounds
from .checkpoints import CheckpointStore
from .red_flags import RedFlags


def do_nothing() -> None:
    """Return at once."""


@dataclass(frozen=True)
class LoopOptions:
    """Everything that `fit` does beside training. Every field can be left out.

    Raises:
        TypeError: a field is of another kind.
        ValueError: a number is negative.
    """

    logger: StepLogger | None = None
    """Decides which steps are logged, and takes their records. None: every 100th step, on the console alone."""
    evaluate: Callable[[int], dict[str, Any] | None] | None = None
    """(steps done) -> evaluation record or None. Called in every process; must return the same in all.

    A record has `step`, `split`, `loss`, `perplexity` and `bits_per_byte`, as `StepLogger.evaluation` takes them."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: never."""
    checkpoints: CheckpointStore | None = None
    """Where checkpoints are saved; None: nowhere."""
    resume_from: Path | None = None
    """A checkpoint that `checkpoints.resume_point` returned."""
    flags: RedFlags | None = None
    """Red flags to watch for."""
    pacing: Pacing | None = None
    """Windows by difficulty, and which of them are open in which step; None: all, in random order."""
    rounds: Rounds | None = None
    """Text that the student writes itself, in place of given windows; None: given windows alone."""
    stream: Stream | None = None
    """Windows that come block by block, in place of the given ones, of which the first then only tells what windows are
    like; None: those that are given, epoch by epoch."""
    stop: StopSignal | None = None
    """Asks the loop to stop at the next step boundary."""
    check: Callable[[], None] = do_nothing
    """Called between two micro-batches. Where it raises `Interrupted`, their step is taken back, and the run ends with
    a checkpoint of the steps before. For a run of one process."""
    writing: Callable[[], AbstractContextManager[None]] = nullcontext
    """Makes the context in which a checkpoint is written."""
    num_workers: int = 0
    """Processes that prepare batches; 0: a thread."""
    term_gradients: bool = False
    """Log the norm of the gradient that each term contributes to the student (`measurements.TermGradients`)."""
    forecast: str = ""
    """Memory that the run is expected to take, for the message where it does not fit."""
    before_checkpoint: Callable[[], None] = do_nothing
    """Called in every process before a checkpoint and after an epoch; must write whatever is buffered to the disk."""
    prefetch_teacher: Callable[[Batch, int, bool], Any] | None = None
    """(batch, step, measured) -> `signal` for the module's forward, or None. Called for a step's batches before those
    of the step before are computed: a teacher on another GPU works meanwhile. None: the module asks its teacher."""
    forward_communicates: bool = False
    """Processes exchange data within a forward, so one that does not fit into memory cannot be done again: the other
    processes wait in it. It ends the run."""

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "num_workers"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name}: got {number!r}, expected a whole number")
            if number < 0:
                raise ValueError(f"{name}: got {number}, expected 0 or more")

        # What is only met at the end would cost the whole training.
        methods = {"logger": "due", "checkpoints": "save", "stop": "requested", "rounds": "begin", "stream": "steps"}
        for name, method in methods.items():
            value = getattr(self, name)
            if value is not None and not hasattr(value, method):
                raise TypeError(f"{name}: got a {type(value).__name__}, expected something with `{method}`, or None")
