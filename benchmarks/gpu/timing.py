"""Rounds of measurement on a device whose memory may run out."""

from collections.abc import Callable, Collection, Mapping
from statistics import median
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Run, alternate

Work = Callable[[], object]


class Measured(NamedTuple):
    """Runs of works, and failures of those that could not be measured."""

    runs: dict[str, list[Run]]
    """Runs of each work, in the order of the rounds."""
    failures: dict[str, str]
    """Reason, by the name of the work."""
    busy: dict[str, float]
    """Seconds of kernels, by the name of the work; empty where torch does not see them. Where they are far below the
    seconds of the clock, the card waits for the host to launch them."""


def measure_fitting(
    works: Mapping[str, Work],
    device: torch.device,
    repeats: int,
    before: Work = lambda: None,
    foreign: Collection[str] = (),
) -> Measured:
    """Measure works in alternating rounds, without those for which memory does not suffice.

    Args:
        foreign: works of other libraries, which may fail in any way: another version, a device they do not know.
    """
    fitting: dict[str, Work] = {}
    failures: dict[str, str] = {}

    # Once before any round: a failure in one of them would cost the runs of all.
    for name, work in works.items():
        before()
        try:
            work()
        except torch.OutOfMemoryError:
            failures[name] = "out of memory"
        except Exception as error:
            if name not in foreign:
                raise
            failures[name] = f"{type(error).__name__}: {error}"[:200]
        else:
            fitting[name] = work

    # A failed work leaves the allocator's memory in pieces.
    before()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    runs = alternate(fitting, device, repeats, before)

    # Apart from the rounds, since the profiler slows the host down.
    busy = {}
    if device.type == "cuda" and sees_kernels():
        for name, work in fitting.items():
            before()
            busy[name] = _kernel_seconds(work)
    return Measured(runs, failures, busy)


def sees_kernels() -> bool:
    """Return True if the profiler of this torch build sees kernels of a GPU."""
    return ProfilerActivity.CUDA in torch.profiler.supported_activities()


def _kernel_seconds(work: Work) -> float:
    """Return the seconds that the kernels of a work take, without the time between them."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()

    microseconds = sum(event.self_device_time_total for event in profiler.key_averages())
    return microseconds / 1e6


def seconds(runs: list[Run]) -> float:
    """Return the median seconds of the clock until the device is done."""
    return median(run.wall for run in runs)


def ratio(runs: list[Run], others: list[Run]) -> float:
    """Return the median, over rounds, of the time of one work over that of another."""
    # Round by round, since the works of a round share the machine's noise.
    return median(run.wall / other.wall for run, other in zip(runs, others, strict=True))


def repeated(work: Work, times: int) -> Work:
    """Return a work that does another several times: for those too short to be timed once."""

    def loop() -> None:
        for _ in range(times):
            work()

    return loop
