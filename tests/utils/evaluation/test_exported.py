"""The exported student, loaded anew, has the loss that was reported; anything else is an error."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.text.collate import PairCollator
from models.text.encoder_decoder import SourceEncoder
from models.text.vocabulary import VocabularyMap
from tests.models.tiny import bart_like, byte_bpe, pair_of, t5_like, tiny_bart, tiny_llama, tiny_t5
from utils.config.settings import StudentConfig
from utils.errors import RunError
from utils.evaluation.exported import load_anew
from utils.pretrained import export

TEXTS = ["Once upon a time there was a cat. It sat on a mat.", "And then? Nobody knows what came then."]
TOKENIZER = byte_bpe(290)


def example(prompt: str, completion: str) -> str:
    """An example as the encoder of encoder-decoder pairs reads it."""
    roles = {"user": prompt, "assistant": completion}
    return json.dumps([{"role": role, "content": content} for role, content in roles.items()])


@pytest.fixture
def held_out():
    pair = pair_of(TOKENIZER, TOKENIZER)
    return SimpleNamespace(windows=TEXTS, collate=pair.batch, batch_size=1)


@pytest.mark.parametrize("tied", [False, True])
def test_a_sound_export_has_the_same_loss(tied, held_out, tmp_path):
    student = tiny_llama(len(TOKENIZER), tie_word_embeddings=tied)
    export.export(student, TOKENIZER, tmp_path / "student", "card")
    check = load_anew(student.train(), held_out, tmp_path / "student", StudentConfig("student"))
    assert check.difference == 0 and check.is_same and student.training
    check.require()


def test_a_halved_matrix_is_an_error_that_says_both_losses(held_out, tmp_path, caplog):
    student, folder = tiny_llama(len(TOKENIZER)), tmp_path / "student"
    export.export(student, TOKENIZER, folder, "card")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("o_proj.weight"))
    save_file(weights | {name: weights[name] / 2}, folder / "model.safetensors", {"format": "pt"})
    check = load_anew(student, held_out, folder, StudentConfig("student"))
    assert not check.is_same and "do not use" in caplog.text
    with pytest.raises(RunError, match=f"{check.exported:.4f} nats per token.*in memory {check.trained:.4f}"):
        check.require()


def test_weights_that_are_no_numbers_are_an_error(held_out, tmp_path):
    student, folder = tiny_llama(len(TOKENIZER)), tmp_path / "student"
    export.export(student, TOKENIZER, folder, "card")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("o_proj.weight"))
    save_file(weights | {name: weights[name] * torch.nan}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError):
        load_anew(student, held_out, folder, StudentConfig("student")).require()


def test_a_folder_that_cannot_be_loaded_is_an_error(held_out, tmp_path):
    student, folder = tiny_llama(len(TOKENIZER)), tmp_path / "student"
    export.export(student, TOKENIZER, folder, "card")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match="cannot be loaded anew"):
        load_anew(student, held_out, folder, StudentConfig("student"))


@pytest.mark.parametrize(("make", "of"), [(tiny_t5, t5_like), (tiny_bart, bart_like)])
def test_an_encoder_decoder_model_is_checked_too(make, of, tmp_path):
    tokenizer = of()
    student = make(len(tokenizer))
    encoder = SourceEncoder(tokenizer, tokenizer, 96, (student.config.decoder_start_token_id,) * 2)
    vocabulary = VocabularyMap.build(tokenizer, tokenizer)
    collate = PairCollator(vocabulary, encoder.end_of_text, 0)
    rows = [example(text, text) for text in TEXTS]
    held = SimpleNamespace(windows=encoder.windows(rows), collate=collate, batch_size=2)
    export.export(student, tokenizer, tmp_path / "student", "card")
    assert load_anew(student, held, tmp_path / "student", StudentConfig("student")).is_same
