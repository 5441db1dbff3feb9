"""Files of rounds: whatever is in one, it is read as it was written or not at all."""

import gzip
import json

import pytest

from utils.on_policy.round_files import FORMAT, RoundFiles, WrittenText

TEXTS = [WrittenText(step=2, slot=1, window=7, ids=list(range(60))), WrittenText(2, 3, 8, None)]


@pytest.fixture
def files(tmp_path) -> RoundFiles:
    files = RoundFiles(tmp_path / "rounds", {"new_tokens": 8})
    files.write(2, TEXTS, [{"prompt": "a", "text": "b"}])
    return files


def test_a_file_with_any_byte_lost_or_turned_is_as_it_was_or_not_there(files, caplog):
    [path] = files.folder.iterdir()
    whole = path.read_bytes()
    for number in range(len(whole)):
        path.write_bytes(whole[:number] + bytes([whole[number] ^ 0x10]) + whole[number + 1 :])
        assert files.read(2) in (TEXTS, None)
        path.write_bytes(whole[:number])
        assert files.read(2) is None
    assert "are not used (error)" in caplog.text

    path.write_bytes(whole)
    assert files.read(2) == TEXTS and files.newest_shown() == (2, [{"prompt": "a", "text": "b"}])


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"format": FORMAT, "settings": {"new_tokens": 8}, "texts": None, "shown": []},
        {"format": FORMAT, "settings": {"new_tokens": 8}, "texts": [{"token": 1}], "shown": []},
        {"format": FORMAT, "settings": {"new_tokens": 8}, "texts": []},
        {"format": FORMAT + 1},
    ],
)
def test_other_content_is_not_used(value, files, caplog):
    [path] = files.folder.iterdir()
    path.write_bytes(gzip.compress(json.dumps(value).encode()))
    assert files.read(2) is None and files.newest_shown() is None and str(path) in caplog.text


def test_texts_of_other_settings_are_not_used(files, caplog):
    others = RoundFiles(files.folder, {"new_tokens": 9})
    assert others.read(2) is None and others.newest_shown() is None and "other settings" in caplog.text
