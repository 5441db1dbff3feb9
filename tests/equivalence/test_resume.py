"""An interrupted run and its continuation compute, bit for bit, what an uninterrupted one computes."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from tests.gloo import launch
from tests.toy import StopAfter, ToyModule, digest, toy_config, train
from utils.logs.records import read_metrics
from utils.machine.launcher import rank
from utils.parallel.accelerator import build_accelerator
from utils.parallel.processes import on_main_process
from utils.training.checkpoints import CheckpointStore
from utils.training.red_flags import RedFlags

CONFIG = {"batch_size": 1, "gradient_accumulation_steps": 4, "epochs": 3, "patience": 3}
STEPS = 9  # 11 windows: 3 steps an epoch, the last one short
CHANGING = {"tokens_per_second", "peak_memory_mb"}


def evaluate(step: int) -> dict:
    torch.rand(step)  # disturbs the generators
    bits = [3.0, 2.5, 2.6, 2.4, 2.45][step // 2]
    return {
        "step": step,
        "split": "eval",
        "loss": bits,
        "perplexity": 2.0,
        "bits_per_byte": bits,
        "tokens": 1,
        "bytes": 1,
    }


def run(folder: Path, stop: StopAfter | None = None, seed: int = 0, **values):
    """One session in a fresh module; continues what the folder holds."""
    module = ToyModule(dropout=0.3, seed=seed)
    store = CheckpointStore(folder / "checkpoints", keep=2)
    flags = RedFlags(STEPS, 12)
    options = {"evaluate": evaluate, "evaluate_every": 2, "flags": flags, "stop": stop, "every": 2, "total": STEPS}
    config = toy_config(**CONFIG | values)
    result = train(module, config, folder, checkpoints=store, resume_from=store.resume_point("auto"), **options)
    return module, result, flags


def logged(folder: Path) -> list[dict]:
    records = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in CHANGING} for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    module, result, flags = run(folder)
    return digest(module), result, logged(folder), flags.state_dict(), _newest(folder)


def _newest(folder: Path):
    store = CheckpointStore(folder / "checkpoints")
    return store.load(store.newest_whole())


def assert_same(a, b) -> None:
    """Nested containers of tensors and numbers, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("stop_at", range(STEPS))
def test_stopping_at_any_step_changes_nothing(tmp_path, uninterrupted, stop_at):
    """Every k, in mid-epoch too; the continuation starts from other weights, so all of them must be restored."""
    weights, whole, log, flags, last = uninterrupted
    _, first, _ = run(tmp_path, StopAfter(stop_at))
    assert (first.steps, first.stopped_by) == (stop_at, "SIGTERM")
    torch.manual_seed(1234 + stop_at)
    module, second, later_flags = run(tmp_path, seed=99)
    assert digest(module) == weights
    assert (second.steps, second.stopped_by, second.resumed_from) == (STEPS, "finished", stop_at)
    assert (second.best_step, second.best_bits_per_byte) == (whole.best_step, whole.best_bits_per_byte) == (6, 2.4)
    assert logged(tmp_path) == log
    assert later_flags.state_dict() == flags
    again = _newest(tmp_path)
    assert_same(again.tensors, last.tensors)
    assert_same(again.objects["optimizer"], last.objects["optimizer"])
    assert_same(again.objects["scheduler"], last.objects["scheduler"])


def test_many_interruptions_change_nothing(tmp_path, uninterrupted):
    for attempt in range(STEPS):
        run(tmp_path, StopAfter(1), seed=attempt)
    module, result, _ = run(tmp_path, seed=77)
    assert digest(module) == uninterrupted[0]
    assert logged(tmp_path) == uninterrupted[2]
    assert result.steps == STEPS


def test_a_finished_run_stays_finished(tmp_path, uninterrupted):
    run(tmp_path)
    module, result, _ = run(tmp_path, seed=5)
    assert (result.stopped_by, result.resumed_from) == ("finished", STEPS)
    assert digest(module) == uninterrupted[0]


def test_patience_keeps_counting_through_a_resume(tmp_path):
    """Evaluations 2.5 (step 2), 2.6 (4): with patience 1 the run ends at step 4, wherever it was interrupted."""
    _, first, _ = run(tmp_path, StopAfter(3), patience=1)
    module, second, _ = run(tmp_path, seed=3, patience=1)
    assert (first.steps, second.steps, second.stopped_by, second.best_step) == (3, 4, "early_stopping", 2)
    best, _, _ = run(tmp_path / "other", StopAfter(2), patience=1)
    assert digest(module) == digest(best)  # the weights of the best evaluation are put back
    module, third, _ = run(tmp_path, seed=4, patience=1)
    assert (third.steps, third.stopped_by) == (4, "early_stopping")
    assert digest(module) == digest(best)


def test_resume_of_a_run_cut_into_other_steps_is_refused(tmp_path):
    from utils.errors import UserError

    run(tmp_path, StopAfter(2))
    with pytest.raises(UserError, match=r"windows_per_step: 4 -> 8[\s\S]*total_steps: 9 -> 6"):
        run(tmp_path, gradient_accumulation_steps=8)


def _in_process(folder: Path) -> tuple[tuple, int, tuple]:
    accelerator, config = build_accelerator("no", cpu=True), toy_config(**CONFIG, save_every=3)

    def session(place: str, seed: int, stop: StopAfter | None = None):
        module, store = ToyModule(dropout=0.3, seed=seed), CheckpointStore(folder / place)
        random.seed(100 * seed + rank())  # every process has generators of its own; the loop leaves this one alone
        start = on_main_process(accelerator, lambda: store.resume_point("auto"))
        result = train(module, config, None, checkpoints=store, resume_from=start, stop=stop)
        return digest(module), result.steps, random.random()

    whole = session("whole", 0)
    first = session("parts", 0, StopAfter(2))
    return whole, first[1], session("parts", 7)


def test_two_processes_resume_bit_equal_each_with_its_own_generators(tmp_path):
    """11 windows in steps of 8: in an epoch's last step the second process has less to do than the first."""
    (whole, stopped, resumed), (other_whole, other_stopped, other_resumed) = launch(2, _in_process, tmp_path)
    assert stopped == other_stopped == 2
    assert whole[:2] == resumed[:2] == other_whole[:2] == other_resumed[:2] and whole[1] == 6
    assert resumed[2] == whole[2] != other_whole[2] == other_resumed[2]


SESSION = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from tests.equivalence import test_resume
    from tests.toy import ToyModule, digest
    forward = ToyModule.forward
    def slow(self, *args, **options):
        time.sleep(0.1)
        return forward(self, *args, **options)
    ToyModule.forward = slow
    module, result, _ = test_resume.run(Path(sys.argv[1]), save_every=1)
    print(digest(module), result.steps)
    """
)


def _session(folder: Path) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SESSION, str(folder)], env=environment, stdout=subprocess.PIPE, text=True, cwd=root
    )


def test_kill_minus_nine_and_resume_gives_the_same_weights(tmp_path, uninterrupted):
    session = _session(tmp_path)
    limit = time.monotonic() + 60
    while not any((tmp_path / "checkpoints").glob("step-*")) and time.monotonic() < limit:
        time.sleep(0.005)
    time.sleep(0.6)  # in the middle of a later step
    session.send_signal(signal.SIGKILL)
    session.communicate()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept and kept[-1] < f"step-{STEPS:08d}", "the run was over before the kill"
    module, result, _ = run(tmp_path, seed=8)
    assert result.resumed_from and digest(module) == uninterrupted[0]
    assert json.dumps(logged(tmp_path)) == json.dumps(uninterrupted[2])
