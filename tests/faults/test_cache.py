"""The teacher cache in the real program: killed, damaged, mistaken for another, and read without the teacher."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import train
from models.teacher.frozen import FrozenTeacher
from tests.faults.conftest import Place, documents, write_jsonl
from tests.faults.test_kill import PATIENCE, ROOT, Session, same_outcome, steps_in
from tests.gloo import launch
from utils.logs.records import read_metrics
from utils.machine.stop_signals import StopSignal
from utils.run import stages
from utils.run.quickstart import train_tokenizer
from utils.teacher_cache import building

SHORT = ["--max-steps", "4", "--eval-every", "0", "--log-every", "1"]


def run(place: Place, output: Path, cache: Path, *more: str) -> int:
    return train.main(place.arguments(output, "--cache-teacher", str(cache), *SHORT, *more))


@pytest.fixture(scope="module")
def built(place, tmp_path_factory) -> Path:
    """A cache of what four steps need."""
    folder = tmp_path_factory.mktemp("built")
    assert run(place, folder / "run", folder / "cache", "--build-cache-only") == 0
    assert not (folder / "run" / "checkpoints").exists()
    return folder / "cache"


@pytest.fixture
def cache(built, tmp_path) -> Path:
    """One of its own for a test to spoil."""
    return Path(shutil.copytree(built, tmp_path / "cache"))


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(output / "metrics.jsonl") if "terms" in record]


def refused(capsys, *named: str) -> None:
    said = " ".join(capsys.readouterr().out.split())
    assert "Traceback" not in said
    for words in named:
        assert words in said, said


def test_without_its_weights_at_hand_the_report_is_whole_and_the_losses_are_those_of_the_teacher(
    place, tmp_path, monkeypatch, capsys
):
    exact = ("--set", "cache.storage=float32", "--cache-top-k", "256", "--batch-size", "1")
    online = tmp_path / "online"
    assert train.main(place.arguments(online, *SHORT, "--batch-size", "1")) == 0
    assert run(place, tmp_path / "writing", tmp_path / "exact", *exact) == 0

    monkeypatch.setattr(stages, "load_teacher", lambda job: pytest.fail("the teacher was loaded"))
    assert run(place, tmp_path / "reading", tmp_path / "exact", *exact) == 0
    assert losses(online) == losses(tmp_path / "writing") == losses(tmp_path / "reading")

    reports = [json.loads((tmp_path / name / "evaluation_report.json").read_text()) for name in ("writing", "reading")]
    for key in ("teacher", "retention", "samples", "student"):
        assert reports[0][key] == reports[1][key]
    assert reports[0]["retention"]["top1_agreement"] is not None
    assert "teacher" in reports[0]["samples"][0]
    assert "the teacher is not loaded" in capsys.readouterr().out

    monkeypatch.undo()
    assert run(place, tmp_path / "compact", tmp_path / "small", *exact[2:]) == 0
    assert losses(tmp_path / "compact") == pytest.approx(losses(online), rel=2e-3)


def test_killed_while_it_writes_its_cache_a_run_ends_as_one_that_was_not(place, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    arguments = ("--epochs", "2", "--eval-every", "0")
    session = Session(place, whole, "--cache-teacher", str(tmp_path / "a"), *arguments)
    assert session.ended() == 0, session.output()
    killed = Session(place, output, "--cache-teacher", str(tmp_path / "b"), *arguments)
    assert killed.stopped_after(6, signal.SIGKILL, 0.01) == -signal.SIGKILL
    assert steps_in(output / "metrics.jsonl") < 20, "the first epoch was over"
    assert list((tmp_path / "b" / "shards").glob("*.safetensors"))
    session = Session(place, output, "--cache-teacher", str(tmp_path / "b"), *arguments)
    assert session.ended() == 0, session.output()
    assert same_outcome(output, whole)


KILLED_WHILE_BUILDING = """
import os, signal, sys
import train
from models.teacher.frozen import FrozenTeacher
from tests.gloo import launch
from utils.teacher_cache import building

building.FLUSH_EVERY = 0  # every batch, as if each took the teacher half a minute
answer, asked = FrozenTeacher.signal, []

def signal_or_die(*args):
    asked.append(args)
    if len(asked) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(*args)

FrozenTeacher.signal = signal_or_die
sys.exit(train.main(sys.argv[2:]))
"""


def test_killed_while_it_is_only_built_a_cache_keeps_what_was_computed_before(place, tmp_path, monkeypatch):
    arguments = place.arguments(tmp_path / "run", "--cache-teacher", str(tmp_path / "cache"), *SHORT)
    arguments.append("--build-cache-only")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", KILLED_WHILE_BUILDING, "13", *arguments]
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=PATIENCE).returncode == -signal.SIGKILL
    answer, asked = FrozenTeacher.signal, []
    monkeypatch.setattr(FrozenTeacher, "signal", lambda *args: asked.append(args) or answer(*args))
    assert train.main(arguments) == 0
    assert len(asked) == 3 + 16 - 12, "of 3 held-out batches and 16 batches to learn from, 12 were there"


def test_two_processes_fill_a_cache_together_and_learn_from_it_what_they_learn_from_the_teacher(place, tmp_path):
    def two(name: str, *more: str) -> str:
        arguments = place.arguments(tmp_path / name, *SHORT, "--batch-size", "1", *more)
        assert launch(2, train.main, arguments) == [0, 0]
        return (tmp_path / name / "train.log").read_text()

    exact = ("--cache-teacher", str(tmp_path / "cache"), "--set", "cache.storage=float32", "--cache-top-k", "256")
    two("online")
    told = re.search(r"is complete: (\d+) windows", two("building", *exact, "--build-cache-only"))[1]
    held = [safe_open(file, "np").get_slice("keys").get_shape()[0] for file in (tmp_path / "cache/shards").iterdir()]
    assert len(held) == 4, "of each process one of held-out windows and one to learn from"
    assert sum(held) == int(told) > 32
    assert "the teacher is not loaded" in two("reading", *exact)
    assert losses(tmp_path / "online") == losses(tmp_path / "reading") and len(losses(tmp_path / "online")) == 4


def signal_in_one_process(arguments: list[str]) -> int:
    if os.environ["RANK"] == "1":
        StopSignal.requested = lambda self: "SIGTERM"
    return train.main(arguments)


def test_a_signal_to_one_process_that_builds_ends_them_all(place, tmp_path):
    """The others would wait for it."""
    arguments = place.arguments(tmp_path / "run", "--cache-teacher", str(tmp_path / "cache"), *SHORT)
    assert launch(2, signal_in_one_process, arguments) == [143, 143]


def test_a_flipped_bit_is_found_and_that_part_is_built_again(place, cache, tmp_path, capsys):
    victim = next((cache / "shards").iterdir())
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    assert run(place, tmp_path / "run", cache, "--build-cache-only") == 0
    refused(capsys, "does not match its sha256", "the teacher is loaded for")
    before = {file.name: file.read_bytes() for file in (cache / "shards").iterdir()}
    assert run(place, tmp_path / "run", cache, "--build-cache-only") == 0
    assert {file.name: file.read_bytes() for file in (cache / "shards").iterdir()} == before


def test_a_cache_of_another_teacher_is_refused(place, cache, tmp_path, capsys):
    other = Path(shutil.copytree(place.teacher, tmp_path / "other"))
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1e-3
    model.save_pretrained(other)
    assert run(place, tmp_path / "run", cache, "--teacher", str(other)) == 2
    refused(capsys, "built from something else", "- teacher: ", "--cache-accept-mismatch uses it all the same")
    assert not (tmp_path / "run").exists()
    assert run(place, tmp_path / "run", cache, "--teacher", str(other), "--cache-accept-mismatch") == 0


def test_a_cache_of_another_tokenizer_is_refused(place, cache, tmp_path, capsys):
    other = Path(shutil.copytree(place.student, tmp_path / "other"))
    train_tokenizer(documents(90, seed=5), 280).save_pretrained(other)
    assert run(place, tmp_path / "run", cache, "--student", str(other), "--cache-accept-mismatch") == 2
    refused(capsys, "- tokenizers_and_length: ", "- vocabulary_map: ", "overrules teacher, teacher_dtype, text only")
    assert run(place, tmp_path / "run", cache, "--student", str(other), "--max-length", "32") == 2
    refused(capsys, f"- asked for student: {place.student} -> {other}", "- asked for max_length: 64 -> 32")


def test_a_cache_in_another_precision_is_refused_with_the_flag_that_reads_it(place, cache, tmp_path, capsys):
    """Nobody need have asked for it: `auto` differs between devices."""
    assert run(place, tmp_path / "run", cache, "--teacher-dtype", "bfloat16") == 2
    refused(capsys, "teacher_dtype: float32 -> bfloat16", "Put it back (--teacher-dtype float32)")
    assert run(place, tmp_path / "run", cache, "--mixed-precision", "bf16", "--teacher-dtype", "float32") == 0


def test_a_cache_of_another_text_is_refused_and_can_be_added_to(place, cache, tmp_path, capsys):
    other = write_jsonl(tmp_path / "other.jsonl", documents(60, seed=3))
    assert run(place, tmp_path / "run", cache, "--train-data", str(other)) == 2
    refused(capsys, "- text: ", "--cache-accept-mismatch")
    before = len(list((cache / "shards").iterdir()))
    more = ("--train-data", str(other), "--cache-accept-mismatch", "--build-cache-only")
    assert run(place, tmp_path / "run", cache, *more) == 0
    assert len(list((cache / "shards").iterdir())) > before


def test_too_little_disk_is_told_before_training(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(building, "free_disk", lambda _: 1000)
    assert run(place, tmp_path / "run", tmp_path / "cache") == 2
    refused(capsys, "MB more, 0.0 MB are free", "--cache-top-k")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_contradictory_settings_are_told_at_once(place, tmp_path, capsys):
    assert train.main(place.arguments(tmp_path / "run", "--build-cache-only")) == 2
    refused(capsys, "--cache-teacher DIR")


CHOSEN = ["--set", "loss.select_by=teacher_entropy", "curriculum.select={points: [[0, 0.1], [1, 0.3]]}"]


def test_a_cache_keeps_what_the_teachers_entropy_chooses_and_serves_no_other_choice(place, built, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert run(place, tmp_path / "first", cache, *CHOSEN) == 0
    assert 0 < size_of(cache) < 0.75 * size_of(built)

    # The teacher is not loaded: the cache has all that four steps need.
    capsys.readouterr()
    assert run(place, tmp_path / "second", cache, *CHOSEN) == 0
    assert "the teacher is not loaded" in " ".join(capsys.readouterr().out.split())
    assert losses(tmp_path / "first") == losses(tmp_path / "second")

    assert run(place, tmp_path / "other", cache) == 2
    refused(capsys, "rows: 0.3 of each window, by the teacher's entropy", "-> -")

    # Which rows the teacher can judge, and so which are chosen, is another matter then.
    assert run(place, tmp_path / "other", cache, *CHOSEN, "loss.min_prefix_mass=0.5") == 2
    refused(capsys, "with min_prefix_mass 0.001 and", "-> 0.3 of each window", "with min_prefix_mass 0.5 and")


def size_of(cache: Path) -> int:
    """Bytes of the shards of a cache."""
    return sum(shard.stat().st_size for shard in (cache / "shards").iterdir())
