"""Memory that runs out while training: smaller micro-batches, the same optimizer steps; or an error that helps."""

import logging
import os
import socket

import pytest
import torch
import torch.multiprocessing

from tests.toy import StopAfter, ToyModule, digest, toy_config, toy_windows, train
from utils.training.checkpoints import CheckpointStore
from utils.training.out_of_memory import OutOfMemory

TOLD = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.89 GiB."


class Full(ToyModule):
    """Has no memory for more than `most` windows from optimizer step `since` on, in the forward or the backward."""

    def __init__(self, most: int, since: int = 0, during: str = "forward", error=torch.OutOfMemoryError, **kind):
        super().__init__(**kind)
        self.most, self.since, self.during, self.error = most, since, during, error
        self.seen: list[tuple[int, int]] = []
        """(optimizer step, windows) of every forward."""

    def forward(self, batch, step, **options):
        self.seen.append((step, len(batch.ids)))
        full = step >= self.since and len(batch.ids) > self.most
        if full and self.during == "forward":
            raise self.error(TOLD)
        output = super().forward(batch, step, **options)
        if full:
            output.loss.register_hook(self._fail)
        return output

    def _fail(self, gradient):
        raise self.error(TOLD)


class OneOf(Full):
    """Has no memory for two windows in one of the micro-batches of optimizer step 2."""

    def __init__(self, micro_batch: int) -> None:
        super().__init__(99, since=1, dtype=torch.float64)
        self.micro_batch = micro_batch

    def forward(self, batch, step, **options):
        done = sum(at == step for at, _ in self.seen)
        self.most = 1 if done == self.micro_batch else 99
        return super().forward(batch, step, **options)


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("during", ["forward", "backward"])
@pytest.mark.parametrize("since", [0, 3])
def test_the_run_goes_on_as_one_that_was_continued_with_half_the_micro_batch(tmp_path, caplog, during, since):
    """Bit for bit, with dropout: nothing of the step that failed is left behind."""
    module = Full(2, since, during, dropout=0.3)
    result = train(module, toy_config(batch_size=4, gradient_accumulation_steps=2, epochs=3))
    told = warnings(caplog)
    reference, store = ToyModule(dropout=0.3), CheckpointStore(tmp_path)
    large, small = ({"batch_size": m, "gradient_accumulation_steps": 8 // m, "epochs": 3} for m in (4, 2))
    train(reference, toy_config(**large), checkpoints=store, stop=StopAfter(since))
    train(reference, toy_config(**small), checkpoints=store, resume_from=store.newest_whole())
    assert result.steps == 6 and digest(module) == digest(reference)
    assert len(told) == 1, told
    assert f"step {since + 1} with micro-batches of 4" in told[0] and "of 2 (accumulation 4)" in told[0]
    assert "effective batch stays 8 windows" in told[0] and "contrastive" not in told[0]
    assert max(size for step, size in module.seen if step > since) == 2


def test_it_is_halved_until_it_fits_and_the_weights_are_those_of_any_other_cut(caplog):
    module, reference = Full(1, dtype=torch.float64), ToyModule(dtype=torch.float64)
    train(module, toy_config(batch_size=7, gradient_accumulation_steps=1))
    train(reference, toy_config(batch_size=7, gradient_accumulation_steps=1))
    assert len(warnings(caplog)) == 3  # 7 -> 4 -> 2 -> 1
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-10, atol=1e-12)


def test_a_cpu_without_memory_is_recognised(caplog):
    def error(_: str) -> RuntimeError:
        return RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"
        )

    assert train(Full(1, error=error), toy_config(batch_size=2, gradient_accumulation_steps=2)).steps == 6
    assert len(warnings(caplog)) == 1


def test_one_window_that_does_not_fit_ends_with_the_forecast_and_what_to_do(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    with pytest.raises(OutOfMemory) as raised:
        train(Full(0, since=2), toy_config(), checkpoints=store, forecast="17.2 GiB (teacher weights 9.1)")
    text = str(raised.value)
    for part in ("optimizer step 3", "one window", "17.2 GiB (teacher weights 9.1)", "--batch-size", "--max-length"):
        assert part in text
    assert [*store.steps()] == [2]
    result = train(ToyModule(), toy_config(), checkpoints=store, resume_from=store.newest_whole())
    assert (result.resumed_from, result.steps) == (2, 6)


def test_memory_that_runs_out_elsewhere_is_explained_too():
    def evaluate(step: int) -> dict:
        raise torch.OutOfMemoryError(TOLD)

    with pytest.raises(OutOfMemory, match=r"Tried to allocate 2.00 GiB.*Forecast before the start: 5 GiB\. Lower"):
        train(ToyModule(), toy_config(), evaluate=evaluate, evaluate_every=1, forecast="5 GiB")


def test_another_error_is_left_as_it_is():
    def error(_: str) -> RuntimeError:
        return RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        train(Full(1, error=error), toy_config(batch_size=2))


def test_a_red_flag_for_repeated_batches_is_not_raised_by_a_repeated_step():
    seen = []

    class Flags:
        def batch(self, labels, epoch, documents):
            seen.extend(documents)

        def check(self, record):
            pass

        def state_dict(self):
            return {}

    train(Full(1, since=1), toy_config(batch_size=2, epochs=1), windows=toy_windows(11), flags=Flags())
    assert sorted(seen) == sorted(window["documents"] for window in toy_windows(11))


def _in_process(rank: int, processes: int, port: int, results) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    for micro_batch in (0, 1):  # the first one of a step, or the last, after which gradients are exchanged
        module = OneOf(micro_batch) if rank == 1 else Full(99, dtype=torch.float64)
        module.register_buffer("told", torch.zeros(1))  # DDP sends buffers around at the start of a forward
        train(module, toy_config(batch_size=2, gradient_accumulation_steps=2), windows=toy_windows(16))
        results[rank, micro_batch] = {name: value.numpy() for name, value in module.state_dict().items()}, module.seen


def test_two_processes_agree_where_one_of_them_has_no_memory():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_in_process, args=(2, port, results), nprocs=2)
        found = dict(results)
    alone = ToyModule(dtype=torch.float64)
    train(alone, toy_config(batch_size=4, gradient_accumulation_steps=2), windows=toy_windows(16))
    for name, value in alone.state_dict().items():
        for weights, seen in found.values():
            torch.testing.assert_close(torch.from_numpy(weights[name]), value, rtol=1e-10, atol=1e-12)
            assert [size for step, size in seen if step == 2] == [1, 1, 1, 1]
    assert {len(seen) for (rank, _), (_, seen) in found.items() if rank == 0} == {2 + 2 + 4 + 8}
