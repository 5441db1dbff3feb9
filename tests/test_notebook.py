"""The notebook for Kaggle and Colab, executed from top to bottom without a network."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train
from models.text.chat_turns import chat_tokenizer
from tests.models.tiny import byte_bpe, t5_like, tiny_llama, tiny_t5
from utils.commands.api import flags
from utils.config import resume_rules
from utils.config.plain import to_plain
from utils.errors import UserError
from utils.machine import packages
from utils.machine.stop_signals import StopSignal
from utils.pretrained import export
from utils.run import quickstart

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install -e .[test]")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e .[test]")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -e .[test]")

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "kaggle_distillation.ipynb"
MOST_BYTES = 1_000_000
"""Of a saved run."""
STEPS, STOPPED_AT = 6, 2
SETTINGS = {
    "config": "quickstart",
    "max_steps": STEPS,
    "max_length": 64,
    "save_every": 2,
    "data": {"max_documents": 300},
    "evaluation": {"every": 0, "max_windows": 8, "new_tokens": 8, "without_teacher": False},
}


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def cell(book, tag: str):
    (found,) = [cell for cell in book.cells if tag in cell.metadata.get("tags", ())]
    return found


def said(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The embedded material with a teacher that nobody trained, which takes a minute."""
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(tmp_path / "cache"))
    material = quickstart.material()
    own, _ = train.configure(["--config", "quickstart_teacher"])
    folder = quickstart.teacher_folder(material, resume_rules.identity(to_plain(own)))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(material.teacher)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(material.teacher).save_pretrained(folder)


@pytest.fixture
def inputs(cache, tmp_path, monkeypatch):
    """An attached output of an earlier version: a run that its deadline stopped, in folders that cannot be written."""
    output = tmp_path / "inputs" / "notebooks" / "earlier" / "runs" / "notebook"
    boundaries = iter(range(100))
    with monkeypatch.context() as patch:
        # The first of all is asked before the first step.
        reached = lambda self: "max_hours" if next(boundaries) == STOPPED_AT + 1 else None  # noqa: E731
        patch.setattr(StopSignal, "requested", reached)
        assert train.main([*flags(**SETTINGS), "--output-dir", str(output), "--max-hours", "1"]) == 0
    written = [tmp_path / "inputs", *(tmp_path / "inputs").rglob("*")]
    for path in written:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    yield tmp_path / "inputs"
    for path in written:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_it_is_committed_without_outputs_in_short_cells_that_are_explained(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert max(len(cell.source.splitlines()) for cell in code) <= 20
    before = [notebook.cells[number - 1] for number, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    assert all(cell.cell_type == "markdown" for cell in before)


def test_the_saved_run_is_one_of_this_notebook(notebook):
    """All cells but the one with the settings are its own; it tells what was run, and of no other folder."""
    saved = nbformat.read(NOTEBOOK.with_name("smollm2_from_gemma3.ipynb"), as_version=4)
    nbformat.validate(saved)
    own, others = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (saved, notebook))
    assert [cell.source for cell in own[1:]] == [cell.source for cell in others[1:]]
    assert flags(**settings_in(own[0].source))

    assert "Ready to train!" in said(cell(saved, "preflight"))
    assert "Evaluation on unseen text" in said(cell(saved, "train"))
    outputs = json.dumps([cell.outputs for cell in own])
    assert "Error" not in said(cell(saved, "train")) and "/home/" not in outputs
    assert len(nbformat.writes(saved).encode()) < MOST_BYTES


def settings_in(source: str) -> dict:
    """Return the `SETTINGS` of a cell that writes a text first."""
    scope = {"TEXT": Path("text.jsonl")}
    exec(source[source.index("SETTINGS") :], scope)
    return scope["SETTINGS"]


def test_an_attached_project_is_copied_and_a_missing_one_asked_for(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    source, inputs = cell(notebook, "project").source, tmp_path / "inputs"
    scope = {"OUTPUT": "runs/notebook", "INPUTS": str(inputs), "REPOSITORY": ""}
    with pytest.raises(AssertionError, match="attach it as an input, or give its git address"):
        exec(source, dict(scope))
    project = inputs / "datasets" / "me" / "curriculum-distillation"
    project.mkdir(parents=True)
    (project / "verify_fixes.py").touch()
    exec(source, scope)
    assert Path.cwd() == tmp_path / "curriculum-distillation" and Path("verify_fixes.py").is_file()
    assert scope["OUTPUT"] == tmp_path / "runs" / "notebook"


def test_a_repository_that_cannot_be_cloned_is_told(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"OUTPUT": "runs", "INPUTS": str(tmp_path / "inputs"), "REPOSITORY": str(tmp_path / "none")}
    with pytest.raises(AssertionError, match="attach it as an input"):
        exec(cell(notebook, "project").source, scope)


def test_what_is_lacking_and_cannot_be_fetched_is_told_by_the_cell(notebook, tmp_path, monkeypatch):
    """Installing fails as on Kaggle without internet, and the cell says what to do."""
    old = [packages.Package("datasets", "3.6.0"), packages.Package("torch", "2.10.0")]
    monkeypatch.setattr(packages, "own_requirements", lambda: ["torch>=2.6", "datasets>=4.0"])
    monkeypatch.setattr(packages, "installed_packages", lambda: old)
    monkeypatch.setattr(packages.importlib.metadata, "version", lambda name: "2.10.0+cu128")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"needed: datasets>=4.0, 3.6.0 is installed") as raised:
        exec(cell(notebook, "packages").source, {"INPUTS": tmp_path / "inputs"})
    assert "pip install --no-index --find-links" in str(raised.value)


def test_it_runs_from_top_to_bottom_and_continues_the_attached_run(notebook, inputs, tmp_path):
    """Offline, with the embedded default for a few steps; a saved run stays small."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "curriculum-distillation").symlink_to(NOTEBOOK.parent.parent)
    values = f'SETTINGS, OUTPUT, INPUTS, MAX_HOURS = {SETTINGS!r}, "runs/notebook", "{inputs}", 0.5'
    place = notebook.cells.index(cell(notebook, "parameters"))
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(values))
    variables = {**os.environ, "KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    client = nbclient.NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(work)}})
    client.execute(env=variables)

    assert "nothing was missing" in said(cell(notebook, "packages"))
    assert "[learned]" in said(cell(notebook, "preflight")) and "label shift: copying" not in said(
        cell(notebook, "preflight")
    )
    assert "✓ memory" in said(cell(notebook, "preflight"))
    assert "Continuing" in said(cell(notebook, "resume"))
    trained = cell(notebook, "train")
    assert f"step-{STOPPED_AT:08d}" in said(trained) and "[TOTAL]" not in said(trained)
    (panel,) = [output for output in trained.outputs if "text/html" in output.get("data", {})]
    assert f"step {STEPS} of {STEPS}" in panel.data["text/html"] and "<th>loss</th>" in panel.data["text/html"]
    (shown,) = cell(notebook, "report").outputs
    assert "<iframe srcdoc=" in shown["data"]["text/html"] and "image/png" in cell(notebook, "curves").outputs[0].data
    assert "student.zip" in said(cell(notebook, "export")) and (work / "runs" / "student.zip").is_file()
    assert len(said(cell(notebook, "sample"))) > 100
    size = len(nbformat.writes(notebook).encode())
    assert size < MOST_BYTES, f"a saved run has {size:,} bytes"


@pytest.mark.parametrize(
    ("family", "prompted", "read"),
    [
        ("causal", False, "Once upon"),
        ("causal", True, "User:\nOnce upon\n\nAssistant:\n"),
        ("encoder_decoder", True, "Once upon</s>"),
    ],
)
def test_the_student_is_tried_with_what_it_read_in_training(
    notebook, family, prompted, read, tmp_path, monkeypatch, capsys
):
    encoder = family == "encoder_decoder"
    tokenizer = t5_like(120) if encoder else chat_tokenizer(byte_bpe(300))
    model = (tiny_t5 if encoder else tiny_llama)(len(tokenizer))
    export.export(model, tokenizer, tmp_path / "student", "")
    results = {"student": {"encoder_decoder": encoder}, "prompted": prompted, "samples": [{"prompt": "Once upon"}]}
    (tmp_path / "evaluation_report.json").write_text(json.dumps(results))
    asked, sound = [], type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, **inputs: (asked.append(inputs["input_ids"]), sound(self, **inputs))[1]
    )
    exec(cell(notebook, "sample").source, {"OUTPUT": tmp_path})
    assert [tokenizer.decode(ids[0]) for ids in asked] == [read]
    said = capsys.readouterr()
    assert said.out.count("Once upon") == 1 and "Assistant" not in said.out
    assert said.out.startswith("Once upon\n    " if prompted else "Once upon") and "warn" not in said.err.lower()
