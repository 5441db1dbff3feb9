"""A reader goes on from any document, whatever the text is kept in."""

import csv
import gzip
import io
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from utils.config.settings import DataConfig
from utils.data.documents import FirstPlaces
from utils.data.stream.reader import Reader, open_source
from utils.errors import RunError, UserError

TEXTS = [f"Text {number}, größer\nin two lines" for number in range(7)]
ROWS = [{"text": text} for text in TEXTS]


def as_csv() -> bytes:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerows([["number", "text"], *([number, text] for number, text in enumerate(TEXTS))])
    return table.getvalue().encode()


def as_parquet() -> bytes:
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), table, row_group_size=3)
    return table.getvalue()


LINES = "".join(json.dumps(row) + "\n\n" for row in ROWS).encode()
FILES = {
    "marks.txt": "".join(f"{text}\n<|endoftext|>\n" for text in TEXTS).encode(),
    "blank.txt": "\n\n\n".join(TEXTS).encode(),
    "bom.txt": b"\xef\xbb\xbf" + "\r\n\r\n".join(TEXTS).encode(),
    "rows.jsonl": LINES,
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.jsonl.zst": pyarrow.compress(LINES, "zstd", asbytes=True),
    "rows.json": json.dumps(ROWS).encode(),
    "lines.json": LINES,
    "rows.csv": as_csv(),
    "rows.parquet": as_parquet(),
}


def reader_of(name: str, **options) -> Reader:
    config = DataConfig(train=[name], streaming=True, **options)
    return Reader(config, open_source(config, name), name, FirstPlaces())


def require_every_beginning(name: str, expected: list[str], **options) -> None:
    """Check that a reader yields these texts again and again, and that another goes on anywhere."""
    reader = reader_of(name, **options)
    states = []
    for text in expected * 2:
        states.append(reader.state_dict())
        assert reader.take() == text
    assert reader.passes == 2

    for number, state in enumerate(states):
        other = reader_of(name, **options)
        other.load_state_dict(json.loads(json.dumps(state)))
        assert [other.take() for _ in expected] == (expected * 3)[number:][: len(expected)]


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_on_from_any_document(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    require_every_beginning(str(tmp_path / name), TEXTS)


@pytest.mark.parametrize("separator", ["|", "\\n--\\n", " -\\n- "])
def test_a_text_that_is_cut_at_a_string_is_read_on_from_any_document(tmp_path, separator):
    between = separator.replace("\\n", "\n")
    (tmp_path / "cut.txt").write_bytes(b"\xef\xbb\xbf" + between.join(TEXTS).encode())
    require_every_beginning(str(tmp_path / "cut.txt"), TEXTS, document_separator=separator)


def test_lines_that_are_joined_are_read_on_from_any_document(tmp_path):
    rows = [line for number in range(5) for line in (f"# {number}", "one", "two")]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    expected = [f"# {number}\none\ntwo\n" for number in range(5)]
    require_every_beginning(str(tmp_path / "lines.jsonl"), expected, document_start="^# ")


def test_the_files_of_a_folder_are_read_one_after_the_other(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    require_every_beginning(str(tmp_path), TEXTS * 2)


def test_a_data_set_of_the_hub_is_read_on_from_any_row(monkeypatch):
    def load_dataset(name, subset, split, streaming):
        assert (name, subset, split, streaming) == ("owner/name", None, "train", True)
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("utils.data.stream.reader.SNAPSHOT", 2)
    require_every_beginning("owner/name", TEXTS)


def test_a_source_without_a_document_is_an_error_and_no_endless_loop(tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no document"):
        reader_of(str(tmp_path / "blank.jsonl")).take()


def test_a_file_is_recognised_by_its_size_and_its_edges(tmp_path):
    file = Path(tmp_path / "text.txt")
    prints = set()
    for content in ("one", "two", "one and a half"):
        file.write_text(content)
        config = DataConfig(train=[str(file)])
        prints.add(open_source(config, str(file)).fingerprint())
    assert len(prints) == 3


def test_a_hub_that_cannot_be_read_any_more_ends_the_run_with_a_sentence(monkeypatch):
    def rows():
        yield ROWS[0]
        yield ROWS[1]
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    reader = reader_of("owner/name")
    assert reader.take() == TEXTS[0]
    with pytest.raises(RunError, match=r"no route.*the same command continues"):
        reader.take()
