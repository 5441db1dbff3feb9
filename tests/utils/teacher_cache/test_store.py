"""The teacher's signals on disk: found by content, proved by hashes, refused to those they do not belong to."""

import errno
import json
import os
import pickle
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from models.config import LossConfig, Ramp
from tests.utils.teacher_cache.test_codec import said
from utils.config.settings import CacheConfig, EvaluationConfig
from utils.errors import RunError, UserError
from utils.evaluation.held_out import HeldOut
from utils.logs.progress import duration
from utils.machine.stop_signals import StopSignal
from utils.teacher_cache import building as cache_building
from utils.teacher_cache import manifest as manifest_module
from utils.teacher_cache import store
from utils.teacher_cache.building import CacheBuilding
from utils.teacher_cache.codec import Codec
from utils.teacher_cache.manifest import open_cache
from utils.teacher_cache.store import TeacherCache
from utils.training.plan import Plan

CODEC = Codec(3000, 8, "float32")
IDENTITY = {"teacher": "t", "teacher_dtype": "float32", "tokenizers_and_length": "k", "max_depth": 16}


def windows(count: int, seed: int = 0) -> list[dict]:
    random = np.random.default_rng(seed)
    return [{"student_ids": random.integers(0, 9, 20 + n), "bytes": 40 + n, "documents": f"d{n}"} for n in range(count)]


def opened(folder, *, codec=CODEC, text="text", accept=False, **identity) -> TeacherCache:
    config = CacheConfig(str(folder), accept_mismatch=accept)
    return open_cache(config, codec, IDENTITY | identity, text, main=True)


def filled(folder, some: list[dict], shards: int = 1) -> TeacherCache:
    cache = opened(folder)
    for part in np.array_split(np.arange(len(some)), shards):
        cache.keep(cache.keys(some[i] for i in part), [said(4, 8, seed=i) for i in part], 40, 0.1)
        cache.flush()
    return cache


def shards_of(folder) -> list:
    return sorted((folder / "shards").iterdir())


def test_a_window_is_found_by_its_content_in_any_order_by_any_process(tmp_path):
    some = windows(6)
    filled(tmp_path, some, shards=3)
    for cache in (opened(tmp_path), pickle.loads(pickle.dumps(opened(tmp_path)))):
        found = cache.read(cache.keys([some[4], some[1]]))
        assert np.array_equal(found.log_probs, np.concatenate([said(4, 8, seed=s).log_probs for s in (4, 1)]))
        assert cache.read(cache.keys(windows(1, seed=9))) is None
        assert cache.read([*cache.keys(some[:1]), *cache.keys(windows(1, seed=9))]) is None


def test_what_is_kept_can_be_read_at_once_and_by_others_once_it_is_written(tmp_path):
    some = windows(2)
    writer, reader = opened(tmp_path), opened(tmp_path)
    keys = writer.keys(some)
    kept = writer.keep(keys, [said(4, 8, seed=s) for s in (0, 1)], 40, 0.1)
    assert np.array_equal(writer.read(keys).ids, kept.ids) and reader.read(keys) is None
    writer.flush()
    assert np.array_equal(reader.read(keys).ids, kept.ids)
    before = shards_of(tmp_path)
    writer.keep(keys, [said(4, 8, seed=s) for s in (0, 1)], 40, 0.1)
    writer.flush()
    assert shards_of(tmp_path) == before, "a window that is there is not written again"
    assert "2 windows and 40 student tokens" in str(writer.written)


def test_what_waits_can_be_read_while_it_becomes_a_shard(tmp_path, monkeypatch):
    cache, some = opened(tmp_path), windows(2)
    keys = cache.keys(some)
    cache.keep(keys, [said(4, 8), said(4, 8)], 40, 0.1)
    holds, refresh = cache.holds, cache.refresh
    writer = threading.Thread(target=cache.flush)

    def holds_and_is_overtaken(keys):
        found = holds(keys)
        if not writer.ident:
            writer.start()
            writer.join(0.3)
        return found

    monkeypatch.setattr(cache, "holds", holds_and_is_overtaken)
    monkeypatch.setattr(cache, "refresh", lambda: (time.sleep(0.6), refresh()))
    found = cache.read(keys)
    writer.join()
    assert len(found.log_probs) == 8 and len(shards_of(tmp_path)) == 1


def test_of_a_batch_that_is_partly_there_the_stored_part_is_used(tmp_path):
    some = windows(2)
    cache = filled(tmp_path, some[:1])
    kept = cache.keep(cache.keys(some), [said(4, 8, seed=s) for s in (7, 1)], 40, 0.1)
    assert np.array_equal(kept.log_probs, np.concatenate([said(4, 8, seed=s).log_probs for s in (0, 1)]))
    assert cache.written.windows == 2, "each was written once"


def test_rows_that_were_left_out_are_no_rows_of_which_mass_was_lost(tmp_path):
    whole = said(4, 8, seed=0)
    thin = whole._replace(ids=whole.ids.copy(), log_tail=whole.log_tail.copy(), log_mass=whole.log_mass.copy())
    thin.ids[1:], thin.log_tail[1:], thin.log_mass[1:] = -1, 0.0, -np.inf
    cache = opened(tmp_path)
    cache.keep(cache.keys(windows(1)), [thin], 40, 0.1)
    assert cache.written.mass.sum() == 1


def test_a_full_buffer_becomes_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 300)
    cache, some = opened(tmp_path), windows(8)
    for window in some:
        cache.keep(cache.keys([window]), [said(4, 8)], 20, 0.1)
    assert len(shards_of(tmp_path)) >= 2


def test_a_cache_that_is_opened_while_another_process_writes_a_shard_leaves_it_alone(tmp_path, monkeypatch):
    writer, fsync, opening = opened(tmp_path), os.fsync, []

    def meanwhile(descriptor):
        fsync(descriptor)
        if not opening:
            opening.append(len(list((tmp_path / "shards").glob(".staging-*"))))
            opened(tmp_path)

    keys = writer.keys(windows(2))
    writer.keep(keys, [said(4, 8, seed=s) for s in (0, 1)], 40, 0.1)
    monkeypatch.setattr(os, "fsync", meanwhile)
    writer.flush()
    assert opening == [1] and len(shards_of(tmp_path)) == 1
    assert opened(tmp_path).holds(keys)


def test_what_a_killed_writer_left_goes_once_it_is_old(tmp_path):
    filled(tmp_path, windows(1))
    left = [folder / ".staging-x" for folder in (tmp_path, tmp_path / "shards")]
    for file in left:
        file.write_bytes(b"half")
        os.utime(file, (time.time() - 2 * manifest_module.LEFT_BEHIND,) * 2)
    opened(tmp_path)
    assert not any(file.exists() for file in left)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_shard_is_found_and_its_windows_are_missing(tmp_path, damage):
    some = windows(6)
    filled(tmp_path, some, shards=3)
    victim = shards_of(tmp_path)[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes({"flip": bytes(content), "cut": content[:-7], "empty": b""}[damage])
    cache = opened(tmp_path)
    assert sum(cache.holds([key]) for key in cache.keys(some)) == 4
    assert victim not in shards_of(tmp_path)


def test_a_damaged_shard_is_refused_where_it_cannot_be_built_again(tmp_path, monkeypatch):
    filled(tmp_path, windows(2))
    shards_of(tmp_path)[0].write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"1 of 1 shards do not match their sha256.*Copy it"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("differing", "overridable"),
    [
        ({"teacher": "u"}, True),
        ({"teacher_dtype": "float16"}, True),
        ({"text": "other"}, True),
        ({"tokenizers_and_length": "l"}, False),
        ({"max_depth": 2}, False),
        ({"codec": replace(CODEC, top_k=4)}, False),
        ({"codec": replace(CODEC, storage="compact")}, False),
        ({"codec": replace(CODEC, vocabulary=4000)}, False),
    ],
)
def test_a_cache_of_something_else_is_refused_with_the_difference_and_the_flag(tmp_path, differing, overridable):
    filled(tmp_path, windows(1))
    with pytest.raises(UserError) as raised:
        opened(tmp_path, **differing)
    named = next(iter(differing)) if "codec" not in differing else "->"
    assert named in str(raised.value) and "--cache-accept-mismatch" in str(raised.value)
    if overridable:
        assert opened(tmp_path, accept=True, **differing).holds(TeacherCache.keys(windows(1)))
    else:
        with pytest.raises(UserError, match="overrules"):
            opened(tmp_path, accept=True, **differing)


def test_what_was_asked_for_explains_a_difference_and_is_none(tmp_path):
    def asks(place, codec=CODEC, **asked):
        return open_cache(CacheConfig(str(place)), codec, IDENTITY, "text", main=True, asked=asked)

    asks(tmp_path, student="a", max_length=64)
    asks(tmp_path, student="where it is now", max_length=64)
    with pytest.raises(UserError, match=r"- top_k: 8 -> 4\n  - asked for student: a -> b\nExpected"):
        asks(tmp_path, replace(CODEC, top_k=4), student="b", max_length=64)
    file = tmp_path / "manifest.json"  # of before this was noted
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "asked"}))
    asks(tmp_path, student="b")


def test_a_text_that_was_accepted_once_is_known(tmp_path):
    opened(tmp_path)
    opened(tmp_path, text="second", accept=True)
    for text in ("text", "second"):
        opened(tmp_path, text=text)


def test_a_cache_that_was_opened_to_another_teacher_is_nobodys_alone(tmp_path):
    opened(tmp_path)
    for teacher in ("u", "t"):
        opened(tmp_path, teacher=teacher, accept=True)
        with pytest.raises(UserError, match=rf"teacher: t, then u -> {teacher}\n"):
            opened(tmp_path, teacher=teacher)
    assert json.loads((tmp_path / "manifest.json").read_text())["built_from"]["top_k"] == CODEC.top_k


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"format": 1}'])
def test_shards_without_a_readable_manifest_are_refused(tmp_path, manifest):
    filled(tmp_path, windows(1))
    file = tmp_path / "manifest.json"
    file.unlink() if manifest is None else file.write_text(manifest)
    with pytest.raises(UserError, match=r"manifest\.json"):
        opened(tmp_path)


def test_a_full_disk_is_one_message_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    filled(tmp_path, windows(2))
    before, cache = shards_of(tmp_path), opened(tmp_path)
    cache.keep(cache.keys(windows(1, seed=5)), [said(4, 8)], 20, 0.1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"No space left on device; needs 0\.0 MB, .* free"):
        cache.flush()
    assert shards_of(tmp_path) == before


def test_an_evaluation_is_measured_once_and_again_where_it_was_damaged(tmp_path):
    cache, calls = opened(tmp_path), []

    def measure():
        calls.append(1)
        return {"metrics": {"loss": 1.5}, "samples": ["é"]}

    assert cache.evaluation({"windows": "a"}) is None
    for _ in range(2):
        assert cache.evaluation({"windows": "a"}, measure)["samples"] == ["é"]
    assert len(calls) == 1
    (file,) = (tmp_path / "evaluations").iterdir()
    file.write_text(file.read_text().replace("1.5", "1.4"))
    assert cache.evaluation({"windows": "a"}) is None
    assert cache.evaluation({"windows": "a"}, measure)["metrics"] == {"loss": 1.5}
    assert json.loads(file.read_text())["measured"]["metrics"] == {"loss": 1.5}


# ---------------------------------------------------------------- building

LEARNED = 15
"""Tokens of the held-out windows that are learned from: a quarter of those that are read, as of conversations."""


class Batch:
    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def to(self, device):
        return self


class Teacher:
    """Says something of every window, and remembers it."""

    def __init__(self, cache: TeacherCache, stop_after: int = 10**6) -> None:
        self.cache, self.model, self.asked, self.stop_after = cache, None, 0, stop_after

    def requested(self) -> str | None:
        return "SIGTERM" if self.asked >= self.stop_after else None

    def begin(self, batch: Batch) -> bool:
        return False  # it computes when it is asked

    def signal(self, batch: Batch) -> None:
        self.asked += len(batch.rows)
        keys = self.cache.keys(batch.rows)
        self.cache.keep(keys, [said(len(row["student_ids"]), 8) for row in batch.rows], 20 * len(keys), 0.1)


class Column(list):
    """Windows that know their column `bytes`, as a data set does."""

    def __getitem__(self, at):
        return np.array([row["bytes"] for row in self]) if at == "bytes" else super().__getitem__(at)


def building(cache: TeacherCache, monkeypatch, steps: int = 3) -> CacheBuilding:
    alone = SimpleNamespace(
        process_index=0, num_processes=1, is_main_process=True, device="cpu", wait_for_everyone=lambda: None
    )
    held_out = HeldOut(EvaluationConfig(), alone, windows(3, seed=1), [], Batch, {}, 2)
    monkeypatch.setattr(HeldOut, "measure_teacher", lambda self, teacher: {"metrics": {}, "samples": []})
    monkeypatch.setattr(HeldOut, "coverage", lambda self: {"lm": LEARNED})
    plan = Plan(windows=10, micro_batch=2, global_batch=4, processes=1, total_steps=steps)
    return CacheBuilding(cache, Column(windows(10)), held_out, plan, seed=0)


def test_a_build_can_be_stopped_and_taken_up_and_then_needs_no_teacher(tmp_path, monkeypatch):
    first = building(opened(tmp_path), monkeypatch)
    assert first.needs_teacher(set())
    teacher = Teacher(first.cache, stop_after=7)
    assert first.build(teacher, Batch, True, teacher) == "SIGTERM"
    asked, second = teacher.asked, building(opened(tmp_path), monkeypatch)
    teacher = Teacher(second.cache)
    assert second.needs_teacher(set())
    assert second.build(teacher, Batch, True, StopSignal()) is None
    assert asked + teacher.asked == 13, "nothing is computed twice"
    third = building(opened(tmp_path), monkeypatch)
    assert not third.needs_teacher(set()) and third.needs_teacher({"feat"})


def test_while_it_is_built_a_cache_is_written_every_while(tmp_path, monkeypatch):
    clock, shards = [0.0], []
    monkeypatch.setattr(cache_building.time, "monotonic", lambda: clock[0])
    made = building(opened(tmp_path), monkeypatch)

    class Slow(Teacher):
        def signal(self, batch):
            super().signal(batch)
            clock[0] += cache_building.FLUSH_EVERY / 2
            shards.append(len(shards_of(tmp_path)) if (tmp_path / "shards").exists() else 0)

    teacher = Slow(made.cache)
    made.build(teacher, Batch, True, teacher)
    assert shards == [0, 0, 1, 1, 2, 2, 3], "before each of two held-out batches and five to learn from"


@pytest.mark.parametrize(
    ("loss", "codec", "told"),
    [
        ({}, Codec(3000, 64), ["INFO cache.top_k 64 takes the place of loss.top_k 256"]),
        ({"top_k": 100}, Codec(3000, 64), ["WARNING cache.top_k 64 takes the place of loss.top_k 100"]),
        ({"top_k": 64}, Codec(3000, 64), []),
        ({"temperature": 2.0}, Codec(3000, 256), []),
        ({"temperature": 2.0, "top_k": 200}, Codec(200, 200), []),
        ({"temperature": 1.0, "top_k": 128}, Codec(3000, 128), []),
        ({"temperature": 2.0, "top_k": 128}, Codec(3000, 128), ["WARNING the temperature rises to 2"]),
        (
            {"temperature": Ramp(((0, 1.0), (1, 4.0)))},
            Codec(3000, "adaptive"),
            ["INFO cache.top_k adaptive", "WARNING the temperature rises to 4, and cache.top_k is adaptive"],
        ),
    ],
)
def test_a_number_of_outcomes_that_changes_the_loss_is_told(loss, codec, told, caplog):
    config = SimpleNamespace(loss=LossConfig(**loss), cache=CacheConfig("x", top_k=codec.top_k))
    with caplog.at_level("INFO", logger="utils"):
        cache_building.warn_of_top_k(config, codec)
    said = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    assert len(said) == len(told) and all(map(str.startswith, said, told)), said


def test_only_windows_that_the_run_comes_to_are_built(tmp_path, monkeypatch):
    short = building(opened(tmp_path), monkeypatch, steps=1)
    teacher = Teacher(short.cache)
    short.build(teacher, Batch, True, StopSignal())
    assert teacher.asked == 3 + 4
    assert not building(opened(tmp_path), monkeypatch, steps=1).needs_teacher(set())


def test_the_forecast_is_what_is_written_and_too_little_disk_is_refused_before(tmp_path, monkeypatch, caplog):
    made = building(opened(tmp_path), monkeypatch)
    made.build(Teacher(made.cache), Batch, False, StopSignal())

    monkeypatch.setattr(cache_building, "free_disk", lambda _: 10)
    with pytest.raises(UserError, match=r"needs 0\.\d+ MB more, 0\.0 MB are free"):
        made.forecast()

    monkeypatch.setattr(cache_building, "free_disk", lambda _: 10**12)
    monkeypatch.setattr(cache_building, "KAGGLE_OUTPUT", 1000)
    with caplog.at_level("INFO", logger="utils"):
        made.forecast()
    assert "Kaggle keeps at most 20 GB" in caplog.text and "10 windows are missing" in caplog.text
    each = made.cache.written.bytes / LEARNED
    assert f"{each:.1f} bytes per student token" in caplog.text

    made.cache.written.tokens, made.cache.written.seconds = LEARNED, 1000.0  # 123 bytes of held-out text
    missing = sum(row["bytes"] for row in made.windows)
    with caplog.at_level("INFO", logger="utils"):
        made.forecast()
    assert f"and {duration(1000.0 * missing / 123)} of the teacher" in caplog.text


def test_a_cache_that_cannot_be_written_to_says_what_it_lacks(tmp_path, monkeypatch):
    made = building(opened(tmp_path), monkeypatch)
    monkeypatch.setattr(TeacherCache, "writable", False)
    with pytest.raises(UserError, match=r"lacks 10 of 10 training windows, 3 of 3 held-out windows"):
        made.needs_teacher(set())
