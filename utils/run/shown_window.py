"""The window of the training text that the report shows with the positions that KD is learned at."""

from dataclasses import dataclass
from typing import Any

from ..data.batch_order import order_of_epoch, permutation
from ..on_policy.rounds import Rounds
from ..training.plan import Plan
from .prepare import Job


@dataclass(frozen=True)
class ShownWindow:
    """A window of the training text."""

    index: int
    """Its place in the job's windows."""

    step: int | None
    """First optimizer step that learned from it, counted from 1; None: no step did, or nobody can tell."""


def shown_window(job: Job, rounds: Rounds | None, steps: int) -> ShownWindow:
    """Return the first window that a run learned from: of a run that ended early a cache has no others.

    Where it learned from none, since the student's own text stood in the place of all, it is the first in order. A
    stream cuts its text anew, block by block: the windows that are known here only have the text of its beginning.

    Args:
        rounds: texts of the student that stood in the place of windows; None: there were none.
        steps: optimizer steps that were done.
    """
    seed = job.config.training.seed
    if job.stream is not None:
        return ShownWindow(int(permutation(len(job.windows), seed, 0)[0]), None)

    plan = Plan.of(job.config.training, job.window_count, job.accelerator.num_processes)
    order = order_of_epoch(job.window_count, seed, 0, global_batch=plan.global_batch, pacing=job.pacing)
    for step in range(min(steps, plan.steps_per_epoch)):
        replaced: set[Any] = set()
        if rounds is not None:
            replaced = {slot.number for slot in rounds.slots(plan, step, step + 1)}

        of_step = order[step * plan.global_batch : (step + 1) * plan.global_batch]
        for number, index in enumerate(of_step.tolist()):
            if number not in replaced:
                return ShownWindow(index, step + 1)
    return ShownWindow(int(order[0]), None)
