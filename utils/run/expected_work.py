"""Work that a command still has to do, by kind: what the time left is estimated from."""

from collections import Counter
from math import ceil

from ..logs.time_left import Kind, TimeLeft
from ..training.plan import Plan
from .prepare import Job


def expect_training(
    time_left: TimeLeft, job: Job, plan: Plan, done: int, *, has_teacher: bool, own_texts: int = 0
) -> None:
    """Replace what `time_left` expects by a training from here on, and all that follows it.

    Args:
        done: optimizer steps that earlier sessions have done.
        has_teacher: False: this is a training without one, such as that of the comparison.
        own_texts: that the student still writes to learn from them.
    """
    compares = job.config.compares_without_teacher
    training = _training(job, plan, done, "step" if has_teacher else "step alone")
    after = _final_evaluation(job, plan, has_teacher=has_teacher)

    # The comparison is a training of its own, whose student is scored and samples once more.
    if compares and has_teacher:
        after += _training(job, plan, 0, "step alone")
        after += _final_evaluation(job, plan, has_teacher=False)
        after["student window"] += _windows(job)
        after["model file"] += 1
    if has_teacher or not compares:
        # The export: written, and loaded anew.
        after["model file"] += 2
    if own_texts:
        training["own text"] = own_texts
    time_left.expect(training, after)


def _training(job: Job, plan: Plan, done: int, kind: Kind) -> Counter[Kind]:
    """Return the steps that are left, with the evaluations between them."""
    every = job.config.evaluation.every
    evaluations = plan.total_steps // every - done // every if every else 0
    return Counter(
        {
            kind: plan.total_steps - done,
            "student window": evaluations * _windows(job),
            "token": evaluations * job.config.evaluation.new_tokens,
        }
    )


def _final_evaluation(job: Job, plan: Plan, *, has_teacher: bool) -> Counter[Kind]:
    """Return what is measured after the last step."""
    config = job.config.evaluation
    is_evaluated_by_loop = bool(config.every) and plan.total_steps % config.every == 0
    scorings = 1 if is_evaluated_by_loop else 2
    return Counter(
        {
            "student window": scorings * _windows(job),
            "agreement window": _windows(job) if has_teacher else 0,
            "token": config.samples * config.new_tokens,
        }
    )


def _windows(job: Job) -> int:
    """Return the held-out windows that a process scores in one measurement."""
    return ceil(len(job.held_out.windows) / job.accelerator.num_processes)
