"""Files and folders are whole or absent."""

import json
import os
import time
from pathlib import Path

import pytest

from utils import files
from utils.files import atomic_folder, clean_leftovers, remove_folder, write_json, write_text


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_as_it_is(tmp_path):
    write_text(tmp_path / "a.txt", "one\r\ntwo\u00e9\n")
    assert (tmp_path / "a.txt").read_bytes() == b"one\r\ntwo\xc3\xa9\n"
    assert names(tmp_path) == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_refuses_what_json_cannot_hold(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 0.1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 0.1]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 0.1]}


def test_folder_appears_when_the_block_ends(tmp_path):
    with atomic_folder(tmp_path / "deep" / "final") as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "a").write_text("x")
        assert not (tmp_path / "deep" / "final").exists()
    assert (tmp_path / "deep" / "final" / "inner" / "a").read_text() == "x"
    assert names(tmp_path / "deep") == ["final"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_folder_vanishes_when_the_block_raises(tmp_path, error):
    with atomic_folder(tmp_path / "final") as staging:
        (staging / "a").write_text("old")
    with pytest.raises(error), atomic_folder(tmp_path / "final") as staging:
        (staging / "a").write_text("new")
        raise error
    assert (tmp_path / "final" / "a").read_text() == "old"
    assert names(tmp_path) == ["final"]


def test_folder_replaces_an_older_one_whole(tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "final") as staging:
            (staging / content).write_text(content)
    assert names(tmp_path / "final") == ["new"]
    assert names(tmp_path) == ["final"]


def test_a_crash_between_the_two_renames_is_undone(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "final") as staging:
        (staging / "a").write_text("old")
    real, calls = os.replace, []

    def crash(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise SystemExit("killed here")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(SystemExit), atomic_folder(tmp_path / "final") as staging:
        (staging / "a").write_text("new")
    monkeypatch.undo()
    assert not (tmp_path / "final").exists()
    assert clean_leftovers(tmp_path) == [".replaced-final"]
    assert (tmp_path / "final" / "a").read_text() == "old"


def test_leftovers_go_and_everything_else_stays(tmp_path):
    for name in (".staging-step-1-abc", ".deleted-xyz", ".replaced-step-2", "step-2", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / ".staging-a.json-1").write_text("half")
    clean_leftovers(tmp_path)
    assert names(tmp_path) == [".ipynb_checkpoints", "step-2"]
    assert clean_leftovers(tmp_path / "missing") == []


def test_leftovers_that_may_still_be_written_stay_where_others_write(tmp_path):
    for name, age in ((".staging-old", 7300), (".staging-new", 7100)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert clean_leftovers(tmp_path, older_than=7200) == [".staging-old"]
    assert names(tmp_path) == [".staging-new"]


def test_removed_folder_is_gone_at_once_even_if_deleting_fails(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("x")
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
    remove_folder(tmp_path / "old")
    assert not (tmp_path / "old").exists()
    monkeypatch.undo()
    clean_leftovers(tmp_path)
    assert names(tmp_path) == []
    remove_folder(tmp_path / "old")


def test_a_file_name_that_is_no_utf8_can_be_written_into_json_and_text(tmp_path):
    name = os.fsdecode(b"te\xe9xt.jsonl")
    write_json(tmp_path / "a.json", {"data": name})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"data": name}
    write_text(tmp_path / "a.md", f"{name} 子")
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == "te\\udce9xt.jsonl 子"


def test_the_nearest_folder_of_one_that_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.nearest_existing(tmp_path) == tmp_path
    assert files.nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert files.nearest_existing(Path("a/b")) == tmp_path
