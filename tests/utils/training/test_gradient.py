"""A step whose teacher is lost ends in every process at the same place, before they wait for each other's gradients."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from utils.data.batch_source import MicroBatch, StepBatches
from utils.errors import TeacherGone
from utils.training.gradient import StepGradient, StepWork
from utils.training.measurements import StepSums


class Engine:
    """Forwards that may lose the teacher, and no backward of which another process would wait."""

    def __init__(self, lost_at: int | None) -> None:
        self.lost_at = lost_at
        self.forwards = 0
        self.no_sync = nullcontext

    def model(self, *_, **__):
        self.forwards += 1
        if self.forwards - 1 == self.lost_at:
            raise TeacherGone("the server of this process")
        return torch.zeros((), requires_grad=True), SimpleNamespace(output=None)

    def backward(self, loss, is_last) -> None:
        assert not is_last, "gradients are exchanged although a process has none"


class Sums(StepSums):
    def add(self, output, is_idle) -> None:
        """Take nothing."""


class Texts(SimpleNamespace):
    def to(self, *_, **__):
        return self


def step_of(engine: Engine, losses: float) -> StepGradient:
    """A step in one of two processes, of which as many as `losses` have lost the teacher."""
    accelerator = SimpleNamespace(num_processes=2, process_index=0, device=torch.device("cpu"), scaler=None)
    source = SimpleNamespace(seed=0)
    return StepGradient(
        engine,
        accelerator,
        source,
        guard=SimpleNamespace(look=lambda *_: None),
        host=lambda values: [values[0], losses],
        forward_communicates=False,
        check=lambda: None,
    )


def work() -> StepWork:
    batches = [MicroBatch(Texts(documents=[]))] * 3
    return StepWork(StepBatches(0, 0, batches), counts={}, sums=Sums(), is_logged=False, options={})


@pytest.mark.parametrize(("lost_at", "message"), [(0, "of this process"), (2, "of this process"), (None, "another")])
def test_all_processes_end_where_one_has_lost_the_teacher(lost_at, message):
    engine = Engine(lost_at)
    with pytest.raises(TeacherGone, match=message) as error:
        step_of(engine, losses=1.0).add_up(work())
    assert error.value.in_every_process
    # What comes behind the loss is not computed, up to where the processes agree.
    assert engine.forwards == (3 if lost_at is None else lost_at + 1)
