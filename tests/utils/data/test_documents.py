import csv
import json
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.checks.miniature import builtin_texts
from utils.config.settings import DataConfig
from utils.data import documents as data
from utils.data import sources
from utils.data import windows as windows_module
from utils.data.columns import Columns
from utils.data.documents import corpus_fingerprint, leakage, load_documents
from utils.data.stories import write_stories
from utils.data.windows import make_windows
from utils.errors import UserError


def documents(path: Path, separator: str | None = None, column: str = "text") -> list[str]:
    found = sources.read([str(path)], split="train", columns=Columns(column), separator=separator)
    return [text for _, text in found]


def jsonl(path: Path, texts: list) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def load(*paths: Path, **settings):
    return load_documents(DataConfig(train=[str(path) for path in paths], **settings))


def words(n: int) -> list[str]:
    return [f"document {i}, about {i * i}" for i in range(n)]


# ---------------------------------------------------------------- text files


@pytest.mark.parametrize(
    ("content", "separator", "expected"),
    [
        ("a\n\nb\nc\n", None, ["a", "b\nc"]),
        ("a\n\n\n  \nb", None, ["a", "b"]),
        ("a\r\n\r\nb\r\nc\r\n", None, ["a", "b\r\nc"]),
        ("a\n\nb\n<|endoftext|>\nc\n<|endoftext|>\n", None, ["a\n\nb", "c"]),
        ("a\r\n<|endoftext|>\r\nb\r\n", None, ["a", "b"]),
        ("a <|endoftext|>\n\nb\n", None, ["a <|endoftext|>", "b"]),
        ("a<|endoftext|>\nb\n\nc<|endoftext|>", "<|endoftext|>", ["a", "b\n\nc"]),
        ("a\n---\nb", r"\n---\n", ["a", "b"]),
        ("a\n\nb\n", "", ["a\n\nb"]),
        ("\ufeffa\n", None, ["a"]),
        ("  indented\n", None, ["  indented"]),
    ],
)
def test_separators_are_structure_and_not_text(tmp_path, content, separator, expected):
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    assert documents(path, separator) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1), max_size=5))
def test_text_between_separators_survives_byte_for_byte(tmp_path_factory, texts):
    texts = [text for text in texts if text != sources.END_OF_TEXT]
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_bytes("".join(f"{text}\n<|endoftext|>\n" for text in ["first", *texts]).encode())
    assert documents(path) == ["first", *texts]


# ---------------------------------------------------------------- errors say where


def error(path: Path, **settings) -> str:
    with pytest.raises(UserError) as caught:
        documents(path, **settings)
    return str(caught.value)


def test_of_conversations_only_what_is_said_counts_as_text(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"“{i}”?", "completion": 'é "quoted"'} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = load(path).report
    assert report["train_bytes"] + report["eval_bytes"] == sum(
        len(text.encode()) for row in rows for text in row.values()
    )


def test_conversations_in_which_nobody_answers_are_told_as_such(tmp_path):
    path = tmp_path / "a.jsonl"
    says = [{"role": "guest", "content": "hi"}, {"role": "host", "content": "hello"}]
    path.write_text(json.dumps({"messages": says}) + "\n" + json.dumps({"messages": says[1:]}))
    with pytest.raises(UserError, match=r"none of 2 conversations .* 'assistant'.*data\.learn_from=all"):
        load(path)
    assert len(load(path, learn_from="all").train) == 1


def test_bad_utf8_is_an_error_with_its_line(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.csv", "a.json"):
        path = tmp_path / name
        path.write_bytes(b'text\n{"text": "a"}\n'[5 * (name == "a.jsonl") :] + b"caf\xe9 noir\n")
        line = 2 if name == "a.jsonl" else 3
        assert f"{path}:{line}: not UTF-8 (byte 0xe9 at column 4)" in error(path)


def test_malformed_json_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    assert f"{path}:3: not valid JSON" in error(path)
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n{"text" "b"}]')
    assert f"{path}:2: not valid JSON" in error(path)


def test_missing_column_names_the_file_and_the_columns_found(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"body": "b", "title": "c"}\n')
    assert "a.jsonl:2: no column 'text'. Columns found: body, title" in error(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("body,title\nx,y\n")
    assert "a.csv:1: no column 'text'. Columns found: body, title" in error(tmp_path / "a.csv")
    datasets.Dataset.from_dict({"body": ["x"], "title": ["y"]}).to_parquet(tmp_path / "a.parquet")
    assert "a.parquet: no column 'text'. Columns found: body, title" in error(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text('[{"body": "x"}]')
    assert "record 0: no column 'text'. Columns found: body" in error(tmp_path / "a.json")


def test_other_bad_files_are_clear_errors(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\n"a",1\nb,c,d\n')
    assert "a.csv:3: expected 2 fields" in error(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text('text\n"never closed\n')
    assert "b.csv:2: not valid CSV" in error(tmp_path / "b.csv")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    assert "a.parquet: cannot be read as Parquet" in error(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('["a"]\n')
    assert "a.jsonl:1: expected an object" in error(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text('{"rows": []}')
    assert "an object with the keys rows" in error(tmp_path / "a.json")
    (tmp_path / "a.pdf").write_text("x")
    assert "cannot read files of type .pdf" in error(tmp_path / "a.pdf")


@pytest.mark.parametrize(("value", "message"), [("7", "got the number 7"), (r'"\ud800"', "half of a surrogate pair")])
def test_what_is_no_text_is_an_error_with_its_line(tmp_path, value, message):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{{"text": {value}}}\n')
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{message}"):
        load(tmp_path / "a.jsonl")


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["txt", "jsonl", "json", "csv", "parquet", "arrow"]))
def test_any_bytes_give_text_or_a_clear_error(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("bytes") / f"a.{suffix}"
    path.write_bytes(content)
    try:
        documents(path)
    except UserError as found:
        assert str(path) in str(found)


def test_missing_file_tells_what_is_there(tmp_path):
    jsonl(tmp_path / "stories.jsonl", ["a"])
    with pytest.raises(UserError, match=r"No such file or folder: .*In .* there is: stories\.jsonl"):
        load(tmp_path / "story.jsonl")
    with pytest.raises(UserError, match=r"No file matches .*stories\.jsonl"):
        load(tmp_path / "*.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="No data file in folder"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="No training data"):
        load()


# ---------------------------------------------------------------- sources


def test_all_formats_hold_the_same_documents(tmp_path):
    texts = ["one", 'two, "quoted"\nand a line', "  three", "", "x" * 200_000]
    jsonl(tmp_path / "a.jsonl", texts)
    jsonl(tmp_path / "lines.json", texts)
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    with open(tmp_path / "a.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["n", "text"], *enumerate(texts)])
    table = datasets.Dataset.from_dict({"text": texts, "n": list(range(5))})
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "lines.json", "a.json", "a.csv", "a.parquet", "saved"):
        assert documents(tmp_path / name) == texts, name


@pytest.mark.parametrize("packing", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_compressed_files_hold_the_same_documents_also_in_a_folder(tmp_path, suffix, packing):
    plain = tmp_path / f"plain{suffix}"
    texts = [f"words, ä {number}" for number in range(300)]
    match suffix:
        case ".txt":
            plain.write_text("\n\n".join(texts), encoding="utf-8")
        case ".csv":
            rows = [f'"{text}"\n' for text in texts]
            plain.write_text("text\n" + "".join(rows), encoding="utf-8")
        case _:
            plain.write_text(json.dumps([{"text": text} for text in texts]))
    if suffix == ".jsonl":
        jsonl(plain, texts)

    (tmp_path / "packed").mkdir()
    packed = tmp_path / "packed" / f"texts{suffix}{packing}"
    packed.write_bytes(pack(plain.read_bytes(), packing))
    assert documents(packed) == documents(tmp_path / "packed") == documents(plain) == texts


def pack(content: bytes, packing: str) -> bytes:
    """Compress in two parts, as programs do that append to a file."""
    codec = pyarrow.Codec({".gz": "gzip", ".zst": "zstd"}[packing.lower()])
    half = len(content) // 2
    return b"".join(codec.compress(part, asbytes=True) for part in (content[:half], content[half:]))


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut off", "not compressed"])
def test_a_compressed_file_that_is_damaged_is_an_error_with_its_name(tmp_path, packing, damage):
    content = b'{"text": "some words"}\n' * 1000
    packed = tmp_path / f"texts.jsonl{packing}"
    packed.write_bytes(content if damage == "not compressed" else pack(content, packing)[:-9])
    with pytest.raises(UserError, match=rf"texts\.jsonl\{packing}: cannot be read: \w"):
        documents(packed)


def test_tables_that_compress_inside_are_not_read_packed_once_more(tmp_path):
    (tmp_path / "table.parquet.gz").write_bytes(pack(b"PAR1", ".gz"))
    with pytest.raises(UserError, match=r"cannot read files of type \.parquet\.gz\. Expected one of .* also with \.gz"):
        documents(tmp_path / "table.parquet.gz")


def test_several_sources_globs_and_folders_are_read_in_order(tmp_path):
    for name in "bac":
        jsonl(tmp_path / f"{name}.jsonl", [name])
    (tmp_path / "README.md").write_text("no data")
    assert documents(tmp_path) == documents(tmp_path / "*.jsonl") == ["a", "b", "c"]
    corpus = load(tmp_path / "c.jsonl", tmp_path / "b.jsonl", eval=str(tmp_path / "a.jsonl"))
    assert (corpus.train, corpus.eval) == (["c", "b"], ["a"])


def test_files_named_after_the_split_are_preferred_in_a_folder(tmp_path):
    jsonl(tmp_path / "train-00000-of-00001.jsonl", ["t"])
    jsonl(tmp_path / "validation-00000-of-00001.jsonl", ["v"])
    jsonl(tmp_path / "trainers.jsonl", ["other"])
    corpus = load(tmp_path, eval=str(tmp_path))
    assert (corpus.train, corpus.eval) == (["t"], ["v"])


def test_kaggle_inputs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "KAGGLE_INPUT", tmp_path)
    (tmp_path / "datasets" / "someone" / "stories").mkdir(parents=True)
    jsonl(tmp_path / "datasets" / "someone" / "stories" / "a.jsonl", ["a"])
    assert documents(Path("stories")) == documents(Path("stories/a.jsonl")) == ["a"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("name", ("name", None, "train")),
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name/config", ("owner/name", "config", "train")),
        ("owner/name:config", ("owner/name", "config", "train")),
        ("owner/name:config:test", ("owner/name", "config", "test")),
        ("owner/name::test", ("owner/name", None, "test")),
    ],
)
def test_hub_ids(monkeypatch, source, expected):
    def load_dataset(name, config, split):
        assert (name, config, split) == expected
        return datasets.Dataset.from_dict({"text": ["a", None, "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert documents(Path(source)) == ["a", None, "b"]


def test_unreachable_hub_says_how_to_attach_data(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"owner/name.*ConnectionError: Couldn't reach") as caught:
        load(Path("owner/name"))
    assert all(part in str(caught.value) for part in ("file or folder", "/kaggle/input", "HF_HUB_OFFLINE=1"))
    with pytest.raises(UserError, match="not a hub id either"):
        load(Path("a/b/c/d"))


# ---------------------------------------------------------------- split


TEXTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.floats(0.01, 0.99), st.booleans())
def test_no_text_is_on_both_sides_and_none_is_lost(tmp_path_factory, texts, fraction, deduplicate):
    path = jsonl(tmp_path_factory.mktemp("texts") / "a.jsonl", texts)
    usable = {text for text in texts if text.strip()}
    try:
        corpus = load(path, eval_fraction=fraction, deduplicate=deduplicate)
    except UserError:
        assert len({" ".join(text.split()) for text in usable}) < 2
        return
    assert corpus.train and corpus.eval and leakage(corpus.train, corpus.eval) == 0
    assert set(corpus.train) | set(corpus.eval) == usable
    report = corpus.report
    assert report["read"] == len(texts) == sum(report[key] for key in ("empty", "duplicate", "train", "eval"))
    assert report["train_bytes"] == sum(len(text.encode()) for text in corpus.train)
    if deduplicate:
        assert max(Counter(corpus.train + corpus.eval).values()) == 1


def test_documents_stay_on_their_side_when_others_are_added(tmp_path):
    small = load(jsonl(tmp_path / "a.jsonl", words(200)))
    large = load(jsonl(tmp_path / "b.jsonl", ["new", *reversed(words(1000))]))
    assert 2 <= len(small.eval) <= 25 and 20 <= len(large.eval) <= 80
    assert set(small.train) <= set(large.train) and set(small.eval) <= set(large.eval)


def test_copies_that_differ_in_whitespace_share_a_side(tmp_path):
    texts = [text.replace(" ", gap) for text in words(200) for gap in (" ", "  ", "\n")]
    corpus = load(jsonl(tmp_path / "a.jsonl", texts), eval_fraction=0.3)
    assert len(corpus.train) % 3 == len(corpus.eval) % 3 == 0
    assert leakage(corpus.train, corpus.eval) == 0


def test_evaluation_documents_are_taken_out_of_training_and_counted(tmp_path):
    train = jsonl(tmp_path / "a.jsonl", [*words(10), "", words(10)[0]])
    held_out = jsonl(tmp_path / "b.jsonl", [*words(3), "only here"])
    corpus = load(train, eval=str(held_out))
    assert corpus.train == words(10)[3:] and corpus.eval == [*words(3), "only here"]
    counts = {key: corpus.report[key] for key in ("read", "empty", "duplicate", "in_eval", "train", "eval")}
    assert counts == {"read": 12, "empty": 1, "duplicate": 1, "in_eval": 3, "train": 7, "eval": 4}
    with pytest.raises(UserError, match="Every one of the 10 training documents"):
        load(train, eval=str(train))


def test_max_documents_and_single_documents(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["", *words(10)])
    assert sum(map(len, (load(path, max_documents=4).train, load(path, max_documents=4).eval))) == 4
    with pytest.raises(UserError, match="single document"):
        load(path, max_documents=1)
    assert load(path, max_documents=1, eval=str(jsonl(tmp_path / "b.jsonl", ["x"]))).train == words(1)
    with pytest.raises(UserError, match="3 documents read, 3 of them empty"):
        load(jsonl(tmp_path / "c.jsonl", ["", " ", None]))


def test_leakage_and_fingerprint():
    assert leakage(["a", "b  c"], ["b c", "d"]) == 0.5
    assert corpus_fingerprint(["a", "b"]) != corpus_fingerprint(["b", "a"]) != corpus_fingerprint(["ab"])
    assert corpus_fingerprint(iter(["a", "b"])) == corpus_fingerprint(["a", "b"])


# ---------------------------------------------------------------- windows


def encode(size: int, texts: list[str], names: list[str]) -> list[dict]:
    """Windows of `size` bytes over the joined texts of a group; texts that start with '-' are left out."""
    joined = np.frombuffer("".join(text for text in texts if not text.startswith("-")).encode(), np.uint8)
    return [
        {"ids": (part := joined[start : start + size]).astype(np.int32), "bytes": len(part), "documents": names[0]}
        for start in range(0, len(joined), size)
    ]


@pytest.mark.parametrize("on_disk", [False, True])
def test_windows_hold_every_group_in_order(monkeypatch, tmp_path, on_disk):
    monkeypatch.setattr(windows_module, "DOCUMENTS_PER_PACK", 10)
    monkeypatch.setattr(windows_module, "IN_MEMORY_BYTES", 0 if on_disk else 10**6)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    texts = [f"-{i}" if i < 15 else f"text {i} " for i in range(45)]  # the first group gives no window
    windows = make_windows(texts, partial(encode, 16), "v1")
    expected = [window for start in range(0, 45, 10) for window in encode(16, texts[start : start + 10], [""])]
    assert len(windows) == len(expected)
    for window, right in zip(windows, expected, strict=True):
        assert isinstance(window["ids"], np.ndarray) and (window["ids"] == right["ids"]).all()
        assert window["bytes"] == right["bytes"] and isinstance(window["documents"], str)


def test_large_corpora_are_cached_and_do_not_depend_on_the_number_of_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(windows_module, "DOCUMENTS_PER_PACK", 10)
    monkeypatch.setattr(windows_module, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    calls = []

    def counted(texts, names):
        calls.append(len(texts))
        return encode(16, texts, names)

    texts = words(45)
    first = make_windows(texts, counted, "v1")
    assert calls == [1, 10, 10, 10, 10, 5]
    again = make_windows(texts, counted, "v1")
    assert len(calls) == 7  # one document, to learn the columns
    make_windows(texts, counted, "v2")
    make_windows(texts[1:], counted, "v1")
    assert len(calls) > 14
    parallel = make_windows(texts, partial(encode, 16), "v3", num_proc=2)
    assert not [path for path in (tmp_path / "curriculum_distillation").iterdir() if path.is_dir()]
    assert first.to_dict() == again.to_dict() == parallel.to_dict()


def test_texts_without_a_window_are_a_clear_error():
    with pytest.raises(UserError, match="None of 2 documents"):
        make_windows(["-a", "-b"], partial(encode, 4), "v1")


def test_lines_between_two_titles_are_one_document(tmp_path):
    rows = ["", " = One = \n", "", " first \n", " = = Part = = \n", " second \n", " = Two = \n", " third"]
    config = DataConfig(
        train=[str(jsonl(tmp_path / "wiki.jsonl", rows))],
        eval=str(jsonl(tmp_path / "held_out.jsonl", [" = Three = \n", " fourth \n"])),
        document_start="^ = [^=]",
    )
    corpus = load_documents(config)
    assert corpus.train == [
        " = One = \n\n first \n = = Part = = \n second \n",
        " = Two = \n third\n",
    ]
    assert corpus.eval == [" = Three = \n fourth \n"]


def test_a_document_start_that_is_no_regular_expression_is_refused(tmp_path):
    config = DataConfig(train=[str(jsonl(tmp_path / "wiki.jsonl", ["a", "b"]))], document_start="(")
    with pytest.raises(UserError, match="regular expression"):
        load_documents(config)


@pytest.mark.parametrize(("left_out", "level"), [(0, None), (1, "INFO"), (50, "WARNING")])
def test_text_in_no_window_is_told_and_much_of_it_is_a_warning(left_out, level, caplog):
    table = datasets.Dataset.from_dict({"bytes": [600, 399], "left_out": [0, left_out]}).with_format("numpy")
    with caplog.at_level("INFO"):
        windows_module.warn_of_left_out(table, "held-out")
    assert [record.levelname for record in caplog.records] == ([level] if level else [])
    assert all("bytes of the held-out text" in record.getMessage() for record in caplog.records)


# ------------------------------------------------------------------ what was cut, and what was not


@pytest.mark.parametrize(("limit", "rest"), [(4, "at least 4 further"), (8, "2 further"), (10, None), (None, None)])
def test_documents_that_a_limit_leaves_out_are_counted(tmp_path, caplog, limit, rest):
    caplog.set_level("INFO")
    load(jsonl(tmp_path / "a.jsonl", [*words(10), ""]), max_documents=limit)
    assert rest in caplog.text if rest else "data.max_documents" not in caplog.text


def test_what_is_wrong_behind_a_limit_is_not_looked_at(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", words(6))
    file.write_text(file.read_text() + "no JSON\n")
    assert load(file, max_documents=5).report["read"] == 5


def windows_of(sizes: list[int], window: int = 100) -> datasets.Dataset:
    """Windows of so many bytes, as documents of these sizes would fill."""
    parts = [min(window, size - start) for size in sizes for start in range(0, size, window)]
    return datasets.Dataset.from_dict({"bytes": parts}).with_format("numpy")


@pytest.mark.parametrize(
    ("sizes", "doubtful"),
    [
        ([100] * 20, False),
        ([150, 90, 100], False),  # three notes: one is most of the text, and short
        ([900], True),  # a text that is one document
        ([2000, *[50] * 10], True),  # rows that were joined
        ([4900] * 8, False),  # long articles
        ([5100] * 8, True),  # books, or files that are not cut
        ([5100, *[1000] * 600], False),  # one long article in an encyclopedia
    ],
)
def test_a_text_that_looks_uncut_raises_a_red_flag_and_no_error(sizes, doubtful, caplog):
    texts = ["x" * size for size in sizes]
    corpus = data.Corpus(texts, ["held out"], conversations=False, report={})
    data.warn_of_long_documents(corpus, windows_of(sizes), windows_of([8]))
    assert ("[RED FLAG] training text" in caplog.text) is doubtful
    assert "held-out text" not in caplog.text
    if doubtful:
        for part in (f"{len(sizes)} documents", "Expected no document", "--document-separator", "Right for books"):
            assert part in caplog.text


def test_held_out_text_that_looks_uncut_raises_a_red_flag_too(caplog):
    corpus = data.Corpus(["x" * 100] * 9, ["y" * 2000], conversations=False, report={})
    data.warn_of_long_documents(corpus, windows_of([100] * 9), windows_of([2000]))
    assert "[RED FLAG] held-out text: 1 documents" in caplog.text and "training text" not in caplog.text


@pytest.mark.parametrize(("marker", "is_named"), [("<|endoftext|>", True), ("", False)])
def test_the_red_flag_names_a_marker_inside_of_the_text(caplog, marker, is_named):
    corpus = data.Corpus(["x" * 450 + marker + "y" * 450], ["held out"], conversations=False, report={})
    data.warn_of_long_documents(corpus, windows_of([900]), windows_of([8]))
    assert ("give --document-separator '<|endoftext|>'" in caplog.text) is is_named


def test_conversations_are_never_called_uncut(caplog):
    corpus = data.Corpus(["x" * 9000], ["y"], conversations=True, report={})
    data.warn_of_long_documents(corpus, windows_of([9000]), windows_of([8]))
    assert not caplog.text


def test_documents_behind_the_limit_do_not_decide_what_the_others_are(tmp_path):
    (tmp_path / "a.txt").write_text("The first story.\n\nThe second story.\n\nThe third one.\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "Who?", "completion": "A bird."}) + "\n")
    config = DataConfig(train=[str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], max_documents=2, eval_fraction=0.4)
    corpus = load_documents(config)
    assert not corpus.conversations and len(corpus.train) + len(corpus.eval) == 2


def test_a_blank_line_in_a_table_of_two_columns_is_an_empty_document(tmp_path):
    rows = [f"Say {number}.,Number {number}." for number in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(["prompt,completion", *rows[:20], "", *rows[20:]]) + "\n")
    corpus = load_documents(DataConfig(train=[str(tmp_path / "a.csv")], eval_fraction=0.2))
    assert corpus.report["train"] + corpus.report["eval"] == 40


def test_text_put_together_from_a_stock_of_sentences_repeats_itself_and_prose_does_not():
    assert data.repeats_itself(write_stories(300))
    assert not data.repeats_itself(builtin_texts())
    assert not data.repeats_itself(["too short"])
