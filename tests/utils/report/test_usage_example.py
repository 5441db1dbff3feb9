"""The code that says how a student is used runs, and lets it read what it read in training."""

import importlib.util

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM, T5ForConditionalGeneration

from models.text.chat_turns import chat_tokenizer
from tests.models.tiny import byte_bpe, t5_like, tiny_llama, tiny_t5
from utils.config.settings import LoraConfig
from utils.pretrained.export import export
from utils.report.usage_example import how_to_use

ADAPTER = {"student": {"lora": {"enabled": True, "merge": False}}}
TEXT = "Once upon a time"


@pytest.fixture
def asked(monkeypatch) -> list[list[int]]:
    """Token ids that a model was given to write on from, or to answer."""
    found: list[list[int]] = []
    for model in (LlamaForCausalLM, T5ForConditionalGeneration):
        sound = model.generate
        monkeypatch.setattr(
            model, "generate", lambda self, sound=sound, **inputs: (
                found.append(inputs["input_ids"][0].tolist()), sound(self, **inputs)
            )[1],
        )  # fmt: skip
    return found


def used(folder, results, settings=None) -> list[str]:
    """Run the example; return what it prints, without what libraries do."""
    printed: list[str] = []
    exec(how_to_use(repr(str(folder)), settings or {}, {"student": {}} | results), {"print": printed.append})
    return printed


def test_a_student_of_texts_goes_on_from_a_beginning(tmp_path, asked):
    export(tiny_llama(300), byte_bpe(300), tmp_path / "student", "")
    printed = used(tmp_path / "student", {})
    assert byte_bpe(300).decode(asked[0]) == TEXT and printed[0].startswith(TEXT)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_student_of_conversations_is_asked_through_its_chat_template(tmp_path, asked, adapter):
    model, tokenizer, settings = tiny_llama(300), chat_tokenizer(byte_bpe(300)), {}
    if adapter:
        if importlib.util.find_spec("peft") is None:
            pytest.skip("peft is not installed: pip install -e .[peft]")
        from utils.pretrained.lora import add_lora

        model.save_pretrained(tmp_path / "base")
        model, settings = add_lora(model, str(tmp_path / "base"), LoraConfig(enabled=True)), ADAPTER
    export(model, tokenizer, tmp_path / "student", "")
    printed = used(tmp_path / "student", {"prompted": True}, settings)
    assert tokenizer.decode(asked[0]) == "User:\nTell me a story.\n\nAssistant:\n"
    assert printed and not any("Tell me a story." in text for text in printed)


def test_an_encoder_reads_the_prompt_as_it_is(tmp_path, asked):
    tokenizer = t5_like(120)
    export(tiny_t5(len(tokenizer)), tokenizer, tmp_path / "student", "")
    used(tmp_path / "student", {"student": {"encoder_decoder": True}, "prompted": True})
    assert asked == [AutoTokenizer.from_pretrained(tmp_path / "student")(TEXT)["input_ids"]]
