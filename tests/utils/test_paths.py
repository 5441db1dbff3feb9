from pathlib import Path

import pytest

import train
from utils.errors import UserError
from utils.paths import cache_dir, user_path

NOBODY = "~nobody-of-that-name/a"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("~/a", "/home/me/a"), ("a/~", "a/~"), (Path("a"), "a"), ("./~nobody-of-that-name/a", "./~nobody-of-that-name/a")],
)
def test_a_home_is_filled_in_where_it_is_known(monkeypatch, name, meant):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert user_path(name) == Path(meant)


def test_a_home_that_nobody_knows_is_told_with_what_to_write_instead():
    with pytest.raises(UserError, match=r"~nobody-of-that-name stands for a home folder.* \./~nobody-of-that-name/a "):
        user_path(NOBODY)


@pytest.mark.parametrize(
    "command",
    [
        ["--config", "quickstart", "--output-dir", NOBODY],
        ["--config", "quickstart", "--set", f"output_dir={NOBODY}"],
        ["--config", "quickstart", "--output-dir", "run", "--cache-teacher", NOBODY],
        ["--config", "quickstart", "--output-dir", "run", "--teacher", NOBODY, "--train-data", "text.txt"],
        ["--config", "quickstart", "--output-dir", "run", "--resume", NOBODY],
        ["--config", NOBODY],
        ["--compare", NOBODY, NOBODY],
        ["--compare", "a", "b", "--output-dir", NOBODY],
    ],
    ids=["output", "set", "cache", "teacher", "resume", "config", "compared", "picture"],
)
def test_no_flag_makes_a_folder_that_is_called_as_the_home_of_nobody(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("Once upon a time there was a cat.\n" * 30)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()

    assert train.main(command) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "~nobody-of-that-name stands for a home folder" in said
    assert not list(tmp_path.glob("~*"))


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "ü" * 130, "x/" * 3000])
def test_a_name_that_no_file_system_takes_is_refused(name):
    with pytest.raises(UserError, match="longer than a file system takes"):
        user_path(name)


def test_a_name_with_a_null_character_is_refused():
    with pytest.raises(UserError, match="null character"):
        user_path("a\0b")


@pytest.mark.parametrize("name", ["x" * 255, "there/is/no such file", "*.txt", "owner/name:config:split"])
def test_a_name_of_nothing_yet_is_taken(name):
    assert str(user_path(name)) == name


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("CURRICULUM_DISTILLATION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/curriculum_distillation")
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", "/own")
    assert cache_dir() == Path("/own")
