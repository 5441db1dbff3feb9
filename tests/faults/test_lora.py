"""The whole program with a LoRA student: what it saves is small, whole, and enough to go on bit for bit."""

import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train
from utils.machine.stop_signals import StopSignal

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e .[peft]")

STEPS = 6
LORA = ["--lora", "--set", "student.lora.dropout=0.2", "student.lora.targets=[q_proj, down_proj, lm_head]"]
SHORT = ["--student-init", "pretrained", "--max-steps", str(STEPS), "--save-every", "2", "--eval-every", "3"]


@pytest.fixture(scope="module")
def lora_place(place, tmp_path_factory):
    """The usual set-up with a student that has weights, whose head is not tied."""
    folder = tmp_path_factory.mktemp("lora")
    for file in place.student.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return replace(place, student=folder)


@pytest.fixture(scope="module")
def run_in(lora_place):
    def run(output, *more: str) -> int:
        return train.main(lora_place.arguments(output, "--student", str(lora_place.student), *SHORT, *LORA, *more))

    return run


@pytest.fixture(scope="module")
def whole(run_in, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run_in(output, "--set", "curriculum.feat.weight=0.1", "curriculum.span.weight=0.2") == 0
    return output


def adapter_of(output) -> str:
    return hashlib.sha256((output / "student" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_the_student_is_an_adapter_that_loads_over_the_untouched_base(lora_place, whole):
    from peft import AutoPeftModelForCausalLM

    left = {path.name for path in (whole / "student").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= left
    assert "model.safetensors" not in left
    student = AutoPeftModelForCausalLM.from_pretrained(whole / "student")
    base = AutoModelForCausalLM.from_pretrained(lora_place.student)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        changed, before = student(input_ids=ids).logits, base(input_ids=ids).logits
        with student.disable_adapter():
            assert torch.equal(student(input_ids=ids).logits, before)
    assert (changed - before).abs().max() > 1e-2
    report = json.loads((whole / "evaluation_report.json").read_text())
    assert report["student"]["bits_per_byte"] < report["initial_student"]["bits_per_byte"]
    card = (whole / "student" / "README.md").read_text()
    assert "library_name: peft" in card and "AutoPeftModelForCausalLM" in card


def test_a_checkpoint_holds_adapter_and_router_and_not_the_base(whole):
    newest = max((whole / "checkpoints").iterdir())
    names = load_file(newest / "module.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"student", "router"}
    assert all("lora_" in name for name in names if name.startswith("student."))


def test_an_interrupted_run_goes_on_bit_for_bit(run_in, whole, tmp_path, monkeypatch):
    weights = ("--set", "curriculum.feat.weight=0.1", "curriculum.span.weight=0.2")
    boundaries = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "requested", lambda self: "SIGTERM" if next(boundaries) == 3 else None)
        assert run_in(tmp_path / "run", *weights) == 143
    assert not (tmp_path / "run" / "student").exists()
    assert run_in(tmp_path / "run", *weights) == 0
    assert adapter_of(tmp_path / "run") == adapter_of(whole)


def test_another_base_is_refused_on_resume(run_in, lora_place, whole, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for file in lora_place.student.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(other)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1  # no layer with an adapter
    model.save_pretrained(other)
    weights = ("--set", "curriculum.feat.weight=0.1", "curriculum.span.weight=0.2")
    assert run_in(whole, *weights, "--student", str(other)) == 2
    assert "belongs to a run with other settings" in capsys.readouterr().out


def test_lm_eval_measures_the_adapter_by_the_command_of_its_card(lora_place, whole, monkeypatch):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="pip install -e .[eval]")
    from lm_eval.api.instance import Instance

    # a card names a base of one's own by its folder's name alone
    monkeypatch.chdir(lora_place.student.parent)
    card = (whole / "student" / "README.md").read_text(encoding="utf-8")
    (models,) = re.findall(r"lm_eval --model hf --model_args (\S+) --tasks", card)
    models = models.replace("path/to/this/folder", str(whole / "student"))
    measured = huggingface.HFLM.create_from_arg_string(models, {"device": "cpu", "batch_size": 1})

    text, ending = "The red dog sees the", " cat"
    (score, _), *_ = measured.loglikelihood([Instance("loglikelihood", {}, (text, ending), 0)])
    student = peft.AutoPeftModelForCausalLM.from_pretrained(whole / "student")
    base = AutoModelForCausalLM.from_pretrained(lora_place.student)
    tokenizer = AutoTokenizer.from_pretrained(whole / "student")
    assert score == pytest.approx(log_likelihood(student, tokenizer, text, ending), abs=1e-4)
    assert score != pytest.approx(log_likelihood(base, tokenizer, text, ending), abs=1e-4)


def log_likelihood(model, tokenizer, text: str, ending: str) -> float:
    """Return the log probability of an ending after a text."""
    before, whole = (tokenizer(words, return_tensors="pt")["input_ids"] for words in (text, text + ending))
    with torch.no_grad():
        log_probabilities = model(whole).logits[0, :-1].log_softmax(-1)
    tokens = whole[0, before.shape[1] :]
    return log_probabilities[-len(tokens) :].gather(1, tokens[:, None]).sum().item()


def test_merged_it_is_a_plain_model_that_computes_the_same(run_in, whole, capsys):
    """The finished run is asked for another export: nothing is trained again.

    Last in this file: the run has no adapter to load any more.
    """
    from peft import AutoPeftModelForCausalLM

    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        expected = AutoPeftModelForCausalLM.from_pretrained(whole / "student")(input_ids=ids).logits
        weights = ("--set", "curriculum.feat.weight=0.1", "curriculum.span.weight=0.2")
        assert run_in(whole, *weights, "--merge-lora") == 0
        assert "already finished" in " ".join(capsys.readouterr().out.split())
        assert not (whole / "student" / "adapter_config.json").exists()
        plain = AutoModelForCausalLM.from_pretrained(whole / "student")
        assert torch.allclose(plain(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
