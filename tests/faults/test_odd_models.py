"""Models that are made otherwise than most: the whole program trains them, or refuses them by name before training."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import train
import verify_fixes
from utils.commands import checks as verification
from utils.evaluation import exported
from utils.forecast import step_memory
from utils.run import export as export_module

V = 290
COMMON = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "intermediate_size": 64}
ARCHITECTURES = {
    "Mamba": {"state_size": 4},
    "Mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "RecurrentGemma": {
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "lru_width": 32,
        "attention_window_size": 16,
    },
    "Jamba": {
        **HEADS,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 4,
    },
    "Bamba": {
        **HEADS,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "attn_layer_indices": [1],
        "mamba_chunk_size": 16,
    },
    "Gemma3nText": {
        **HEADS,
        "head_dim": 8,
        "sliding_window": 16,
        "vocab_size_per_layer_input": V,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
        "altup_num_inputs": 2,
    },
    "Llama4Text": {
        **HEADS,
        "head_dim": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": 16,
    },
}
RESCALING = {"num_hidden_layers": 7, "context_length": 256, "rescale_every": 6}


def made(place, folder, architecture: str, **values):
    """A tiny model of an architecture with the student's tokenizer, in a folder."""
    config = getattr(transformers, f"{architecture}Config")(**COMMON | values)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(place.student).save_pretrained(folder)
    return folder


@pytest.fixture
def run(place, tmp_path, capsys):
    """Words of the command line -> (exit code, what was said) of two steps."""

    def start(*words, output="run") -> tuple[int, str]:
        short = ("--max-steps", "2", "--eval-every", "0", "--max-length", "32", "--student-init", "pretrained")
        code = train.main(place.arguments(tmp_path / output, *short, *map(str, words)))
        return code, " ".join(capsys.readouterr().out.split())

    return start


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_student_whose_config_the_forecast_does_not_know_is_trained(architecture, run, place, tmp_path):
    student = made(place, tmp_path / "student", architecture, **ARCHITECTURES[architecture])
    code, said = run("--student", student)
    assert code == 0, said
    assert "Traceback" not in said and "loaded anew, has the loss that was measured" in said


@pytest.mark.parametrize("architecture", ["Mamba", "Llama4Text"])
def test_such_a_teacher_teaches(architecture, run, place, tmp_path):
    teacher = made(place, tmp_path / "teacher", architecture, **ARCHITECTURES[architecture])
    code, said = run("--teacher", teacher, "--student-init", "random", "--set", "curriculum=auto")
    assert code == 0 and "feat 1, attn 1, since the student starts from random weights" in said, said


def test_a_student_of_several_streams_is_compared_by_the_one_that_its_layers_read(run, place, tmp_path):
    student = made(place, tmp_path / "student", "Gemma3nText", **ARCHITECTURES["Gemma3nText"])
    code, said = run("--student", student, "--student-init", "random", "--set", "curriculum=auto")
    assert code == 0 and "feat 1, attn 1" in said, said
    assert "feat 1, attn 1" in (tmp_path / "run" / "report.html").read_text()


def test_the_checklist_says_that_there_is_no_forecast_and_goes_on(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verification, "TINY", ())
    student = made(place, tmp_path / "student", "Mamba", **ARCHITECTURES["Mamba"])
    words = place.arguments(tmp_path / "run", "--student", str(student), "--student-init", "pretrained")
    code = verify_fixes.main(words)
    said = capsys.readouterr().out
    assert "memory: no forecast, because of RuntimeError: a body of mamba" in said
    assert code == 0, said


def test_auto_without_a_forecast_starts_small_where_nothing_can_be_halved(run, place, tmp_path, monkeypatch):
    monkeypatch.setattr(step_memory, "measure_body", lambda *args: 1 / 0)
    code, said = run("--batch-size", "auto", "--student-init", "random")
    assert code == 0 and "no forecast of memory, because of ZeroDivisionError" in said
    assert "without a forecast, micro-batches of 1" in said and "micro-batch 1 x" in said


# ------------------------------------------------------------------------------------- the exported student


def test_a_student_that_rescales_its_weights_is_exported_as_it_was_trained(run, place, tmp_path):
    student = made(place, tmp_path / "student", "Rwkv", **RESCALING)
    code, said = run("--student", student, "--learning-rate", "1e-6")
    assert code == 0 and "loaded anew, has the loss that was measured" in said, said
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (student, tmp_path / "run" / "student"))
    weights = [model.rwkv.blocks[6].attention.output.weight for model in (before, after)]
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-4)
    assert after.config.rescale_every == before.config.rescale_every == 6


def test_an_export_that_is_another_student_ends_the_run_with_an_error_and_marks_the_report(run, tmp_path, monkeypatch):
    export = export_module.export

    def damaged(student, *args):
        head = student.get_output_embeddings().weight
        with torch.no_grad():
            head.mul_(2)
            export(student, *args)
            head.div_(2)

    monkeypatch.setattr(export_module, "export", damaged)
    code, said = run("--student-init", "random")
    assert code == 1 and "is not the one that was measured" in said
    report = json.loads((tmp_path / "run" / "evaluation_report.json").read_text())
    assert abs(report["run"]["loss_difference_loaded_anew"]) > exported.FLOAT32
    assert "do not use" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "shipped",
    [{"temperature": 0.9, "top_p": 0.6}, {"early_stopping": True}, {"temperature": "warm"}, {"max_new_tokens": -1}],
)
def test_generation_settings_of_a_base_do_not_end_a_run_after_training(shipped, run, place, tmp_path):
    student = made(place, tmp_path / "student", "Llama", **HEADS)
    file = student / "generation_config.json"
    file.write_text(json.dumps({"_from_model_config": True, "eos_token_id": 0} | shipped))
    code, said = run("--student", student)
    trained = "training ended after step" in said
    assert code == 0 if trained else code == 2, said
    if trained:
        assert (tmp_path / "run" / "student" / "generation_config.json").is_file()


def test_a_tokenizer_that_cannot_be_written_is_found_before_training(run, monkeypatch):
    def refuse(self, *args, **options):
        raise TypeError("not JSON serializable")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuse)
    code, said = run("--student-init", "random")
    assert code == 2 and "could not be exported after training" in said and "not JSON serializable" in said
    assert "[TOTAL]" not in said and "initial student" not in said


def test_a_forward_that_fails_in_training_mode_alone_is_found_before_anything_is_measured(run, monkeypatch):
    forward = transformers.LlamaModel.forward

    def refuse(self, *args, **options):
        if self.training:
            raise ValueError("token_type_ids is required as a model input when training")
        return forward(self, *args, **options)

    monkeypatch.setattr(transformers.LlamaModel, "forward", refuse)
    code, said = run("--student-init", "random")
    assert code == 2 and f"LlamaForCausalLM, transformers {transformers.__version__}" in said
    assert "token_type_ids is required" in said and "bits per byte" not in said


def test_samples_that_cannot_be_written_cost_the_samples_alone(run, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "generate", lambda *args, **options: 1 / 0)
    code, said = run("--student-init", "random")
    assert code == 0 and "no samples of the student, because of ZeroDivisionError" in said
    report = json.loads((tmp_path / "run" / "evaluation_report.json").read_text())
    assert report["samples"][0]["student"] is None and report["student"]["bits_per_byte"] > 0


# ------------------------------------------------------------------------------------------------- adapters


def test_the_exported_adapter_of_a_run_is_the_start_of_the_next(run, place, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed: pip install -e .[peft]")
    student = made(place, tmp_path / "student", "Llama", **HEADS)
    code, said = run("--student", student, "--lora", output="first")
    assert code == 0, said
    for given in (tmp_path / "first" / "student", tmp_path / "first"):
        code, said = run("--student", given, output=f"next-{given.name}")
        assert code == 0 and f"is an adapter of {student}" in said, said
    assert (tmp_path / "next-first" / "student" / "model.safetensors").is_file()
    code, said = run("--teacher", tmp_path / "first" / "student", "--student-init", "random", output="taught")
    assert code == 0 and f"is an adapter of {student}" in said, said


def test_a_checkpoint_that_is_given_as_a_model_is_told_apart(run, place, tmp_path):
    assert run("--student-init", "random", output="first")[0] == 0
    checkpoint = next((tmp_path / "first" / "checkpoints").iterdir())
    code, said = run("--student", checkpoint, output="second")
    assert code == 2 and "This is a checkpoint" in said and "--resume" in said
