"""GGUF files in place of model folders: named, converted once, and refused with the way where they cannot be read."""

import json
import logging
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.tiny import STORIES, byte_bpe, tiny_llama
from utils.errors import UserError
from utils.pretrained import gguf_files, gguf_splits, loading
from utils.pretrained.locate import gguf_file, locate, where_from

V = 290
TEXT = STORIES[0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(tmp_path / "cache"))


def rows_as_llama_cpp_has_them(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleave the two halves of each head, as llama.cpp's conversion of Llama's queries and keys does."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, architecture: str = "llama", tokenizer_type: str = "gpt2", cuts_like: str | None = "gpt-2"):
    """Write a tiny Llama with a byte-level tokenizer, in float32; return the model."""
    gguf = pytest.importorskip("gguf")
    model, tokenizer = tiny_llama(V), byte_bpe(V)
    config = model.config
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(V)

    writer.add_tokenizer_model(tokenizer_type)
    if cuts_like is not None:
        writer.add_tokenizer_pre(cuts_like)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_token_list(sorted(backend["vocab"], key=backend["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_token_types([3] + [1] * (len(backend["vocab"]) - 1))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        if "q_proj" in key or "k_proj" in key:
            weight = rows_as_llama_cpp_has_them(weight, heads if "q_proj" in key else key_heads)
        writer.add_tensor(names.get_name(key, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.gguf", ("", "a/b.gguf")),
        ("a/b:c.GGUF", ("a/b", "c.GGUF")),
        ("C:\\a.gguf", ("", "C:\\a.gguf")),
        ("owner/model", None),
        ("owner/model-GGUF", None),
    ],
)
def test_names_of_gguf_files(name, parts):
    assert gguf_files.parse(name) == parts


def test_a_gguf_file_is_a_model_like_any_other(tmp_path, caplog):
    file = tmp_path / "tiny.gguf"
    model = write_gguf(file)
    with caplog.at_level(logging.INFO):
        student = loading.load_model(str(file), "student", torch.float32)
        loading.load_model(f"{tmp_path}:tiny.gguf", "teacher", torch.bfloat16)
    assert caplog.text.count("converting") == 1, "once for all names and runs"

    tokenizer, original = loading.load_tokenizer(str(file), "student"), byte_bpe(V)
    ids = torch.tensor([original(TEXT)["input_ids"]])
    assert tokenizer(TEXT)["input_ids"] == ids[0].tolist()
    assert tokenizer.eos_token == original.eos_token

    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=ids).logits, model.eval()(input_ids=ids).logits)

    # the student is trained and saved like any other
    student(input_ids=ids, labels=ids).loss.backward()
    student.save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").num_parameters() == model.num_parameters()


def test_the_fingerprint_is_that_of_the_file(tmp_path):
    first, copy, other = (tmp_path / f"{name}.gguf" for name in ("first", "copy", "other"))
    write_gguf(first)
    copy.write_bytes(first.read_bytes())
    other.write_bytes(first.read_bytes() + b"\0")
    prints = [loading.weights_fingerprint(str(file), "teacher") for file in (first, copy, other)]
    assert prints[0] == prints[1] != prints[2]


def test_a_tokenizer_of_an_unknown_type_can_be_given_beside(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tokenizer_type="no-vocabulary-of-this-world")
    assert loading.load_config(str(file), "teacher").vocab_size == V
    with pytest.raises(UserError, match=r"(?s)tokenizer in this GGUF.*--set teacher\.tokenizer="):
        loading.load_tokenizer(str(file), "teacher")


@pytest.mark.parametrize("name", ["smollm", "starcoder"])
def test_text_is_cut_as_the_file_says(tmp_path, name):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, cuts_like=name)
    tokenizer, original = loading.load_tokenizer(str(file), "student"), byte_bpe(V)
    digits = pre_tokenizers.Digits(individual_digits=True)
    original.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, original.backend_tokenizer.pre_tokenizer]
    )
    text = f"{TEXT}\n\n1. 1984  22\n"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]


def test_a_way_of_cutting_that_nobody_knows_is_refused_and_an_old_file_is_told(tmp_path, caplog):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, cuts_like="runes")
    with pytest.raises(UserError, match=r"(?s)--set student\.tokenizer=.*in the way 'runes'"):
        loading.load_tokenizer(str(file), "student")

    old = tmp_path / "old.gguf"
    write_gguf(old, cuts_like=None)
    loading.load_tokenizer(str(old), "student")
    assert "old.gguf does not say how its tokenizer cuts text" in caplog.text


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [("smollm", "smollm"), ("starcoder", "starcoder"), ("qwen2.5", "stablelm2"), ("gpt2", "phi-2")],
)
def test_the_ways_are_those_of_real_tokenizers(tokenizer, name, real_models_dir, monkeypatch):
    """The rule of stablelm2 is that of Qwen2."""
    real = AutoTokenizer.from_pretrained(real_models_dir / "tokenizers" / tokenizer)
    text = "".join(file.read_text(encoding="utf-8")[:20_000] for file in sorted(real_models_dir.glob("corpora/*.txt")))
    expected = real(text, add_special_tokens=False)["input_ids"]

    # What transformers makes of a file whose name it does not know.
    real.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    monkeypatch.setattr(gguf_splits, "_name_in", lambda _: name)
    gguf_splits.correct(real, Path("any.gguf"))
    assert real(text, add_special_tokens=False)["input_ids"] == expected


def test_an_architecture_that_is_not_read_is_refused_with_the_way(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, architecture="no-such-architecture")
    with pytest.raises(UserError, match=r"(?s)cannot read this GGUF file.*model that the file was made from.*no-such"):
        locate(str(file), "teacher")


@pytest.mark.parametrize("name", ["tiny-00001-of-00001", "best-of-10"])
@pytest.mark.parametrize("share", [0.02, 0.9], ids=["in its header", "in its tensors"])
def test_a_file_that_is_cut_off_is_named_as_one_possibility_with_its_size(tmp_path, share, name):
    file = tmp_path / f"{name}.gguf"
    write_gguf(file)
    content = file.read_bytes()
    size = int(share * len(content))
    file.write_bytes(content[:size])
    with pytest.raises(UserError, match=f"{size:,} bytes. Expected a whole file"):
        locate(str(file), "teacher")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.gguf", b"<html>", "no GGUF file.*download complete"),
        ("a.gguf", b"", "no GGUF file"),
        ("a.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a-00001-of-00002.gguf", b"GGUF", "one part of several.*--merge"),
    ],
)
def test_a_file_that_is_none_or_a_part_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"student .*{says}"):
        locate(str(tmp_path / name), "student")


@pytest.mark.parametrize("name", ["{folder}/b.gguf", "{folder}:b.gguf", "{folder}/none/b.gguf"])
def test_a_file_that_is_not_there_is_refused_with_what_is(tmp_path, name):
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"no such file.*FOLDER:FILE\.gguf"):
        locate(name.format(folder=tmp_path), "student")


def test_a_transformers_that_reads_tokenizers_wrong_is_refused(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf_files.transformers, "__version__", "5.17.0")
    with pytest.raises(UserError, match=r"transformers 5.17.0 reads .* wrong. Expected 5.18 or newer"):
        gguf_files.plain_folder(tmp_path / "tiny.gguf", "teacher tiny.gguf")


def fill_hub_cache(folder, owner_and_name: str, file: str, content: bytes) -> None:
    """Write a file into a cache of the hub, as a download would have left it."""
    model = folder / f"models--{owner_and_name.replace('/', '--')}"
    for path, data in ((f"snapshots/0123/{file}", content), ("refs/main", b"0123")):
        (model / path).parent.mkdir(parents=True, exist_ok=True)
        (model / path).write_bytes(data)


def test_a_file_of_the_hub_is_named_by_id_and_file(tmp_path, monkeypatch):
    fill_hub_cache(tmp_path, "owner/tiny-GGUF", "tiny.gguf", b"GGUF")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    file = gguf_file("owner/tiny-GGUF:tiny.gguf", "teacher")
    assert file.name == "tiny.gguf" and file.read_bytes() == b"GGUF"
    with pytest.raises(UserError, match=r"other\.gguf of owner/tiny-GGUF cannot be had: the hub cannot be reached"):
        gguf_file("owner/tiny-GGUF:other.gguf", "teacher")


def test_anybody_on_this_machine_finds_the_file_by_the_name_that_is_written_down(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert where_from("a.gguf") == where_from(".:a.gguf") == str(tmp_path / "a.gguf")
    assert where_from("owner/tiny-GGUF:tiny.gguf") == "owner/tiny-GGUF:tiny.gguf"


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gguf.*\[gguf\]"):
        locate(str(tmp_path / "a.gguf"), "student")
