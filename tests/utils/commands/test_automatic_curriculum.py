"""Weights that nobody gave suit what the student starts from; those that were given stand."""

import pytest
import yaml

import train
from models.config import CurriculumConfig, Term, automatic_curriculum
from utils.commands.automatic_curriculum import REASONS
from utils.config.plain import to_plain
from utils.config.yaml_files import as_yaml

MODELS = ["--teacher", "t", "--student", "s", "--train-data", "d.txt"]
STATES = {"feat", "attn"}
RANDOM = automatic_curriculum("random", reads_once=True)


def configured(*words: str):
    """The configuration of a command, and the line on its curriculum."""
    config, origin = train.configure([*MODELS, *words])
    return config, origin.partition("\n")[2]


@pytest.mark.parametrize(
    ("words", "beginning"),
    [
        ([], "trained"),
        (["--lora"], "trained"),
        (["--student-init", "layers:3"], "cut"),
        (["--student-init", "random"], "random"),
        (["--student", "quickstart"], "random"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_weights_follow_what_the_student_starts_from(words, beginning):
    config, line = configured(*words)
    assert config.curriculum == automatic_curriculum(beginning, reads_once=True)
    kd = "kd 0.7, lm 0.3" if beginning == "random" else "kd 0.3, lm 0.7"
    assert line.startswith(f"curriculum auto: {kd}") and f"since {REASONS[beginning]}" in line
    assert ("reads each text once" in line) == (beginning != "random")


@pytest.mark.parametrize(
    ("words", "kd", "how_often"),
    [
        (["--epochs", "1"], 0.3, "reads each text once"),
        (["--epochs", "2"], 0.7, "may read its text again"),
        (["--max-steps", "100"], 0.7, "may read its text again"),
        # In one epoch an easier half is read twice; text that is opened as fast as it is read, once.
        (["--set", "data.order=length", "curriculum.open_text=0.5"], 0.7, "may read its text again"),
        (
            ["--set", "data.order=length", "curriculum.open_text={points: [[0, 0.2], [0.8, 1]]}"],
            0.3,
            "reads each text once",
        ),
        # Nobody knows how long a stream is.
        (["--max-steps", "100", "--set", "data.streaming=true"], 0.3, "whose texts are taken to be read once"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_text_that_may_be_read_again_takes_more_of_the_teacher(words, kd, how_often):
    config, line = configured(*words)
    pair = {"kd": Term(kd), "lm": Term(round(1 - kd, 9))}
    assert config.curriculum == CurriculumConfig(**pair, open_text=config.curriculum.open_text)
    assert how_often in line


def test_beside_a_given_weight_of_the_pair_or_own_text_the_other_is_the_usual_one():
    config, line = configured("--set", "curriculum.kd.weight=0.5")
    assert config.curriculum == CurriculumConfig(kd=Term(0.5), lm=Term(0.3)) and "once" not in line
    config, line = configured("--set", "curriculum.on_policy=0.5")
    assert config.curriculum == CurriculumConfig(on_policy=0.5) and "once" not in line
    config, line = configured("--set", "curriculum.lm.weight=0.1")
    assert config.curriculum == CurriculumConfig(kd=Term(0.7), lm=Term(0.1)) and "once" not in line


@pytest.mark.parametrize("reads_once", [False, True])
def test_only_a_random_student_gets_terms_on_hidden_states_unasked(reads_once):
    for beginning, states in {"trained": set(), "cut": set(), "random": STATES}.items():
        assert automatic_curriculum(beginning, reads_once=reads_once).used() == {"kd", "lm"} | states


def test_a_weight_that_is_given_stands_and_the_others_follow(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("student: {init: random}\ncurriculum: {feat: 0.2}\n")
    config, line = configured("--config", str(recipe), "--curriculum.attn", "0", "--set", "curriculum.kd.weight=0.5")
    assert config.curriculum == CurriculumConfig(kd=Term(0.5), feat=Term(0.2), attn=Term(0.0))
    assert line.endswith("as they were given: feat, attn, kd")


def test_the_word_auto_gives_no_weight_and_takes_those_of_a_recipe_away(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("student: {init: random}\ncurriculum: auto\n")
    config, _ = configured("--config", str(recipe))
    assert config.curriculum == RANDOM

    words = ["--config", "reference_curriculum", "--student-init", "random"]
    assert configured(*words)[0].curriculum != config.curriculum
    assert configured(*words, "--set", "curriculum=auto")[0].curriculum == config.curriculum
    shared = configured(*words, "--set", "curriculum=auto", "curriculum.kd=0.5")[0]
    assert shared.curriculum.kd == Term(0.5) and shared.curriculum.used() >= STATES


def test_terms_that_cannot_be_had_are_left_out_and_not_refused(tmp_path):
    random = ["--student-init", "random"]
    config, line = configured(*random, "--cache-teacher", str(tmp_path))
    assert not config.curriculum.used() & STATES and "without feat and attn" in line and "cache" in line

    # Whoever gives one means it.
    config, _ = configured(*random, "--cache-teacher", str(tmp_path), "--curriculum.feat", "1")
    assert config.curriculum.used() & STATES == {"feat"}

    config, line = configured(*random, "--set", "curriculum={kd: 0, lm: 1}")
    assert config.curriculum.used() == {"lm"} and "since kd is 0" in line

    alone, line = configured(*random, "--set", "teacher.name=null", "curriculum={kd: 0, lm: 1}")
    assert alone.curriculum.used() == {"lm"} and "no teacher" in line


def test_the_printed_configuration_has_the_weights_and_nothing_is_chosen_beside_it(tmp_path):
    config, _ = configured("--student-init", "random")
    recipe = tmp_path / "printed.yaml"
    recipe.write_text(as_yaml(to_plain(config)))
    again, origin = train.configure(["--config", str(recipe)])
    assert again == config and "\n" not in origin


def run_folder(folder, curriculum):
    """A run's folder with a checkpoint, and a config.yaml whose curriculum is this."""
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"curriculum": curriculum}))
    return ["--output-dir", str(folder), "--student-init", "random"]


def test_a_run_goes_on_with_the_weights_it_began_with(tmp_path):
    """A run that was made before weights were chosen has every weight in its config.yaml."""
    without = run_folder(tmp_path / "run", {"kd": {"weight": 0.6}, "feat": {"weight": 0.0}, "attn": {"weight": 0.0}})
    config, line = configured(*without)
    assert config.curriculum == CurriculumConfig(kd=Term(0.6))
    assert "as this run began" in line and "config.yaml" in line

    # What the command gives is compared with that run later, as before.
    assert configured(*without, "--curriculum.kd", "0.9")[0].curriculum == CurriculumConfig(kd=Term(0.9))


def test_a_new_run_in_an_old_folder_begins_anew(tmp_path):
    words = run_folder(tmp_path / "run", {"feat": {"weight": 0.0}})
    assert configured(*words, "--no-resume")[0].curriculum == RANDOM

    (tmp_path / "run" / "checkpoints" / "step-000001").rmdir()
    assert configured(*words)[0].curriculum == RANDOM
