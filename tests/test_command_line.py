"""The command line is a contract: its surface is frozen here, and every shipped recipe parses."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from models.config import Ramp
from models.curriculum import CurriculumScheduler
from utils.commands import settings as run_config
from utils.config.build import build
from utils.config.plain import to_plain
from utils.config.schema import sections_of, settings_of
from utils.config.settings import ModelConfig, TrainingConfig
from utils.config.yaml_files import find_config, load_yaml
from utils.errors import UserError
from utils.machine import hardware
from utils.pretrained import loading, locate
from utils.run import folder as run_folder
from utils.run import stages

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))

ALONE = {"--help", "--help-all", "--print-config", "--print-schema", "--no-resume"}
"""Flags that take no value."""

SWITCHES = {
    "--lora",
    "--merge-lora",
    "--without-teacher",
    "--gradient-checkpointing",
    "--build-cache-only",
    "--cache-accept-mismatch",
    "--log-term-gradients",
}
"""Short flags that mean true where they stand alone."""

TAKE_VALUES = {
    "--config",
    "--set",
    "--compare",
    "--print-completion",
    "--csv",
    "--teacher",
    "--teacher-device",
    "--teacher-tokenizer",
    "--teacher-model",
    "--student",
    "--student-init",
    "--teacher-dtype",
    "--train-data",
    "--data",
    "--eval-data",
    "--max-length",
    "--document-separator",
    "--batch-size",
    "--gradient-accumulation-steps",
    "--epochs",
    "--max-steps",
    "--learning-rate",
    "--lr",
    "--mixed-precision",
    "--seed",
    "--max-hours",
    "--temperature",
    "--top-k",
    "--cache-teacher",
    "--cache-top-k",
    "--output-dir",
    "--resume",
    "--log-every",
    "--track",
    "--eval-every",
    "--eval-tasks",
    "--eval-tasks-path",
    "--push-to-hub",
    "--save-every",
}
"""Short flags that take a value."""

ALONE_TOO = "evaluation.without_teacher=false"
"""Setting without which the quickstart needs a teacher."""

LM_ONLY = "curriculum={kd: 0, lm: 1}"

RAMP = Ramp(points=((0.0, 1.0), (1.0, 0.5)))

PAIR = ["--config", "quickstart", "--teacher", "a", "--student", "b", "--train-data", "c.txt"]


def configured(*words: str) -> train.RunConfig:
    # A second --teacher would be a teacher beside the first.
    pair = PAIR[:2] + PAIR[4:] if "--teacher" in words else PAIR
    return train.configure([*pair, *words])[0]


def refused(*words: str) -> str:
    with pytest.raises(UserError) as raised:
        configured(*words)
    return str(raised.value)


def test_the_surface_is_frozen():
    surface = {None: set(), 0: set(), "?": set()}
    for action in run_config.parser()._actions:
        flags = {option for option in action.option_strings if option.startswith("--") and "." not in option}
        surface[action.nargs if action.nargs in surface else None] |= flags
    # settings without a section: their long flags look like short ones
    shared = {"--resume-changed", "--teachers", "--mix"}
    assert surface[0] == ALONE
    assert surface["?"] - shared == SWITCHES
    assert surface[None] - shared == TAKE_VALUES


def test_every_setting_is_a_flag_with_its_default_and_its_docstring():
    text = " ".join(run_config.parser(everything=True).format_help().split())
    for key, setting in settings_of(train.RunConfig).items():
        flag = f"--{key.replace('_', '-')}"
        default = setting.default if isinstance(setting.default, str) else json.dumps(setting.default)
        assert re.search(rf"{re.escape(flag)}[ ,]", text), key
        section = sections_of(train.RunConfig).get(key.removesuffix(".weight"), setting)
        assert section.meaning and f"{section.meaning} (default: {default})" in text, key


def test_help_is_grouped_names_every_short_flag_and_says_where_the_others_are():
    text = run_config.parser().format_help()
    for group in ("recipe:", "teacher:", "student:", "data:", "training:", "loss:", "cache:", "run:"):
        assert f"\n{group}" in text
    for flag in ALONE | SWITCHES | TAKE_VALUES - {"--data"}:
        assert flag in text
    assert "--help-all" in text and "--training.weight-decay" not in text


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--student-init", "random"], "student.init", "random"),
        (["--teacher-dtype", "4bit"], "teacher.dtype", "4bit"),
        (["--lora"], "student.lora.enabled", True),
        (["--lora", "--merge-lora"], "student.lora.merge", True),
        (["--lora", "--set", "student.lora.targets=[q_proj, lm_head]"], "student.lora.targets", ["q_proj", "lm_head"]),
        (["--eval-data", "e"], "data.eval", "e"),
        (["--max-length", "64"], "data.max_length", 64),
        (["--document-separator", "---"], "data.document_separator", "---"),
        (["--document-separator", "--my_sep--"], "data.document_separator", "--my_sep--"),
        (["--document_separator", "--my_sep=--"], "data.document_separator", "--my_sep=--"),
        (["--batch-size", "3"], "training.batch_size", 3),
        (["--gradient-accumulation-steps", "5"], "training.gradient_accumulation_steps", 5),
        (["--epochs", "2"], "training.epochs", 2),
        (["--max-steps", "7"], "training.max_steps", 7),
        (["--learning-rate", "1e-5"], "training.learning_rate", 1e-5),
        (["--mixed-precision", "no"], "training.mixed_precision", "no"),
        (["--gradient-checkpointing"], "training.gradient_checkpointing", True),
        (["--seed", "9"], "training.seed", 9),
        (["--max-hours", "0.5"], "training.max_hours", 0.5),
        (["--temperature", "2"], "loss.temperature", 2.0),
        (["--top-k", "16"], "loss.top_k", 16),
        (["--output-dir", "o"], "output_dir", "o"),
        (["--resume", "path/to"], "resume", "path/to"),
        (["--no-resume"], "resume", "never"),
        (["--log-every", "11"], "logging.every", 11),
        (["--track", "tensorboard", "wandb"], "logging.track", ["tensorboard", "wandb"]),
        (["--log-term-gradients"], "logging.term_gradients", True),
        (["--eval-every", "12"], "evaluation.every", 12),
        (["--without-teacher"], "evaluation.without_teacher", True),
        (["--eval-tasks", "arc_easy", "piqa"], "evaluation.tasks", ["arc_easy", "piqa"]),
        (["--eval-tasks-path", "d"], "evaluation.tasks_path", "d"),
        (["--push-to-hub", "me/mine"], "hub.repository", "me/mine"),
        (["--save-every", "13"], "training.save_every", 13),
        (["--set", "curriculum.kd.weight=0", "curriculum.lm.weight=1"], "curriculum.kd.weight", 0.0),
        (["--teacher", "123"], "teacher.name", "123"),
        (["--set", "teacher.name=null", LM_ONLY, ALONE_TOO], "teacher.name", None),
        (["--teacher", "null", "--set", LM_ONLY, ALONE_TOO], "teacher.name", None),
        (["--lr", "1e-5"], "training.learning_rate", 1e-5),
        (["--data", "d", "e"], "data.train", ["c.txt", "d", "e"]),
        (["--data.deduplicate", "false"], "data.deduplicate", False),
        (["--data.document-start", "[A-Z]"], "data.document_start", "[A-Z]"),
        (["--training.max-steps", "1e3"], "training.max_steps", 1000),
        (["--training.max_steps", "null"], "training.max_steps", None),
        (["--training.betas", "0.8", "0.9"], "training.betas", (0.8, 0.9)),
        (["--curriculum.kd", "0.5"], "curriculum.kd.weight", 0.5),
        (["--curriculum.lm.weight", "{points: [[0, 1], [1, 0.5]]}"], "curriculum.lm.weight", RAMP),
        (["--curriculum.lm", "{points: [[0, 1], [1, 0.5]]}"], "curriculum.lm.weight", RAMP),
        (["--set", "curriculum={kd: 0.5, lm: 1e-3}"], "curriculum.lm.weight", 1e-3),
        (["--set", "curriculum={kd: 0.5, lm: {points: [[0, 1], [1, 0.5]]}}"], "curriculum.lm.weight", RAMP),
        (["--set", "teacher=other", "teacher.dtype=4bit"], "teacher.name", "other"),
        (["--set", "data=other.txt"], "data.train", ["other.txt"]),
        (["--set", "data.train=other.txt"], "data.train", ["other.txt"]),
        (["--set", "logging.track=wandb"], "logging.track", ["wandb"]),
        (["--train-data", "t\udce9xt"], "data.train", ["c.txt", "t\udce9xt"]),
    ],
)
def test_every_flag_sets_its_key(words, key, value):
    found = configured(*words)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_underscores_are_dashes_in_flags_and_stay_in_values():
    found = configured("--batch_size", "3", "--eval_data=my_file.txt", "--output-dir", "my_run")
    assert (found.training.batch_size, found.data.eval, found.output_dir) == (3, "my_file.txt", "my_run")


def test_several_sources_and_several_settings():
    found = configured("--train-data", "a", "b", "--set", "training.seed=1", "--set", "training.epochs=2")
    assert found.data.train == ["c.txt", "a", "b"] and (found.training.seed, found.training.epochs) == (1, 2)


def test_epochs_on_the_command_line_overrule_the_steps_of_a_recipe(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("student: {name: s}\nteacher: {name: t}\ndata: {train: [x]}\ntraining: {max_steps: 5}\n")
    assert train.configure(["--config", str(recipe)])[0].training.max_steps == 5
    assert train.configure(["--config", str(recipe), "--epochs", "2"])[0].training.max_steps is None
    assert train.configure(["--config", str(recipe), "--epochs", "2", "--max-steps", "3"])[0].training.max_steps == 3
    assert train.configure(["--config", str(recipe)])[0].output_dir == "runs/own"


def test_automatic_batch_size_beside_a_section_that_is_none(tmp_path):
    """A section without content is the defaults; one that is no mapping is a mistake, and told as one."""
    recipe = tmp_path / "recipe.yaml"
    beginning = "student: {name: s}\nteacher: {name: t}\ndata: {train: [x]}\n"
    recipe.write_text(f"{beginning}training:\n")
    config, _ = train.configure(["--config", str(recipe), "--batch-size", "auto"])
    defaults = TrainingConfig()
    step_windows = defaults.batch_size * defaults.gradient_accumulation_steps
    assert config.training.gradient_accumulation_steps == step_windows

    recipe.write_text(f"{beginning}training: 5\n")
    with pytest.raises(UserError, match="training"):
        train.configure(["--config", str(recipe), "--batch-size", "auto"])


def test_of_epochs_and_steps_together_the_steps_count_and_it_is_said():
    config, told = train.configure([*PAIR, "--epochs", "2", "--max-steps", "5"])
    assert config.training.max_steps == 5 and "max_steps 5 replaces epochs 2" in told
    assert "replaces" not in train.configure([*PAIR, "--max-steps", "5"])[1]


def test_a_recipe_for_toys_says_so_where_another_student_learns_by_it():
    said = "made for its own student"
    assert said in train.configure(PAIR)[1]
    for words in (["--config", "quickstart"], ["--config", "kaggle_p100", *PAIR[2:]], PAIR[2:]):
        assert said not in train.configure(words)[1]


@pytest.mark.parametrize("words", [["a", "b"], ["[a,b]"], ["[a, b]"], ["[a]", "b"]])
def test_a_list_is_words_or_in_brackets(words):
    config, _ = train.configure(["--teacher", "a", "--student", "b", "--train-data", *words, "--eval-tasks", *words])
    assert config.data.train == config.evaluation.tasks == ["a", "b"]


def test_a_list_may_have_commas_but_for_names_of_files():
    config, _ = train.configure([*PAIR, "--eval-tasks", "a,b", "--track", "aim,wandb", "--set", "data.train=a,b"])
    assert config.data.train == ["a,b"]
    assert config.evaluation.tasks == ["a", "b"] and config.logging.track == ["aim", "wandb"]


def test_an_empty_section_of_a_recipe_has_its_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("teacher: a\nstudent: b\ndata: c\ntraining:\nloss:\ncurriculum:\n  kd:\n")
    defaults, _ = train.configure(["--teacher", "a", "--student", "b", "--train-data", "c"])
    config, _ = train.configure(["--config", str(recipe), "--set", "router="])
    assert replace(config, output_dir=defaults.output_dir) == defaults


@pytest.mark.parametrize("wrong", ["data.trian=x", "data.train=3"])
def test_what_follows_from_a_mistake_is_not_another_one(wrong):
    no_text = ("--teacher", "a", "--student", "b", "--set")
    with pytest.raises(UserError) as one:
        train.configure([*no_text, wrong])
    assert str(one.value).count("  - ") == 1 and "no training data" not in str(one.value)
    with pytest.raises(UserError) as two:
        train.configure([*no_text, "loss.top_k=0"])
    assert str(two.value).count("  - ") == 2 and "no training data" in str(two.value)


def test_unknown_flags_are_all_reported_with_the_nearest_known_one():
    message = refused("--batchsize", "3", "--teachr=x", "--zzzz")
    assert "did you mean --batch-size?" in message and "did you mean --teacher?" in message and "--zzzz" in message


def test_wrong_values_of_flags_and_settings_are_reported_together():
    message = refused(
        "--batch-size", "many", "--temperature", "0", "--top-k", "0", "--set", "curriculum.kd.weight=-1", "traning.x=1"
    )
    for part in ("training.batch_size", "'many'", "temperature", "loss.top_k", "kd.weight", "traning"):
        assert part in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "curriculum.kd.weight=0", "curriculum.lm.weight=0"], "nothing to learn from"),
        (["--set", "loss.temperature={points: [[0, 2], [1, 0]]}"], "greater than 0"),
        (["--set", "teacher.name=null"], "no teacher"),
        (["--set", "student.name=null"], "no student"),
        (["--set", "data.train=[]"], "no training data"),
        (["--set", "training.patience=2", "evaluation.every=0"], "--eval-every"),
        (["--lora", "--student-init", "random"], "leave out --lora"),
        (["--merge-lora"], "give --lora too"),
        (["--lora", "--student", "quickstart"], "the embedded student has none"),
        (["--lora", "--set", "student.lora.targets=[]"], "student.lora.targets"),
        (["--teacher-dtype", "int4"], "'8bit' or '4bit'"),
        (["--no-resume", "--resume", "auto"], "contradicts"),
        (["--batch-size"], "expected one argument"),
        (["--config", "quikstart"], "did you mean quickstart"),
        (["--set", "loss.select_by=first_student", "curriculum.sample_weights=0.5"], "need the teacher everywhere"),
        (["--set", "curriculum.open_text=0.5"], "give data.order length or teacher_loss"),
        (["--set", "data.order=length"], "changes nothing while curriculum.open_text is 1"),
        (["--set", "data.order=teacher_loss", "curriculum.open_text=0.5", "teacher.name=null"], "there is no teacher"),
        (["--set", "curriculum.open_text={points: [[0, 0], [1, 1]]}"], "above 0 and at most 1"),
        (["--set", "nothing"], "dotted.key=value"),
        (["--teacher", "a", "--teacher", "null"], "--teacher null is no teacher, and cannot stand beside another one"),
    ],
)
def test_contradictions_are_refused(words, message):
    assert message in refused(*words)


def test_a_wrong_section_hides_nothing_that_was_given():
    """A student was given, by the recipe or by a flag, and so none is asked for."""
    for words in (["--merge-lora"], ["--lora", "--student-init", "random", "--student", "some/one"]):
        assert refused(*words).count("  - ") == 1 and "no student" not in refused(*words)


def test_a_mistake_in_one_of_several_teachers_is_told_alone():
    told = refused("--set", "teachers=[{name: a, weight: -1}, {name: b}]")
    assert "got the weight -1" in told and "no teacher" not in told


def test_a_wrong_value_is_told_without_what_its_default_contradicts():
    told = refused("--set", "data.order=length", "curriculum.open_text=0")
    assert "open_text is a share" in told and "changes nothing" not in told


STREAM = ("--max-steps", "9", "--train-data", "a.jsonl", "b", "--set", "data.streaming=true")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.max_steps=null"], "give --max-steps"),
        (["data.max_documents=5"], "leave it out, --max-steps ends training"),
        (["cache.folder=DIR"], "leave out --cache-teacher"),
        (["curriculum.on_policy=0.5"], "curriculum.on_policy chooses among all windows"),
        (["data.order=length"], "leave it at random"),
        (["loss.select_by=first_student"], "looks at all windows before"),
        (["teachers=[{name: c, only_for: [b]}, d]", "teacher.name=null"], "a stream mixes all text"),
        (
            ["data.mixture={a.jsonl: 1}"],
            "got weights of a.jsonl, expected one of each source of data.train: c.txt, a.jsonl, b",
        ),
        (["data.mixture={a.jsonl: 1, b: 0}"], "greater than 0"),
        (["data.streaming=false", "data.mixture={a.jsonl: 1, b: 2}"], "give --set data.streaming=true"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_with_the_remedy(words, message):
    assert message in refused(*STREAM, *words)


def test_a_mixture_has_a_weight_for_each_source():
    models = ("--teacher", "c", "--student", "d")
    config, _ = train.configure([*models, *STREAM, "data.mixture={a.jsonl: 1, b: 2.5}"])
    assert config.data.mixture == {"a.jsonl": 1, "b": 2.5}
    by_flag, _ = train.configure([*models, *STREAM[:-2], "--data.mixture", "{a.jsonl: 1, b: 2.5}", *STREAM[-2:]])
    assert by_flag == config
    assert build(train.RunConfig, to_plain(config), source="itself") == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_survives_being_written_down(recipe):
    config, _ = train.configure(["--config", recipe.stem])
    again = build(train.RunConfig, to_plain(config), source="itself")
    assert again == config and config.output_dir == f"runs/{recipe.stem}"


def test_the_reference_curriculum_is_the_reference_table():
    config = train.configure(["--config", "reference_curriculum"])[0]
    scheduler = CurriculumScheduler(config.curriculum, config.loss, 1000)
    early, middle = scheduler.weights(4), scheduler.weights(502)
    table = {"kd": (0.7, 0.7), "lm": (0.3, 0.3), "feat": (0, 0.1), "attn": (0, 0.1), "layer": (0, 0.017)}
    for name in early:
        assert (round(early[name], 3), round(middle[name], 3)) == table.get(name, (0, 0)), name
    assert scheduler.weights(None)["layer"] == pytest.approx(0.1)


@pytest.mark.parametrize("cuda", [False, True])
def test_the_default_recipe_depends_on_the_gpu_and_says_so(monkeypatch, cuda):
    choice = hardware.Choice(torch.device("cuda" if cuda else "cpu"), "the reason")
    monkeypatch.setattr(hardware, "choose_device", lambda: choice)
    config, told = train.configure([])
    assert config.teacher.name == ("Qwen/Qwen2.5-1.5B" if cuda else "quickstart")
    assert ("kaggle_p100" if cuda else "quickstart") in told and "the reason" in told


def test_short_forms_in_a_recipe_are_those_written_in_full(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "teacher: some/teacher\nstudent: some/student\ndata: text.txt\n"
        "curriculum: {kd: 1e-3, feat: {points: [[0, 0], [1, 0.5]]}}\nlogging: {track: wandb}\ntraining: {lr: 2e-3}\n"
    )

    full = tmp_path / "full.yaml"
    full.write_text(
        "teacher: {name: some/teacher}\nstudent: {name: some/student}\ndata: {train: [text.txt]}\n"
        "curriculum: {kd: {weight: 0.001}, feat: {weight: {points: [[0, 0], [1, 0.5]]}}}\nlogging: {track: [wandb]}\n"
        "training: {learning_rate: 0.002}\n"
    )

    words = ["--output-dir", "o", "--teacher-dtype", "bfloat16"]
    short = train.configure(["--config", str(recipe), *words])[0]
    assert short == train.configure(["--config", str(recipe), *words, "--set", "training.lr=2e-3"])[0]
    assert short == train.configure(["--config", str(full), *words])[0]
    assert short.teacher == ModelConfig(name="some/teacher", dtype="bfloat16")


def test_a_text_that_replaces_one_in_short_form_drops_what_describes_that_one(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("teacher: t\nstudent: s\ndata: {train: a.txt, eval: b.txt}\n")
    assert train.configure(["--config", str(recipe), "--train-data", "a.txt"])[0].data.eval == "b.txt"
    assert train.configure(["--config", str(recipe), "--train-data", "c.txt"])[0].data.eval is None


def test_the_printed_configuration_is_a_recipe_for_the_same_run(tmp_path, capsys):
    words = [*PAIR, "--lr", "1e-5", "--curriculum.lm", "{points: [[0, 1], [1, 0.5]]}", "--data", "t\udce9xt"]
    assert train.main([*words, "--print-config"]) == 0
    recipe = tmp_path / "printed.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert train.configure(["--config", str(recipe)])[0] == train.configure(words)[0]


def test_a_mistake_beside_print_config_is_named_and_nothing_is_printed(capsys):
    assert train.main([*PAIR, "--print-config", "--seed", "x"]) == 2
    assert "training.seed" in capsys.readouterr().out


def test_wrong_values_are_named_before_the_machine_is_asked_for_a_recipe(monkeypatch):
    monkeypatch.setattr(hardware, "choose_device", lambda: pytest.fail("the machine was asked"))
    with pytest.raises(UserError, match=r"2 mistakes[\s\S]*training\.weight_decay[\s\S]*training\.seed"):
        train.configure(["--seed", "x", "--training.weight-decay", "-1"])


def test_an_unknown_flag_leads_to_the_setting_of_that_name():
    message = refused("--weight-decay", "0.1", "--training.sed", "1")
    assert "did you mean --training.weight-decay?" in message and "did you mean --training.seed?" in message
    assert "0.1" not in message


def test_a_user_mistake_exits_2_with_a_message_and_no_traceback(capsys):
    assert train.main(["--batchsize", "3"]) == 2
    said = capsys.readouterr()
    assert "did you mean --batch-size?" in said.out + said.err
    assert "Traceback" not in said.out + said.err


def test_help_exits_0(capsys):
    with pytest.raises(SystemExit) as left:
        train.main(["--help"])
    assert left.value.code == 0 and "--gradient-accumulation-steps" in capsys.readouterr().out


# ------------------------------------------------------------------ found before anything is loaded


def test_a_file_where_the_folder_should_be_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert train.main([*PAIR, "--output-dir", str(tmp_path / "file" / "run")]) == 2
    assert "is a file" in capsys.readouterr().out


def test_a_cache_that_cannot_be_made_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(stages, "prepare", lambda *_: pytest.fail("text and tokenizers were loaded"))
    run = [*PAIR, "--output-dir", str(tmp_path / "run"), "--cache-teacher"]
    for cache in ("file", "file/cache"):
        assert train.main([*run, str(tmp_path / cache)]) == 2
        assert "is a file" in capsys.readouterr().out
    monkeypatch.setattr(run_folder.os, "access", lambda *_: False)
    assert train.main([*run, str(tmp_path / "cache")]) == 2
    assert "cannot be written to" in capsys.readouterr().out and not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()
    there = to_plain(configured("--cache-teacher", str(tmp_path)))
    run_folder.check(tmp_path / "run", there, "auto")  # a cache that is there may be read-only


def test_the_folder_of_a_run_with_other_settings_is_refused_with_what_differs(tmp_path, capsys):
    config = configured("--output-dir", str(tmp_path))
    run_folder.write_config(tmp_path, to_plain(config), {})
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert load_yaml(tmp_path / "config.yaml") == to_plain(config)
    assert train.main([*PAIR, "--output-dir", str(tmp_path), "--seed", "5"]) == 2
    said = capsys.readouterr().out
    assert f"training.seed: {config.training.seed} -> 5" in said and "--output-dir" in said
    assert train.main([*PAIR, "--output-dir", str(tmp_path), "--no-resume"]) == 2
    assert "--resume auto" in capsys.readouterr().out


def test_settings_that_change_nothing_may_differ_on_resume(tmp_path):
    config = configured("--output-dir", str(tmp_path))
    run_folder.write_config(tmp_path, to_plain(config), {})
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    other = replace(config, training=replace(config.training, save_every=7, max_hours=1.0), resume="x")
    run_folder.check(tmp_path, to_plain(other), "auto")


def test_what_weighs_the_loss_may_change_on_resume_if_that_is_asked_for(tmp_path, caplog):
    output = ("--output-dir", str(tmp_path))
    run_folder.write_config(tmp_path, to_plain(configured(*output)), {})
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    other = (*output, "--set", "curriculum.kd.weight=0.123", "loss.top_k=7")
    with pytest.raises(UserError, match=r"curriculum\.kd\.weight: .* -> 0\.123[\s\S]*--set resume_changed=true"):
        run_folder.check(tmp_path, to_plain(configured(*other)), "auto")
    run_folder.check(tmp_path, to_plain(configured(*other, "resume_changed=true")), "auto")
    assert "loss.top_k: " in caplog.text and "as asked for" in caplog.text
    with pytest.raises(UserError, match=r"training\.seed: ") as raised:
        run_folder.check(tmp_path, to_plain(configured(*other, "resume_changed=true", "training.seed=9")), "auto")
    assert "resume_changed" not in str(raised.value)


@pytest.mark.parametrize("weight", ["0.1", "{points: [[0, 0], [1, 0.1]]}"])
def test_the_micro_batch_may_change_on_resume_unless_a_term_depends_on_it(tmp_path, weight):
    """`contr` compares with what is in the same micro-batch."""
    output = ("--output-dir", str(tmp_path), "--batch-size", "4", "--gradient-accumulation-steps", "2")
    halved = ("--batch-size", "2", "--gradient-accumulation-steps", "4")
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    run_folder.write_config(tmp_path, to_plain(configured(*output)), {})
    run_folder.check(tmp_path, to_plain(configured(*output, *halved)), "auto")
    contrast = ("--set", f"curriculum.contr.weight={weight}")
    run_folder.write_config(tmp_path, to_plain(configured(*output, *contrast)), {})
    run_folder.check(tmp_path, to_plain(configured(*output, *contrast)), "auto")
    with pytest.raises(UserError, match=r"batch_size: 4 -> 2\n.*accumulation_steps: 2 -> 4"):
        run_folder.check(tmp_path, to_plain(configured(*output, *halved, *contrast)), "auto")


@pytest.mark.parametrize("setting", ["data.eval=other.txt", "data.eval_fraction=0.3", "evaluation.max_windows=9"])
def test_what_is_measured_on_may_not_change_on_resume(tmp_path, setting):
    output = ("--output-dir", str(tmp_path))
    run_folder.write_config(tmp_path, to_plain(configured(*output)), {})
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    other = configured(*output, "--set", setting, "evaluation.every=7", "evaluation.samples=1")
    with pytest.raises(UserError, match=setting.partition("=")[0]) as raised:
        run_folder.check(tmp_path, to_plain(other), "auto")
    assert "evaluation.every" not in str(raised.value) and "samples" not in str(raised.value)


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such/folder", "./none"])
def test_a_missing_model_folder_is_named_with_ways_to_attach_it(name):
    with pytest.raises(UserError, match=re.escape(name)) as raised:
        loading.load_tokenizer(name, "teacher")
    assert "/kaggle/input" in str(raised.value)


def test_an_unreachable_model_is_one_message(monkeypatch):
    monkeypatch.setattr(loading, "hub_is_reachable", lambda: False)
    with pytest.raises(UserError, match=r"Qwen/Qwen2\.5-1\.5B") as raised:
        loading.load_config("Qwen/Qwen2.5-1.5B", "teacher")
    assert "HF_HUB_OFFLINE" in str(raised.value)


def test_models_that_cannot_be_reached_are_one_message_that_names_both(monkeypatch):
    monkeypatch.setattr(loading, "hub_is_reachable", lambda: False)
    with pytest.raises(UserError) as raised:
        loading.load_each(loading.load_tokenizer, {"student": "own/small", "teacher": "own/large"})
    message = str(raised.value)
    assert "student own/small" in message and "teacher own/large" in message
    assert message.count("To attach a model") == 1


def test_an_attached_model_is_found_below_its_folder_and_by_the_name_of_a_hub_id(tmp_path, monkeypatch):
    model = tmp_path / "Qwen2.5-1.5B"
    (model / "transformers" / "1").mkdir(parents=True)
    (model / "transformers" / "1" / "config.json").write_text("{}")
    assert locate.locate(str(model), "teacher") == str(model / "transformers" / "1")
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(locate, "ATTACHED", tmp_path)
    assert locate.locate("Qwen/qwen2.5-1.5b", "teacher") == str(model)
    shutil.rmtree(model / "transformers")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds 2 models"):
        locate.locate(str(tmp_path), "teacher")


def test_a_model_that_needs_its_own_code_is_refused_and_the_code_never_runs(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}')
    (tmp_path / "own.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(UserError, match="never run"):
        loading.load_config(str(tmp_path), "teacher")


def test_a_folder_without_weights_says_how_to_start_at_random(tmp_path):
    from transformers import LlamaConfig

    shape = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    LlamaConfig(**shape, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--student-init random"):
        loading.load_model(str(tmp_path), "student", torch.float32)
    model = loading.random_model(loading.load_config(str(tmp_path), "student"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_recipe_is_found_for_every_name_the_help_mentions():
    told = " ".join(run_config.parser().format_help().split())
    for name in re.findall(r"default: (\w+) without a GPU, (\w+) with one", told)[0]:
        assert find_config(name).is_file()


@pytest.mark.parametrize(
    "flag",
    [
        "--train-data",
        "--student",
        "--teacher",
        "--output-dir",
        "--cache-teacher",
        "--eval-data",
        "--config",
        "--compare",
    ],
)
@pytest.mark.parametrize("word", ["", " "])
def test_an_empty_word_behind_a_flag_is_refused_by_the_name_of_the_flag(flag, word):
    with pytest.raises(UserError, match=f"got nothing behind {flag}: an empty word"):
        train.configure([flag, word])


def test_every_flag_with_an_empty_word_is_named_and_the_empty_separator_is_one():
    with pytest.raises(UserError, match="behind --student, --train-data:"):
        train.configure(["--train-data", "a", "", "--student", ""])
    words = [*PAIR, "--document-separator", ""]
    assert train.configure(words)[0].data.document_separator == ""


@pytest.mark.parametrize(
    "key", ["teacher.name", "student.name", "data.eval", "cache.folder", "evaluation.tasks_path", "output_dir"]
)
def test_an_empty_name_in_a_recipe_is_refused_by_its_key(key):
    with pytest.raises(UserError, match=f"{key}: got '', expected a name that is not empty"):
        train.configure([*PAIR, "--set", f"{key}=''"])
