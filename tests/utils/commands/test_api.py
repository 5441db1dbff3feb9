"""`distil`: a whole run as one function."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.faults.conftest import place  # noqa: F401  the set-up of a run
from utils.commands import api
from utils.commands.settings import configure
from utils.errors import UserError
from utils.run.exit_codes import Interrupted

SHORT = {
    "max_steps": 2,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "evaluation": {"max_windows": 4, "samples": 1, "new_tokens": 4, "generation": 0},
}


def test_settings_are_flags_without_dashes_and_sections():
    words = api._words({"lr": 1e-4, "track": ["aim"], "lora": True, "curriculum": {"kd": 0.5}, "loss.top_k": 8})
    settings, _ = configure([*words, "--teacher", "a", "--student", "b", "--train-data", "c"])
    assert settings.training.learning_rate == 1e-4
    assert settings.logging.track == ["aim"]
    assert settings.student.lora.enabled
    assert settings.curriculum.kd.weight == 0.5
    assert settings.loss.top_k == 8


def test_numbers_of_numpy_empty_lists_and_numbers_in_lists_are_taken():
    words = api._words({"max_steps": np.int64(3), "lr": np.float32(0.5), "eval_tasks": [], "train_data": ["c", 3]})
    settings, _ = configure([*words, "--teacher", "a", "--student", "b"])
    assert (settings.training.max_steps, settings.training.learning_rate) == (3, 0.5)
    assert settings.evaluation.tasks == []
    assert settings.data.train == ["c", "3"]


def test_a_run_is_done_and_continued(place, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    run = api.distil(place.teacher, place.student, [place.text], config=place.recipe, output_dir=output, **SHORT)
    assert run.folder == output
    assert (run.student / "config.json").is_file()
    assert run.results == json.loads((output / "evaluation_report.json").read_text())
    assert "student" in repr(run) and str(output) in repr(run)

    # A run that is done is not done again.
    weights = (run.student / "model.safetensors").read_bytes()
    again = api.distil(place.teacher, place.student, [place.text], config=place.recipe, output_dir=output, **SHORT)
    assert (again.student / "model.safetensors").read_bytes() == weights


def test_mistakes_are_told_all_at_once():
    with pytest.raises(UserError) as error:
        api.distil("a", "b", "c", max_step=3, batch_size=0)
    assert "max_step" in str(error.value)


def test_a_model_that_is_loaded_is_refused_with_the_way():
    with pytest.raises(UserError, match=r"teacher: got a dict_keys, expected a name.*Distillation"):
        api.distil({}.keys(), "b", Path("c"))


def test_a_section_changes_a_recipe_and_does_not_replace_it():
    settings, _ = configure(api.flags(config="kaggle_p100", data={"max_documents": 9}, training={"seed": 7}))
    recipe, _ = configure(["--config", "kaggle_p100"])
    assert (settings.data.max_documents, settings.training.seed) == (9, 7)
    assert settings.data.train == recipe.data.train
    assert settings.training.learning_rate == recipe.training.learning_rate


def test_an_interrupted_run_is_told_in_a_sentence_and_keeps_no_models(monkeypatch):
    def start(*_):
        raise Interrupted("SIGINT")

    monkeypatch.setattr(api, "start", start)
    with pytest.raises(KeyboardInterrupt, match=r"stopped by SIGINT; .*quickstart is kept, the same call") as caught:
        api.distil(config="quickstart")
    # The frames of the run hold its models.
    assert caught.value.__context__ is None

    # IPython shows what this returns, and no traceback.
    assert caught.value._render_traceback_() == [f"Stopped: {caught.value}"]
    assert UserError("a mistake")._render_traceback_() == ["UserError: a mistake"]
