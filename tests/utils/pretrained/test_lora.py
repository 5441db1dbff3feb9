"""A student with an adapter starts as its base, and the exported plain model computes what the two do together."""

import importlib.util

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from utils.config.build import build
from utils.config.settings import LoraConfig
from utils.errors import UserError
from utils.pretrained import export
from utils.pretrained.lora import add_lora, check, merged
from utils.report.model_card import model_card

pytest.importorskip("peft", reason="peft is not installed: pip install -e .[peft]")

IDS = torch.arange(1, 13).reshape(2, 6)
CPU = torch.device("cpu")


def base(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 290, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    options = {"num_attention_heads": 2, "initializer_range": 0.4, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**shape, **options)).eval()


def settings(**values) -> LoraConfig:
    return build(LoraConfig, {"enabled": True, "rank": 3} | values, source="test")


def trained(student: nn.Module) -> nn.Module:
    """An adapter that does something."""
    for name, parameter in student.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return student.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_it_starts_as_its_base_and_only_the_adapter_is_trained():
    student = add_lora(base(), "some/base", settings(dropout=0.5)).eval()
    assert torch.equal(logits(student), logits(base()))
    learned = {name for name, p in student.named_parameters() if p.requires_grad}
    assert learned == {name for name, _ in student.named_parameters() if ".lora_" in name} and len(learned) == 2 * 2 * 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_over_a_half_precision_base_the_adapter_is_float32(dtype):
    student = add_lora(base().to(dtype), "some/base", settings())
    kinds = {p.requires_grad: p.dtype for p in student.parameters()}
    assert kinds == {True: torch.float32, False: dtype}
    student(input_ids=IDS, labels=IDS).loss.backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in student.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "targets", [["all-linear"], ["q_proj", "lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]]
)
def test_merged_logits_are_those_with_the_adapter_also_from_the_disk(tmp_path, targets, tied):
    """Head and embedding may be one tensor: the change of one must not reach the other."""
    student = trained(add_lora(base(tied), "some/base", settings(targets=targets)))
    before, expected = logits(base(tied)), logits(student)
    assert (expected - before).abs().max() > 0.1
    plain = merged(student, base(tied))
    assert type(plain) is LlamaForCausalLM and not [n for n, _ in plain.named_modules() if "lora" in n]
    rounding = 1e-5 * expected.abs().max()
    assert torch.allclose(logits(plain), expected, rtol=0, atol=rounding)
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain))
    assert torch.equal(logits(student), expected), "merging changed the student"


def test_an_adapter_of_the_head_is_refused_under_deepspeed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"student.lora.targets: got q_proj, lm_head, the head among them.*DeepSpeed"):
        add_lora(base(), "some/base", settings(targets=["q_proj", "lm_head"]))
    add_lora(base(), "some/base", settings())


def test_the_exported_adapter_is_small_and_loads_over_its_base(tmp_path):
    from peft import AutoPeftModelForCausalLM

    from tests.models.tiny import byte_bpe

    base().save_pretrained(tmp_path / "base")
    student = trained(add_lora(base(), str(tmp_path / "base"), settings(targets=["q_proj", "lm_head"])))
    export.export(student, byte_bpe(280), tmp_path / "student", "card")
    assert not (tmp_path / "student" / "model.safetensors").exists()
    assert (tmp_path / "student" / "README.md").read_text() == "card"
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "student")), logits(student))


def test_the_code_of_its_card_loads_an_adapter_that_stops_where_its_tokenizer_ends_a_turn(tmp_path):
    """Its base ends a text elsewhere, as before it was taught to talk."""
    from tests.models.tiny import byte_bpe
    from tests.utils.report.test_model_card import RESULTS
    from tests.utils.report.test_model_card import settings as run_settings

    plain = base()
    plain.generation_config.eos_token_id = 7
    plain.save_pretrained(tmp_path / "base")
    name, folder = str(tmp_path / "base"), tmp_path / "student"
    card = model_card(run_settings(name, enabled=True), RESULTS)
    export.export(add_lora(plain, name, settings()), byte_bpe(280), folder, card)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict = {}
    exec(code.replace("path/to/this/folder", str(folder)), found)
    model = found["model"]
    assert model.generation_config.eos_token_id == [found["tokenizer"].eos_token_id, 7]
    with torch.no_grad():
        nn.init.zeros_(model.get_output_embeddings().weight)  # the first token, its end of text, is then the choice
    assert model.generate(input_ids=IDS[:1], max_new_tokens=5, do_sample=False).shape[1] == IDS.shape[1] + 1


@pytest.mark.parametrize(
    ("targets", "named"),
    [(["q_proj", "v_porj"], "no v_porj"), (["norm"], "norm"), (["all-linear", "lm_head"], "no all-linear")],
)
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(targets, named):
    with pytest.raises(UserError, match=named) as raised:
        add_lora(base(), "some/base", settings(targets=targets))
    assert "gate_proj" in str(raised.value) and "student.lora.targets" in str(raised.value)


def test_without_peft_it_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--lora needs peft.*pip install '\.\[peft\]'"):
        check(settings(), CPU)
    check(LoraConfig(), CPU)


def test_a_quantised_base_is_refused_where_the_device_cannot():
    with pytest.raises(UserError, match=r"student\.lora\.base: got 4bit.*on the cpu"):
        check(settings(base="4bit"), CPU)
