"""Causal and encoder-decoder models told apart by their configs alone."""

from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, LlamaConfig, T5Config

from utils.errors import UserError
from utils.pretrained.families import auto_class, decoder_starts, depth

T5, BART, LLAMA = T5Config(decoder_start_token_id=0), BartConfig(), LlamaConfig()


def settings(lora: bool = False, learn_from: str = "completions", tasks: tuple = ()) -> SimpleNamespace:
    return SimpleNamespace(
        student=SimpleNamespace(lora=SimpleNamespace(enabled=lora)),
        data=SimpleNamespace(learn_from=learn_from),
        evaluation=SimpleNamespace(tasks=tasks),
    )


def test_a_family_has_its_class_and_its_start_of_decoding():
    assert [auto_class(shape) for shape in (T5, BART, LLAMA)] == [AutoModelForSeq2SeqLM] * 2 + [AutoModelForCausalLM]
    assert decoder_starts(settings(), {"student": T5, "teacher": BART}) == (0, 2)
    assert decoder_starts(settings(lora=True, learn_from="all"), {"student": LLAMA, "teacher": LLAMA}) is None


def test_the_depth_is_that_of_the_deeper_stack():
    assert depth(T5Config(num_layers=3, num_decoder_layers=5)) == 5 == depth(LlamaConfig(num_hidden_layers=5))
    assert depth(BartConfig(encoder_layers=4, decoder_layers=2)) == 4


@pytest.mark.parametrize(
    ("student", "teacher", "options", "told"),
    [
        (LLAMA, T5, {}, "student llama and teacher t5.*Expected two of one kind"),
        (BART, LLAMA, {}, "student bart and teacher llama.*Expected two of one kind"),
        (T5, T5, {"lora": True}, "--lora: not for encoder-decoder models"),
        (T5, T5, {"tasks": ("piqa",)}, "--eval-tasks: not for encoder-decoder models"),
        (T5, T5, {"learn_from": "all"}, "got all, expected completions"),
        (T5, T5Config(), {}, "teacher: its config.json has no decoder_start_token_id"),
    ],
)
def test_what_only_causal_models_can_do_is_refused(student, teacher, options, told):
    with pytest.raises(UserError, match=told):
        decoder_starts(settings(**options), {"student": student, "teacher": teacher})
