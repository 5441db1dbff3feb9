"""The steps of a stream: every window once a pass, whoever takes part and however often the run is interrupted."""

import shutil
import threading
from collections import Counter
from itertools import chain

import pytest

from tests.toy import StopAfter, ToyModule, digest, toy_config, train
from tests.utils.data.stream.toy_stream import batch_source, config, encode, open_stream, set_up, write
from utils.data.stream import packing
from utils.data.stream.packing import Packer, Workers
from utils.errors import RunError, UserError
from utils.machine.stop_signals import Interrupted
from utils.training.checkpoints import CheckpointStore
from utils.training.plan import Plan

COUNT = 90


@pytest.fixture
def setup(tmp_path):
    """About 85 documents to learn from, in blocks of 20."""
    return set_up(config(write(tmp_path / "text.jsonl", [f"text {number:05d}" for number in range(COUNT)])))


def plan(micro_batch: int = 2, accumulation: int = 2, processes: int = 1) -> Plan:
    settings = toy_config(batch_size=micro_batch, gradient_accumulation_steps=accumulation, max_steps=100)
    return Plan.of(settings, 0, processes)


def steps_of(setup, folder, first: int, end: int, *, rank: int = 0, of_plan: Plan | None = None) -> list[list[str]]:
    """Texts of every step."""
    stream = open_stream(setup, folder)
    try:
        steps = stream.steps(batch_source(rank), of_plan or plan(), first, end)
        return [list(chain(*step.batches)) for step in steps]
    finally:
        stream.close()


def test_two_processes_see_each_document_once_a_pass(tmp_path, setup):
    count = len(setup.beginning.corpus.train)
    steps = 2 * count // 4
    of_two = plan(1, 2, processes=2)
    shares = [steps_of(setup, tmp_path / "blocks", 0, steps, rank=rank, of_plan=of_two) for rank in range(2)]
    alone = steps_of(setup, tmp_path / "blocks", 0, steps)

    for first, second, whole in zip(*shares, alone, strict=True):
        assert len(first) == len(second) == 2
        assert sorted(first + second) == sorted(whole)
    in_first_pass = list(chain(*alone))[:count]
    assert sorted(in_first_pass[: count - 20]) == sorted(set(in_first_pass[: count - 20]))
    assert all(number in (1, 2, 3) for number in Counter(chain(*alone)).values())
    assert {*chain(*alone)} == {*setup.beginning.corpus.train}


def test_windows_that_fill_no_step_are_carried_into_the_next_block(tmp_path, setup):
    count = len(setup.beginning.corpus.train)
    alone = list(chain(*steps_of(setup, tmp_path / "blocks", 0, 2 * count // 4)))
    assert len(alone) % 4 == 0
    # all but those that wait for a third pass
    seen = Counter(alone)
    assert sum(2 - seen[text] for text in setup.beginning.corpus.train if seen[text] < 2) <= 3


def test_blocks_that_are_used_up_are_deleted(tmp_path, setup):
    steps_of(setup, tmp_path / "blocks", 0, 40)
    assert len(list((tmp_path / "blocks").iterdir())) <= 3


def test_blocks_smaller_than_a_step_are_joined(tmp_path):
    setup = set_up(config(write(tmp_path / "text.jsonl", ["one", "two", "three"]), block_bytes=1))
    steps = steps_of(setup, tmp_path / "blocks", 0, 5)
    assert [len(step) for step in steps] == [4] * 5
    assert {*chain(*steps)} == {*setup.beginning.corpus.train}


@pytest.mark.parametrize(("stop_after", "loses_blocks"), [(1, False), (5, True), (9, False), (13, True)])
def test_a_run_that_is_continued_computes_what_an_uninterrupted_one_does(tmp_path, setup, stop_after, loses_blocks):
    settings = toy_config(batch_size=2, gradient_accumulation_steps=2, max_steps=14, save_every=2)

    def session(folder, module, **options) -> str:
        store = CheckpointStore(folder / "checkpoints")
        stream = open_stream(setup, folder / "blocks")
        windows = encode(["one"], ["name"])
        point = store.resume_point()
        train(module, settings, windows=windows, stream=stream, checkpoints=store, resume_from=point, **options)
        return digest(module)

    whole = session(tmp_path / "whole", ToyModule(dropout=0.3))
    session(tmp_path / "cut", ToyModule(dropout=0.3), stop=StopAfter(stop_after))
    if loses_blocks:
        shutil.rmtree(tmp_path / "cut" / "blocks")
    assert session(tmp_path / "cut", ToyModule(dropout=0.3, seed=1)) == whole


def test_what_a_block_cannot_read_ends_the_run_with_its_place(tmp_path):
    file = write(tmp_path / "text.jsonl", [f"text {number:05d}" for number in range(COUNT)])
    setup = set_up(config(file))
    with file.open("a") as stream:
        stream.write("no JSON\n")
    with pytest.raises(UserError, match=f"text.jsonl:{COUNT + 1}"):
        steps_of(setup, tmp_path / "blocks", 0, 40)


def test_a_run_that_waits_for_a_block_can_be_ended(tmp_path, setup, monkeypatch):
    is_over = threading.Event()

    def check():
        is_over.set()
        raise Interrupted("SIGTERM")

    monkeypatch.setattr(packing, "write_windows", lambda *_: is_over.wait(20))
    stream = open_stream(setup, tmp_path / "blocks", check=check)
    with pytest.raises(Interrupted):
        next(stream.steps(batch_source(), plan(), 0, 9))
    stream.close()


def test_workers_make_the_same_windows(tmp_path, setup):
    packer = Packer(encode, setup.features)
    texts = [f"text {number:05d}" for number in range(2500)]
    contents = []
    for count in (0, 1):
        folder = tmp_path / str(count)
        folder.mkdir()
        workers = Workers(packer, count)
        files = workers.pack(texts, folder, lambda: None)
        workers.close()
        contents.append([(file.name, file.read_bytes()) for file in files])
    assert contents[0] == contents[1] and len(contents[0]) == 3


def test_a_block_of_a_run_that_held_out_other_text_is_made_again(tmp_path):
    text = write(tmp_path / "text.jsonl", [f"text {number:05d}" for number in range(COUNT)])
    for held_out in (["text 00001"], ["text 00002", "text 00003"]):
        setup = set_up(config(text, eval=str(write(tmp_path / "eval.jsonl", held_out))))
        learned = set(chain(*steps_of(setup, tmp_path / "blocks", 0, 30)))
        assert len(learned) > 80 and not learned & set(held_out)


@pytest.mark.parametrize("damaged", ["block.pt", "windows-*.arrow"])
def test_a_block_that_is_not_whole_is_made_again(tmp_path, setup, damaged, caplog):
    whole = steps_of(setup, tmp_path / "blocks", 0, 4)
    file = next((tmp_path / "blocks").glob(f"block-000000-*/{damaged}"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    caplog.clear()
    assert steps_of(setup, tmp_path / "blocks", 0, 4) == whole
    assert "is not whole" in caplog.text


def test_a_disk_that_is_full_ends_the_run_with_the_remedy(tmp_path, setup, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "write_windows", refuse)
    with pytest.raises(RunError, match=r"No space left on device.*data\.block_bytes"):
        steps_of(setup, tmp_path / "blocks", 0, 40)
    assert not list((tmp_path / "blocks").iterdir())
