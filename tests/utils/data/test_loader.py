import pickle
import queue
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.utils.data.test_documents import encode, words
from utils.data import delivery as delivery_module
from utils.data import loader as loading
from utils.data.batch_order import BatchGeometry, micro_batches_in_step, permutation, step_batches, steps_per_epoch
from utils.data.delivery import delivery
from utils.data.loader import loader
from utils.data.windows import make_windows
from utils.errors import UserError

# ---------------------------------------------------------------- order

SHAPES = st.tuples(st.integers(0, 60), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.integers(0, 3), st.integers(0, 5))
def test_every_index_comes_exactly_once_per_epoch(shape, epoch, start):
    n, micro, accumulation, processes = shape
    options = {"global_batch": micro * accumulation * processes, "micro_batch": micro, "processes": processes}
    start = min(start, steps_per_epoch(n, options["global_batch"]))
    steps = range(start, steps_per_epoch(n, options["global_batch"]))

    per_rank = [
        list(step_batches(n, BatchGeometry(**options, rank=rank), seed=1, epoch=epoch, steps=steps))
        for rank in range(processes)
    ]

    position = 0
    order = permutation(n, 1, epoch)
    for step in range(start, steps_per_epoch(n, options["global_batch"])):
        count = micro_batches_in_step(n, step, **options)
        assert 1 <= count <= accumulation

        parts = [part for batches in per_rank for part in batches[position : position + count]]
        assert all(len(part) <= micro for part in parts) and len(parts) == count * processes
        if processes == 1:
            assert all(parts)

        expected = order[step * options["global_batch"] : (step + 1) * options["global_batch"]]
        assert sorted(index for part in parts for index in part) == sorted(expected.tolist())
        position += count

    assert all(len(batches) == position for batches in per_rank)


def test_a_resumed_epoch_continues_with_the_same_batches():
    geometry = BatchGeometry(global_batch=8, micro_batch=2, processes=2, rank=1)
    whole = list(step_batches(45, geometry, seed=3, epoch=2))
    for step in range(7):
        skipped = sum(micro_batches_in_step(45, s, global_batch=8, micro_batch=2, processes=2) for s in range(step))
        assert list(step_batches(45, geometry, seed=3, epoch=2, steps=range(step, 6))) == whole[skipped:]


def test_epochs_and_seeds_differ():
    geometry = BatchGeometry(global_batch=4, micro_batch=4)
    orders = {str(list(step_batches(40, geometry, seed=s, epoch=e))) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


# ---------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def windows():
    return make_windows(words(100), partial(encode, 32), "v1")


def ids(batch: list[dict]) -> list[list[int]]:
    return [window["ids"].tolist() for window in batch]


def ids_unless_second(batch: list[dict]) -> list[list[int]]:
    if batch[0]["documents"] == "second":
        raise UserError("second")
    return ids(batch)


def test_workers_deliver_the_same_batches_in_the_same_order(windows):
    batches = list(step_batches(len(windows), BatchGeometry(global_batch=8, micro_batch=4), seed=0, epoch=0))
    expected = [[windows[i]["ids"].tolist() for i in batch] for batch in batches]
    for workers in (0, 2):
        assert list(loader(windows, batches, ids, workers)) == expected


def test_each_window_is_delivered_exactly_once_per_epoch(windows):
    for workers, processes in ((0, 1), (2, 1), (0, 3)):
        found = delivery(windows, micro_batch=4, num_workers=workers, processes=processes)
        assert (found.expected, found.delivered, found.repeated, found.missing) == (len(windows), len(windows), 0, 0)
        assert found.identical == 0


def test_repeated_and_missing_windows_are_counted(windows, monkeypatch):
    monkeypatch.setattr(delivery_module, "step_batches", lambda *_, **__: iter([[0, 1], [1, 2]]))
    found = delivery([windows[0], windows[1], windows[0], windows[3]], micro_batch=2, num_workers=0)
    assert (found.delivered, found.repeated, found.missing, found.identical) == (4, 1, 1, 1)


def test_an_empty_micro_batch_is_none(windows):
    assert list(loader(windows, [[0], []], len)) == [1, None]


def test_loading_leaves_the_global_generators_alone(windows):
    state = torch.get_rng_state()
    list(loader(windows, [[0], [1]], len))
    assert torch.equal(state, torch.get_rng_state())


def as_tensors(batch: list[dict]) -> dict[str, torch.Tensor]:
    long = torch.cat([torch.from_numpy(window["ids"]) for window in batch]).long()
    return {
        "ids": long,
        "half": long.half(),
        "some": long[:0],
        "one": long[0],
        "mask": long > 100,
        "strided": long[::2],
    }


def test_tensors_of_workers_are_the_receivers_own(windows):
    """A tensor that processes share costs an open file and a question to the worker, 25 times a batch."""
    batches = [[0, 1], [2], []]
    for found, right in zip(loader(windows, batches, as_tensors, 1), loader(windows, batches, as_tensors), strict=True):
        assert (found is None) == (right is None)
        for name, tensor in (right or {}).items():
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
            assert not found[name].is_shared()
            found[name].zero_()  # writable


ROOT = Path(__file__).resolve().parents[3]

KILLED = """
import functools, multiprocessing, time
import numpy
from utils.data.loader import loader

large = functools.partial(numpy.resize, new_shape=1_000_000)
for _ in loader([1.0], [[0]] * 100, large, WORKERS, at_once=4):
    time.sleep(0.2)  # until the pipe is full
    for worker in multiprocessing.active_children():
        worker.kill()
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_ends_the_run(workers):
    script = KILLED.replace("WORKERS", str(workers))
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert ended.returncode == 1
    # The second and third: it was killed while it was asked for a batch.
    assert any(name in ended.stderr for name in ("DataLoader worker", "ConnectionError", "ConnectionRe", "EOFError"))


def test_what_goes_through_the_pipe_to_the_receiver_fits_into_it():
    batch = [torch.zeros(1_000_000), *(torch.zeros(n) for n in range(50))]
    sent = ForkingPickler.dumps(loading._PackedBatch(batch))
    assert len(sent) < 512  # POSIX: pipes hold at least so much in one piece
    assert all(torch.equal(a, b) for a, b in zip(pickle.loads(sent).unpack(), batch, strict=True))


class Pinnable:
    pinned = False

    def pin_memory(self) -> "Pinnable":
        self.pinned = True
        return self


def test_the_pinning_thread_opens_and_pins_what_workers_sent():
    pinned = torch.utils.data._utils.pin_memory.pin_memory(loading._PackedBatch(Pinnable()))
    assert isinstance(pinned, Pinnable) and pinned.pinned
    assert torch.utils.data._utils.pin_memory.pin_memory(loading._PackedBatch(None)) is None


def test_the_next_batches_are_made_while_one_is_worked_on(windows):
    made = queue.SimpleQueue()
    before = threading.active_count()
    batches = loader(windows, [[i] for i in range(9)], lambda some: made.put(some) or some, at_once=3)
    first = next(batches)
    some = [made.get(timeout=10) for _ in range(4)]
    assert some[0] is first  # and three more, though nobody asked for them
    batches.close()
    assert threading.active_count() == before and made.qsize() == 0


def test_batches_that_are_not_needed_any_more_are_not_made(windows):
    made, go_on = [], threading.Event()

    def slow(some):
        made.append(some)
        return len(made) == 1 or go_on.wait(10)

    batches = loader(windows, [[i] for i in range(20)], slow, at_once=8)
    assert next(batches)
    while len(made) < 2:
        time.sleep(0.01)
    # Well after the loader was told to end, whatever else the machine does.
    threading.Timer(2, go_on.set).start()
    batches.close()
    assert len(made) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_in_a_batch_is_raised_where_it_is_taken(windows, workers):
    windows = [windows[0], {**windows[1], "documents": "second"}]
    batches = loader(windows, [[0], [1]], ids_unless_second, workers, at_once=2)
    assert next(batches) == ids([windows[0]])
    with pytest.raises(UserError, match="second"):
        next(batches)


@pytest.mark.parametrize(("workers", "at_once"), [(0, 4), (1, 1), (1, 4), (2, 3), (3, 4)])
def test_workers_make_what_is_taken_at_once(windows, monkeypatch, workers, at_once):
    made = []
    monkeypatch.setattr(loading, "DataLoader", lambda *args, **options: made.append(options) or [])
    assert list(loader(windows, [[0]], ids, workers, at_once=at_once)) == []
    ahead = (made[0]["prefetch_factor"] or 0) * workers
    assert ahead == 0 if workers == 0 else at_once <= ahead <= max(2 * workers, at_once + workers - 1)


LEFT_OPEN = """
import sys
sys.path.insert(0, {root!r})
from utils.data.loader import loader

batches = loader([{{"a": 1}}] * 8, [[0], [1], [2], [3]], list, num_workers=1)
print(next(batches))
"""


def test_a_program_ends_although_workers_wait_for_it_and_ignore_signals(tmp_path):
    """`multiprocessing` asks them to end by SIGTERM, and waits for them."""
    script = LEFT_OPEN.format(root=str(Path(__file__).resolve().parents[3]))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[{'a': 1}]"
