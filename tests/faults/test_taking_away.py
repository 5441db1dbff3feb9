"""The student that is taken away from a run needs nothing of this project, on disk, on the hub and in lm_eval."""

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import train
from utils.evaluation import lm_eval_tasks
from utils.run import upload

SHORT = ["--max-steps", "4", "--save-every", "4", "--eval-every", "0"]

LOADING = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("The red dog sees", return_tensors="pt")
text = tokenizer.decode(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0])
assert text.startswith("The red dog sees") and not info["missing_keys"] and not info["unexpected_keys"], (text, info)
assert not {"models", "utils", "train", "curriculum_distillation"} & {name.split(".")[0] for name in sys.modules}
"""

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install -e .[eval]"
)


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(place.arguments(output, *SHORT)) == 0
    return output


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with a task of lm_eval and its documents, half of which nobody can get right."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": "The red dog sees the", "choices": ["cat", "cat"], "answer": number % 2} for number in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    task = {
        "task": "what_it_sees",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }

    (folder / "what_it_sees.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder


def test_the_student_loads_where_this_project_is_not(whole, tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADING, str(whole / "student")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_it_is_whole_and_holds_no_pickle(whole):
    files = {path.name for path in (whole / "student").iterdir()}
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert needed <= files and not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    generation = json.loads((whole / "student" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0 and generation["pad_token_id"] == 0
    card = ModelCard.load(whole / "student" / "README.md")
    assert card.data.license == "unknown" and "## Results" in card.text and "## Licence" in card.text


def test_a_hub_that_cannot_be_reached_is_told_before_the_run(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(upload, "hub_is_reachable", lambda: False)
    output = tmp_path / "run"
    assert train.main(place.arguments(output, *SHORT, "--push-to-hub", "me/mine")) == 2
    assert "the hub cannot be reached" in " ".join(capsys.readouterr().out.split()) and not output.exists()


def test_an_upload_that_fails_after_the_run_costs_nothing(place, whole, monkeypatch, caplog):
    """No pretended upload here: this suite is offline, and so the hub's client fails by itself."""
    monkeypatch.setattr(upload, "check", lambda config, student, model: None)
    (whole / "report.html").unlink()
    with caplog.at_level(logging.ERROR):
        assert train.main(place.arguments(whole, *SHORT, "--push-to-hub", "me/mine")) == 0
    assert f"hf upload me/mine {whole}/student . --private" in caplog.text
    assert (whole / "student" / "model.safetensors").is_file() and (whole / "report.html").is_file()


def test_a_finished_run_is_uploaded_by_the_same_command(place, whole, monkeypatch):
    pushed = []
    monkeypatch.setattr(upload, "check", lambda config, student, model: None)
    monkeypatch.setattr(upload, "push", lambda config, student: pushed.append((config.repository, student)))
    assert train.main(place.arguments(whole, *SHORT, "--push-to-hub", "me/mine")) == 0
    assert pushed == [("me/mine", whole / "student")]


def test_what_is_measured_is_the_trained_student_and_the_whole_teacher(place, tmp_path, monkeypatch):
    """Also where a cache spared the run its teacher."""
    measured = []

    def measure(held_out, models):
        measured.append({key: sum(p.numel() for p in model().parameters()) for key, model in models.items()})
        return []

    monkeypatch.setattr(lm_eval_tasks, "check", lambda config: None)
    monkeypatch.setattr(lm_eval_tasks, "measure", measure)
    cached = ["--cache-teacher", str(tmp_path / "cache")]
    for number, cache in enumerate(([], cached, cached)):
        asked = [*SHORT, "--eval-tasks", "any", *cache]
        assert train.main(place.arguments(tmp_path / f"run-{number}", *asked)) == 0
    sizes = {
        "student": AutoModelForCausalLM.from_pretrained(tmp_path / "run-0" / "student").num_parameters(),
        "teacher": AutoModelForCausalLM.from_pretrained(place.teacher).num_parameters(),
    }
    assert measured == [sizes] * 3


@needs_lm_eval
def test_tasks_are_measured_on_teacher_and_student_and_told_everywhere(place, whole, tasks):
    asked = ["--eval-tasks", "what_it_sees", "--eval-tasks-path", str(tasks)]
    assert train.main(place.arguments(whole, *SHORT, *asked)) == 0
    (row,) = json.loads((whole / "evaluation_report.json").read_text())["tasks"]
    about = {"task": "what_it_sees", "metric": "acc", "higher_is_better": True, "documents": 8}
    assert about.items() <= row.items() and "initial_student" not in row  # it had random weights
    assert row["teacher"]["value"] == row["student"]["value"] == 0.5 and row["student"]["stderr"] > 0
    for file in ("evaluation_report.md", "report.html", "student/README.md"):
        assert "what_it_sees" in (whole / file).read_text(encoding="utf-8"), file


@needs_lm_eval
def test_lm_eval_reads_the_student_folder(whole, tasks, tmp_path):
    model = ["--model", "hf", "--model_args", f"pretrained={whole / 'student'}", "--device", "cpu"]
    asked = ["--tasks", "what_it_sees", "--include_path", str(tasks), "--output_path", str(tmp_path)]
    command = [sys.executable, "-m", "lm_eval", *model, *asked]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["what_it_sees"]["acc,none"] == 0.5
