"""Every command line of train.py in README and docs/, and every flag that they quote with its value, runs.

In this process, for two steps, with tiny models, texts and folders in place of those that are named. What cannot run
on one machine without network and GPU is in `PARSED_ONLY`, with what it needs, and is configured only.
"""

import importlib
import io
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoConfig, AutoModelForCausalLM

import train
from benchmarks import memory_forecast
from tests.faults.conftest import Place, documents, write_jsonl
from tests.test_docs import BENCHMARK, PROSE
from utils.commands import settings as run_config
from utils.config import command_line
from utils.config.yaml_files import load_yaml
from utils.forecast import step_memory
from utils.logs.records import read_metrics
from utils.report import report

ROOT = Path(__file__).resolve().parents[2]
NOT_HERE = ("settings.md", "paths.md")
"""The page made of the settings, where a flag stands for a name and not for a command; and that of test_paths.py."""
OTHERS = ("--data DIR",)
"""Flags of other commands that train.py has too, with another meaning."""
TEXT = {
    page.name: prose.replace("\\\n", " ").replace("\\|", "|")
    for page, prose in PROSE.items()
    if page.name not in NOT_HERE
}
LINE = re.compile(r"((?:python|accelerate launch|torchrun)(?: [^`\n]*?)?) ?train\.py((?: [^`\n#]+)?)")
QUOTED_FLAG = re.compile(r"`(--[a-z.-]+(?: [^`\n]+)?)`")
TRAINS_NOTHING = ("--help", "--compare", "--csv", "--print-", "chat")
PARSED_ONLY = {
    "accelerate launch": "several GPUs",
    "torchrun": "several processes; test_processes.py starts it in this way",
    "--teacher-device spread": "two GPUs; a teacher that is spread over CPU and disk is in test_teachers.py",
    "--teacher-dtype 4bit": "a GPU",
    "--teacher-dtype 8bit": "a GPU",
    "--set student.lora.base=4bit": "a GPU",
    "--eval-tasks": "data sets from the network; local tasks are run in test_taking_away.py",
    "--push-to-hub": "the network; a hub that answers is in test_hub.py",
    "--track tensorboard wandb": "an account; TensorBoard alone is run in test_tracking.py",
    ".gguf": "a model of that format; test_gguf_files.py reads one",
    "--teacher http": "a server; test_served_teacher.py asks one",
    "--teacher captures": "captures; test_captures.py learns from some",
    "--resume /kaggle": "a checkpoint on Kaggle; test_notebook.py continues from one in such a folder",
}
"""What a command has in it -> what it needs that is not here."""
ASKS_FOR = {
    "--merge-lora": "--lora",
    "--set student.lora.base": "--lora",
    "--build-cache-only": "--cache-teacher DIR",
    "--cache-top-k": "--cache-teacher DIR",
    "--cache-accept-mismatch": "--cache-teacher DIR",
    "--set data.learn_from": "--train-data CONVERSATIONS",
    "--teacher http://HOST:PORT/v1": "--teacher-tokenizer ID",
    "--teacher captures:DIR": "--teacher-tokenizer ID",
}
"""Flag -> without which it is refused or does nothing; added where it is quoted alone."""
PLACEHOLDERS = ("NAME", "PATH", "KEY=VALUE")
SMALL = ["--max-steps", "2", "--set", "evaluation.max_windows=4", "evaluation.samples=1", "evaluation.new_tokens=4"]
SMALL += ["evaluation.generation=2"]


def alternatives(words: str) -> list[str]:
    """`--a x|y [--b]` -> with either value, without and with the flag in brackets; a list in a value stays one."""
    parts = re.split(r"\[(--[^]]*)\]", words)
    ways = [[" " + way for way in either(part)] + ([""] if i % 2 else []) for i, part in enumerate(parts)]
    return [" ".join(" ".join(way).split()) for way in product(*ways)]


def either(words: str) -> list[str]:
    return [" ".join(way) for way in product(*(word.split("|") for word in words.split()))] or [""]


def commands() -> list[tuple[str, str, str]]:
    """(page, what starts it, arguments) of every line, once; a quoted flag with its value takes the place of a line."""
    found = [(page, starter.strip(), words) for page, text in TEXT.items() for starter, words in LINE.findall(text)]
    takes = {o: action.nargs not in (0, "?") for action in run_config.parser()._actions for o in action.option_strings}
    for page, text in TEXT.items():
        for flag in QUOTED_FLAG.findall(text):
            name, *values = flag.split()
            if name in takes and bool(values) == takes[name] and flag not in OTHERS:
                found.append((page, "python", f"... {flag}"))
    once = {(starter, way): page for page, starter, words in found for way in alternatives(words)}
    return [(page, *command) for command, page in once.items() if not {*command[1].split()} & {*PLACEHOLDERS}]


COMMANDS = commands()
TRAINING = [c for c in COMMANDS if not any(word.startswith(TRAINS_NOTHING) for word in c[2].split())]
RUN = [c for c in TRAINING if not any(part in f"{c[1]} {c[2]}" for part in PARSED_ONLY)]


def each(some: list[tuple[str, str, str]]) -> pytest.MarkDecorator:
    names = [f"{page}: {starter} {words}"[:100] for page, starter, words in some]
    return pytest.mark.parametrize(("page", "starter", "words"), some, ids=names)


@dataclass(frozen=True)
class Toys:
    """Stand-ins of toy size for the models, texts and recipes that the documents name."""

    place: Place
    student: Path
    """With weights."""
    text: Path
    """In the form of Wikitext: articles in rows, the first of which is a title."""
    evaluation: Path

    conversations: Path

    def recipe(self, path: Path) -> dict:
        """Return a recipe's settings; a shipped one gets the toy models and texts, and no mixed precision."""
        values = load_yaml(path)
        if path.parent == ROOT / "configs":
            values["teacher"]["name"], values["student"]["name"] = str(self.place.teacher), str(self.student)
            values["data"]["train"] = [str(self.text)]
            values["data"] |= {"eval": str(self.evaluation)} if "eval" in values["data"] else {}
            values["training"]["mixed_precision"] = "no"
        return values

    def arguments(self, words: str, folder: Path) -> list[str]:
        """The words with what is here in place of what they name, and an end after two steps."""
        words = " ".join([words, *(more for flag, more in ASKS_FOR.items() if flag in words and more not in words)])
        line = {"--config": self.place.recipe, "--student": self.student, "--student-init": "pretrained"}

        for name, toy in {
            r"(--teacher) (?!captures:)\S+": self.place.teacher,
            r"(--teacher-tokenizer) \S+": self.place.teacher,
            r"(--student) \S+": self.student,
            r"(--train-data) CONVERSATIONS": self.conversations,
            r"(--train-data) (?!/)\S+": self.text,
            r"(--cache-teacher) DIR": folder / "cache",
            r"(--max-hours) H": 1,
            r"(--teacher-device) cuda:[01]": "cpu",
            r"(--student-init) layers:\d+": "layers:1",
        }.items():
            words = re.sub(name, rf"\1 {toy}", words)

        words = re.sub(r"^\.\.\.(?= |$)", " ".join(f"{flag} {value}" for flag, value in line.items()), words)
        return [*shlex.split(words), "--output-dir", str(folder / "run"), *SMALL]


@pytest.fixture(scope="module")
def toys(place, tmp_path_factory) -> Toys:
    folder = tmp_path_factory.mktemp("toys")
    shutil.copytree(place.student, folder / "student")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place.student)).save_pretrained(folder / "student")
    articles = [row for text in documents(90, seed=1) for row in (" = The river = \n", text)]
    evaluation = [row for text in documents(9, seed=2) for row in (" = The stone = \n", text)]
    turns = [json.dumps({"prompt": text[:40], "completion": text[40:]}) for text in documents(90)]
    (folder / "conversations.jsonl").write_text("\n".join(turns), encoding="utf-8")
    return Toys(
        place,
        folder / "student",
        write_jsonl(folder / "text.jsonl", articles),
        write_jsonl(folder / "evaluation.jsonl", evaluation),
        folder / "conversations.jsonl",
    )


@pytest.fixture(scope="module")
def measured_once():
    """Measure memory, which takes most of a run here, once for equal settings; leave out the pictures."""
    known: dict[str, step_memory.Body] = {}

    def measure_body(config, *settings) -> step_memory.Body:
        key = f"{config.to_json_string()} {settings}"
        known[key] = known[key] if key in known else original(config, *settings)
        return known[key]

    original = step_memory.measure_body
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_memory, "measure_body", measure_body)
        patch.setattr(report, "draw_curves", lambda *_: None)
        patch.setattr(report, "curves_as_svg", lambda *_: [])
        yield


@pytest.fixture
def at_toy_size(toys, measured_once, tmp_path, monkeypatch) -> Toys:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "load_yaml", toys.recipe)
    return toys


@each(RUN)
def test_it_runs(page, starter, words, at_toy_size, tmp_path):
    if "lora" in words:
        pytest.importorskip("peft", reason="peft is not installed: pip install -e .[peft]")
    assert train.main(at_toy_size.arguments(words, tmp_path)) == 0
    if "--build-cache-only" in words:
        assert (tmp_path / "cache" / "manifest.json").is_file() and not (tmp_path / "run" / "student").exists()
    else:
        records = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert max(record["step"] for record in records if "terms" in record) == 2
        assert (tmp_path / "run" / "student" / "config.json").is_file() or "--lora" in words


@each([c for c in TRAINING if c not in RUN])
def test_what_cannot_run_here_is_accepted(page, starter, words, at_toy_size, tmp_path):
    train.configure(at_toy_size.arguments(words, tmp_path))
    if starter.startswith("accelerate launch"):
        asked = launch_command_parser().parse_args([*starter.split()[2:], "train.py"])
        assert asked.config_file is None or load_config_from_file(str(ROOT / asked.config_file)).num_processes >= 2


def test_runs_are_compared(at_toy_size, tmp_path, capsys):
    (words,) = (words for _, _, words in COMMANDS if words.startswith("--compare"))
    for folder in words.split()[1:]:
        assert train.main([*at_toy_size.arguments("...", tmp_path), "--output-dir", folder]) == 0
    assert train.main(words.split()) == 0
    assert (tmp_path / "comparison.png").is_file()


def test_a_chat_answers_the_lines_of_a_pipe(at_toy_size, tmp_path, capsys, monkeypatch):
    (words,) = (words for _, _, words in COMMANDS if words.startswith("chat runs/quickstart"))
    assert train.main([*at_toy_size.arguments("...", tmp_path), "--output-dir", words.split()[1]]) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time\n"))
    assert train.main([*words.split(), "--new-tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert "Student: " in shown and "Teacher: " in shown


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as left:
        train.main(["--help"])
    assert left.value.code == 0 and "--teacher-device" in capsys.readouterr().out


def test_every_reason_not_to_run_is_one_of_a_command():
    told = [f"{starter} {words}" for _, starter, words in TRAINING]
    assert all(any(part in command for command in told) for part in PARSED_ONLY)


def test_the_checklist_is_documented_as_it_is_tested():
    """`tests/test_verify_fixes.py` runs it without a word, and with the flags of a run."""
    lines = [line for text in TEXT.values() for line in re.findall(r"python verify_fixes\.py([^`\n#]*)", text)]
    assert len(lines) >= 3 and not "".join(lines).strip()


TINY = {
    "alignment": "--teacher {place.teacher} --student {place.student} --text {place.text}",
    "memory_forecast": "",
    "step_time": "--shape tiny --teacher-vocabulary 3000 --student-vocabulary 1000 --length 32 --repeats 1",
    "top_k": "--rows 4 --vocabulary 3000 --top-k 8 --repeats 1",
}
"""Benchmark -> flags that make it small. The others take minutes, real models or several processes at any size."""
SLOW = {"step_time": [pytest.mark.slow]}  # its forecast is of full models, however small what it measures
MEASURED = dict.fromkeys((name, words.strip()) for text in TEXT.values() for name, words in BENCHMARK.findall(text))


@pytest.mark.parametrize(
    ("name", "words"), [pytest.param(*call, marks=SLOW.get(call[0], ())) for call in MEASURED if call[0] in TINY]
)
def test_a_small_benchmark_runs(name, words, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory_forecast, "ROWS", memory_forecast.ROWS[:1])
    words = words.replace("--picture FILE", "--picture drawn.svg")
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(words), *shlex.split(TINY[name].format(place=place))])
    importlib.import_module(f"benchmarks.{name}").main()
    assert "|" in capsys.readouterr().out
