"""Captures as a teacher and as text: what the captured model says, read from a folder that nothing is written into."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml

from models.teacher.listed import ListedTeacher
from tests.captures import DEEPSEEK, EXACT, QWEN, RECOMMENDED, write_captures
from tests.models.tiny import STORIES, byte_bpe, gradients, pair_of
from utils.captures import folder as captures_folder
from utils.captures.folder import captured_texts, digest_of, open_captures
from utils.captures.source import CaptureSource
from utils.errors import UserError

WHOLE = {**EXACT, "k": 400, "exact_k": 400}
TEXTS = [*STORIES, *(f"{story[20:]} {story[:30]}" for story in STORIES)]


@pytest.fixture(scope="module")
def pair():
    made = pair_of(byte_bpe(300), byte_bpe(400))
    made.teacher.get_output_embeddings().weight.data *= 2
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_bpe(400).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A cache of each test's own."""
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(tmp_path / "cache"))
    open_captures.cache_clear()


def written(pair, folder: Path, settings=WHOLE, **options) -> str:
    return f"captures:{write_captures(folder, pair.teacher, byte_bpe(400), TEXTS, settings, **options)}"


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("documents_in_row", [1, 3])
def test_losses_and_gradients_are_those_of_the_captured_model(pair, tokenizer, tmp_path, documents_in_row):
    """Lists of the whole vocabulary, in windows of one text each; the folder stays as it is."""
    name = written(pair, tmp_path / "captures", documents_in_row=documents_in_row, has_start=True)
    before = contents(tmp_path / "captures")
    texts = [text for _, text in captured_texts(name, tokenizer)]
    assert texts == TEXTS

    longer = pair_of(byte_bpe(300), byte_bpe(400), max_length=128, student=pair.student, teacher=pair.teacher)
    windows = [window for text in texts for window in longer.encoder.windows([text])]
    assert len(windows) == len(texts)
    batch = longer.collator()(windows)
    module = longer.framework({"kd": 0.6, "lm": 0.4}, top_k=400)
    module.zero_grad()
    local = module(batch)
    local.loss.backward()
    expected = [gradient.clone() for gradient in gradients(module)]
    module.zero_grad()

    teacher = ListedTeacher(CaptureSource(open_captures(name, tokenizer), rows=400), pair.vocabulary)
    signal = teacher.signal(batch, 400)
    captured = module(batch, signal=signal)
    captured.loss.backward()
    assert captured.terms["kd"].unlisted == local.terms["kd"].unlisted == 0
    for term, sums in local.terms.items():
        assert captured.terms[term].sum.item() == pytest.approx(sums.sum.item(), rel=2e-5)
    for ours, theirs in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-6)
    assert batch.teacher_nll(signal) == pytest.approx(batch.teacher_nll(longer.frozen().signal(batch, 400)), rel=1e-5)
    assert contents(tmp_path / "captures") == before


def test_windows_are_found_where_they_were_captured(pair, tokenizer, tmp_path):
    captures = open_captures(written(pair, tmp_path / "captures"), tokenizer)
    source = CaptureSource(captures, rows=400)
    ids = captures.ids[captures.begins[2] : captures.begins[3]]
    [whole] = source.lists([ids.tolist()], 400)
    with torch.no_grad():
        log_probs = pair.teacher(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].log_softmax(-1)
    expected = log_probs[:-1].gather(1, torch.from_numpy(whole[0]))
    np.testing.assert_allclose(whole[1], expected, atol=1e-5)
    np.testing.assert_allclose(
        whole[2], log_probs[:-1].gather(1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])[:, 0], atol=1e-5
    )

    # A part of it behind a start marker is answered as the whole text was; the marker as the token before the part.
    start = byte_bpe(400).eos_token_id
    [part] = source.lists([[start, *ids[5:20].tolist()]], 400)
    for of_whole, of_part in zip(whole, part, strict=True):
        np.testing.assert_array_equal(of_part, of_whole[4:19])

    # Two parts in one window; between them, and in what was never captured, there is nothing.
    window = [
        *ids[:12].tolist(),
        399,
        398,
        397,
        396,
        *captures.ids[captures.begins[3] : captures.begins[3] + 10].tolist(),
    ]
    [mixed] = source.lists([window], 400)
    is_listed = (mixed[0] >= 0).any(1)
    assert is_listed[:11].all() and is_listed[16:].all() and not is_listed[12:15].any()
    assert np.isfinite(mixed[2]).all()


def test_a_real_token_that_is_not_listed_has_a_part_of_what_is_left(pair, tokenizer, tmp_path):
    captures = open_captures(written(pair, tmp_path / "captures", {**EXACT, "k": 200, "exact_k": 200}), tokenizer)
    ids, log_probs, realised = CaptureSource(captures, rows=400).lists([captures.ids[:30].tolist()], 200)[0]
    is_listed = (ids == captures.ids[1:30, None]).any(1)
    assert 0 < is_listed.sum() < 29
    left = 1 - np.exp(log_probs).sum(1)
    np.testing.assert_allclose(realised[~is_listed], np.minimum(np.log(left / 200), log_probs.min(1))[~is_listed])


@pytest.mark.parametrize("settings", [RECOMMENDED, DEEPSEEK])
def test_losses_of_the_format_are_told(pair, tokenizer, tmp_path, settings, caplog):
    with caplog.at_level(logging.INFO):
        captures = open_captures(written(pair, tmp_path / "captures", settings, fit="rounded"), tokenizer)
    assert "stored as a curve" in caplog.text and "nats" in caplog.text
    assert ("are left out" in caplog.text) == (settings is RECOMMENDED)
    ids, log_probs = captures.lists(0)
    assert ids.shape[1] == log_probs.shape[1] == (16 if settings is RECOMMENDED else 128)


def test_a_row_of_one_token_has_no_list(pair, tokenizer, tmp_path):
    name = written(pair, tmp_path / "captures")
    file = tmp_path / "captures" / "data_1.parquet"
    table = pyarrow.parquet.read_table(file)
    row = {name: [[0]] if name == "input_ids" else [[]] for name in table.column_names}
    short = pyarrow.table(row, schema=table.schema)
    pyarrow.parquet.write_table(pyarrow.concat_tables([table, short]), file)

    captures = open_captures(name, tokenizer)
    ids, log_probs = captures.lists(len(captures.rows) - 1)
    assert ids.shape == log_probs.shape == (0, 400)
    texts = [text for _, text in captured_texts(name, tokenizer)]
    assert texts == [*TEXTS, ""]


def test_identity_is_the_content(pair, tokenizer, tmp_path):
    first, second = (written(pair, tmp_path / name) for name in ("a", "b"))
    other = written(pair, tmp_path / "c", {**WHOLE, "exact_dtype": "float64"})
    assert digest_of(first) == digest_of(second) != digest_of(other)
    source = CaptureSource(open_captures(first, tokenizer), rows=400, model="big")
    assert source.identity() == {"captures": digest_of(first), "model": "big"}


def test_captures_of_another_tokenizer_are_refused(pair, tmp_path):
    name = written(pair, tmp_path / "captures")
    for number, other in enumerate([byte_bpe(300), byte_bpe(400, seed_text=2)]):
        other.save_pretrained(tmp_path / f"other_{number}")
        with pytest.raises(UserError, match="--teacher-tokenizer"):
            open_captures(name, str(tmp_path / f"other_{number}"))


def spoil_manifest(folder: Path) -> None:
    (folder / "compression_config.yaml").unlink()


def spoil_settings(folder: Path) -> None:
    manifest = folder / "compression_config.yaml"
    settings = yaml.safe_load(manifest.read_text())
    manifest.write_text(yaml.safe_dump({**settings, "exact_dtype": "float64"}))


def cut_file(folder: Path) -> None:
    file = folder / "data_1.parquet"
    file.write_bytes(file.read_bytes()[:-200])


def cut_lists(folder: Path) -> None:
    file = folder / "data_0.parquet"
    table = pyarrow.parquet.read_table(file)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    columns["compressed_logprobs"] = [row[:-3] for row in columns["compressed_logprobs"]]
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=table.schema), file)


def lack_column(folder: Path) -> None:
    for file in folder.glob("*.parquet"):
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).drop_columns(["bytepacked_indices"]), file)


def lack_files(folder: Path) -> None:
    for file in folder.glob("*.parquet"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_manifest, "there is no compression_config.yaml"),
        (spoil_settings, "numbers a position, expected"),
        (cut_file, "a file cannot be read"),
        (cut_lists, "lists for .* tokens in row 1, .* expected one behind each token"),
        (lack_column, "expected bytepacked_indices too"),
        (lack_files, "no .parquet file"),
    ],
)
def test_broken_folders_are_refused_with_what_is_wrong(pair, tokenizer, tmp_path, spoil, message):
    name = written(pair, tmp_path / "captures")
    spoil(tmp_path / "captures")
    with pytest.raises(UserError, match=message):
        open_captures(name, tokenizer)


def test_lists_that_do_not_predict_their_text_are_refused(pair, tokenizer, tmp_path):
    """Lists that are read with a wrong number of bits look like this; those of a random model do not predict either."""
    name = written(pair, tmp_path / "captures", {**EXACT, "k": 3, "exact_k": 3})
    with pytest.raises(UserError, match="of the texts' tokens among them, expected more than half"):
        open_captures(name, tokenizer)


def test_a_folder_that_is_not_there_is_named(tokenizer):
    with pytest.raises(UserError, match="got no folder of this name"):
        open_captures("captures:/nowhere/at/all", tokenizer)


def test_a_saved_data_set_is_read_like_parquet(pair, tokenizer, tmp_path):
    """DistillKit saves captures in this form when it packs them."""
    name = written(pair, tmp_path / "captures")
    rows = open_captures(name, tokenizer).rows
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / captures_folder.MANIFEST).write_bytes(
        (tmp_path / "captures" / captures_folder.MANIFEST).read_bytes()
    )
    saved = open_captures(f"captures:{tmp_path / 'saved'}", tokenizer)
    np.testing.assert_array_equal(saved.ids, open_captures(name, tokenizer).ids)
    np.testing.assert_array_equal(saved.lists(1)[1], open_captures(name, tokenizer).lists(1)[1])


def damaged(folder: Path, change) -> None:
    """Write the first file anew after a change of its rows, which are lists by column."""
    file = sorted(folder.glob("*.parquet"))[0]
    table = pyarrow.parquet.read_table(file)
    columns = table.to_pydict()
    change(columns)
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=table.schema), file)


def zero_half(columns: dict) -> None:
    positions = columns["compressed_logprobs"][0]
    columns["compressed_logprobs"][0] = [[0] * len(position) for position in positions]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda columns: columns["bytepacked_indices"][0].pop(), "lists for .* in row 1, bytepacked_indices"),
        (lambda columns: columns["bytepacked_indices"][0].__setitem__(2, None), "null"),
        (lambda columns: columns["compressed_logprobs"][0][2].__setitem__(1, None), "null"),
        (lambda columns: columns["input_ids"].__setitem__(0, None), "with nulls"),
        (lambda columns: columns["input_ids"].__setitem__(0, []), "for 0 tokens in row 1"),
        (
            lambda columns: columns["input_ids"][0].__setitem__(0, 2**63 + 5),
            "numbers from .* expected a list of tokens",
        ),
        (zero_half, "probabilities that add to more than 1"),
    ],
)
def test_damaged_rows_are_refused(pair, tokenizer, tmp_path, change, message):
    name = written(pair, tmp_path / "captures", RECOMMENDED)
    damaged(tmp_path / "captures", change)
    with pytest.raises(UserError, match=message):
        open_captures(name, tokenizer)


def test_settings_of_other_captures_are_refused(pair, tokenizer, tmp_path):
    name = written(pair, tmp_path / "captures", QWEN)
    manifest = tmp_path / "captures" / "compression_config.yaml"
    settings = yaml.safe_load(manifest.read_text())
    manifest.write_text(yaml.safe_dump(settings | {"delta_encoding": False}))
    with pytest.raises(UserError, match=r"less probable token before .* compression_config\.yaml those"):
        open_captures(name, tokenizer)
