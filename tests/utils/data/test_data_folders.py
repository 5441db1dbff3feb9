"""Data of a folder is what was meant as data, and whatever else is there is named."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.config.settings import DataConfig
from utils.data.data_folders import choose_files
from utils.data.documents import load_documents
from utils.errors import UserError


def table(count: int, word: str = "row") -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [f"{word} {n}" for n in range(count)]})


def jsonl(file: Path, *texts: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def documents(source: Path, **settings) -> list[str]:
    corpus = load_documents(DataConfig(train=[str(source)], **settings))
    return sorted(corpus.train + corpus.eval)


def names(folder: Path, split: str = "train") -> list[str]:
    return [str(file.relative_to(folder)) for file in choose_files(folder, split)]


# ------------------------------------------------------------------------- folders that `datasets` has written


def derive(folder: Path, how: str) -> None:
    """Leave what a notebook leaves in a saved table: caches of what was made of it."""
    loaded = datasets.load_from_disk(str(folder))
    if how == "map":
        loaded.map(lambda row: {"text": row["text"].upper()})
    elif how == "map in two processes":
        loaded.map(lambda row: {"text": row["text"].upper()}, num_proc=2)
    elif how == "filter":
        loaded.filter(lambda row: row["text"].endswith("1"))
    elif how == "shuffle":
        loaded.shuffle(seed=0)
    elif how == "sort":
        loaded.sort("text", reverse=True)


@pytest.mark.parametrize("how", ["map", "map in two processes", "filter", "shuffle", "sort"])
def test_what_was_made_of_a_saved_table_is_not_read_with_it(tmp_path, caplog, how):
    caplog.set_level("INFO")
    table(20).save_to_disk(tmp_path / "saved", num_shards=2)
    derive(tmp_path / "saved", how)
    caches = [path.name for path in (tmp_path / "saved").glob("cache-*")]

    assert caches and documents(tmp_path / "saved") == sorted(table(20)["text"])
    assert all(name in caplog.text for name in caches)
    assert documents(tmp_path / "saved" / "*.arrow") == sorted(table(20)["text"])


def test_a_saved_selection_is_that_selection(tmp_path):
    table(20).select([3, 5, 7]).save_to_disk(tmp_path / "selected")
    table(20).filter(lambda row: row["text"].endswith("1")).save_to_disk(tmp_path / "filtered")
    assert documents(tmp_path / "selected") == ["row 3", "row 5", "row 7"]
    assert documents(tmp_path / "filtered") == ["row 1", "row 11"]


def test_an_index_that_says_which_rows_count_is_refused_and_not_overlooked(tmp_path):
    table(5).save_to_disk(tmp_path / "old")
    state = json.loads((tmp_path / "old" / "state.json").read_text())
    (tmp_path / "old" / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(UserError, match=r"index of the rows that count[\s\S]*flatten_indices"):
        documents(tmp_path / "old")


def test_an_incomplete_copy_of_a_saved_table_is_refused(tmp_path):
    table(20).save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match="lists 2 data files, and 1 of them are missing: data-00001-of-00002"):
        documents(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        documents(tmp_path / "saved")


def test_of_saved_splits_each_side_reads_its_own(tmp_path, caplog):
    caplog.set_level("INFO")
    splits = {"train": table(9), "validation": table(4, "held out"), "test": table(3, "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    derive(tmp_path / "saved" / "train", "map")
    jsonl(tmp_path / "saved" / "notes" / "more.jsonl", "none of it")

    corpus = load_documents(DataConfig(train=[str(tmp_path / "saved")], eval=str(tmp_path / "saved")))
    assert corpus.train == table(9)["text"] and corpus.eval == table(4, "held out")["text"]
    assert "notes/" in caplog.text and "test/data-00000-of-00001.arrow" in caplog.text

    shutil.rmtree(tmp_path / "saved" / "test")
    with pytest.raises(UserError, match="there is no folder of test"):
        documents(tmp_path / "saved")


def test_in_the_cache_of_datasets_the_caches_are_left_out(tmp_path):
    """There is no list of files there: dataset_info.json, name-train.arrow, and what map() has left."""
    table(6).save_to_disk(tmp_path / "saved")
    folder = tmp_path / "0.0.0"
    folder.mkdir()
    shutil.copy(tmp_path / "saved" / "data-00000-of-00001.arrow", folder / "stories-train.arrow")
    shutil.copy(
        tmp_path / "saved" / "data-00000-of-00001.arrow", folder / "cache-0123456789abcdef_00000_of_00002.arrow"
    )
    shutil.copy(tmp_path / "saved" / "dataset_info.json", folder)
    assert names(folder) == ["stories-train.arrow"]


# ------------------------------------------------------------------------------------- folders of files

LEFT_BESIDE = [
    *(".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", "__MACOSX/._a.jsonl", ".git/x.json", ".DS_Store"),
    *("_SUCCESS", "_delta_log/0.json", "_metadata", "_temporary/part.parquet"),
    *("README.md", "README.txt", "LICENSE", "LICENSE.txt", "requirements.txt"),
    *("dataset_info.json", "dataset_infos.json", "dataset-metadata.json", "croissant.json"),
    *("cache-0123456789abcdef.arrow", "tmpabc123.arrow"),
]
MAY_BE_DATA = [
    *("b.parquet.gz", "b.jsonl.bz2", "b.gz", "c.parquet.crdownload"),
    *("d.csv.part", "e.tsv", "f.pdf", "g.zip", "h"),
]


@pytest.mark.parametrize(("name", "level"), [(n, "INFO") for n in LEFT_BESIDE] + [(n, "WARNING") for n in MAY_BE_DATA])
def test_what_is_no_data_is_left_out_and_named(tmp_path, caplog, name, level):
    caplog.set_level("INFO")
    jsonl(tmp_path / "a.jsonl", "one", "two")
    jsonl(tmp_path / name, "no document")
    assert documents(tmp_path) == ["one", "two"]

    naming = [record for record in caplog.records if name.partition("/")[0] in record.getMessage()]
    naming = [record for record in naming if "left out" in record.getMessage() or "not read" in record.getMessage()]
    assert [record.levelname for record in naming] == [level]


def test_a_link_to_nothing_is_named_and_a_link_that_leads_back_ends(tmp_path, caplog):
    jsonl(tmp_path / "a.jsonl", "one", "two")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "up").symlink_to(tmp_path)
    assert documents(tmp_path) == ["one", "two"]
    assert "not read, of another type or a link to nothing: b.jsonl" in caplog.text


def test_linked_folders_are_read(tmp_path):
    jsonl(tmp_path / "elsewhere" / "b.jsonl", "two")
    jsonl(tmp_path / "data" / "a.jsonl", "one")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    assert documents(tmp_path / "data") == ["one", "two"]


def test_a_folder_without_data_says_what_is_there(tmp_path):
    jsonl(tmp_path / "b.tsv.gz", "x")
    with pytest.raises(UserError, match=r"No data file in folder .*there is: b\.tsv\.gz"):
        choose_files(tmp_path, "train")


def test_files_of_another_split_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("train-0.jsonl", "validation-0.jsonl"):
        jsonl(tmp_path / name, name)
    assert names(tmp_path) == ["train-0.jsonl"] and names(tmp_path, "validation") == ["validation-0.jsonl"]
    assert "not of the split 'train': validation-0.jsonl" in caplog.text


@given(st.sets(st.sampled_from(["a.jsonl", "b/c.txt", "b/d.csv", "e.parquet", *LEFT_BESIDE, *MAY_BE_DATA])))
def test_every_file_is_data_or_named(tmp_path_factory, paths):
    folder = tmp_path_factory.mktemp("folder")
    jsonl(folder / "always.jsonl", "x")
    for path in paths:
        jsonl(folder / path, "x")
    data = {path for path in paths if path not in LEFT_BESIDE and path not in MAY_BE_DATA}
    assert names(folder) == sorted({"always.jsonl", *data}, key=lambda name: Path(name).parts)


# ------------------------------------------------------------------------- files that hold no text of their own


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.json", "b.csv", "b.parquet", "b.arrow"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_a_pointer_of_git_lfs_is_refused_by_name_and_never_read_as_text(tmp_path, name, as_folder):
    jsonl(tmp_path / "a.jsonl", *(f"text {n}" for n in range(20)))
    pointer = tmp_path / name
    pointer.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n")
    with pytest.raises(UserError, match=rf"{name}: got a pointer of Git LFS.*`git lfs pull`"):
        documents(tmp_path if as_folder else pointer)


def test_a_text_about_git_lfs_is_a_text(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(f"{n}: version https://git-lfs.github.com/spec/v1" for n in range(20)))
    assert len(documents(text)) == 20


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "parquet", "arrow"])
def test_a_file_without_a_byte_has_no_documents_whatever_its_type(tmp_path, caplog, suffix):
    jsonl(tmp_path / "a.jsonl", *(f"text {n}" for n in range(20)))
    (tmp_path / f"none.{suffix}").touch()
    assert len(documents(tmp_path)) == 20
    assert f"none.{suffix}: empty" in caplog.text

    with pytest.raises(UserError, match="No text in"):
        documents(tmp_path / f"none.{suffix}")


@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt", "tokenizer.json", "config.json", "vocab.json"])
def test_files_of_a_model_beside_a_text_are_no_data(tmp_path, caplog, name):
    caplog.set_level("INFO")
    jsonl(tmp_path / "a.jsonl", *(f"text {n}" for n in range(20)))
    (tmp_path / name).write_text('{"a": 1}')
    assert names(tmp_path) == ["a.jsonl"]
    assert name in caplog.text


@pytest.mark.parametrize("name", ["stats.json", "params.json", "other.csv"])
def test_a_file_without_a_column_of_text_among_others_says_the_way(tmp_path, name):
    jsonl(tmp_path / "a.jsonl", *(f"text {n}" for n in range(20)))
    (tmp_path / name).write_text('{"rows": 60}')
    with pytest.raises(UserError, match=rf"no column(.|\n)*{name} is one of 2 files in .* If it is no data"):
        documents(tmp_path)
    with pytest.raises(UserError) as alone:
        documents(tmp_path / name)
    assert "If it is no data" not in str(alone.value)
    assert len(documents(tmp_path / "*.jsonl")) == 20


# ------------------------------------------------------------------------- a marker of ends that does not cut


def test_a_marker_inside_of_the_only_document_is_named_with_what_cuts_there(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("<|endoftext|>".join(f"document {n}" for n in range(20)))
    with pytest.raises(UserError, match=r"single document.*--document-separator '<.endoftext.>'"):
        documents(text)
    assert len(documents(text, document_separator="<|endoftext|>")) == 20

    text.write_text("one document alone")
    with pytest.raises(UserError) as plain:
        documents(text)
    assert "endoftext" not in str(plain.value)
