"""The five paths of docs/paths.md, walked from install to report: every command, snippet and shown line of the page.

Models, texts and conversations stand under the names that the page uses; only lengths and recipes are those of toys.
What needs a network (git, pip, make) is checked by its words.
"""

import configparser
import io
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from transformers import AutoConfig, AutoModelForCausalLM

import train
import verify_fixes
from tests.faults.conftest import Place, documents, write_jsonl
from tests.faults.test_documented_commands import SMALL, at_toy_size, measured_once, toys  # noqa: F401  (fixtures)
from utils.commands import checks
from utils.machine import packages
from utils.pretrained import locate

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "paths.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
MODELS = {
    "Qwen/Qwen2.5-1.5B": "teacher",
    "Qwen/Qwen2.5-1.5B-Instruct": "teacher",
    "HuggingFaceTB/SmolLM2-360M": "student",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "student",
    "HuggingFaceTB/SmolLM2-135M": "student",
}
"""Name on the page -> role of the toy that stands there."""
TOY_SIZE = [*SMALL, "training.batch_size=8", "training.gradient_accumulation_steps=1", "data.max_length=64"]
"""What makes a run small, behind the words of the page."""
SHORT = {"max_windows": 4, "new_tokens": 4, "generation": 2, "samples": 1}
"""What makes an evaluation small, in Python."""
LINES_OF_BASH = 'command_not_found_handle() { printf "%s\\x1f" "$@"; echo; }\ncd() { printf "cd\\n"; }\n.() { cd; }\n'
"""Functions with which bash writes a command in place of running it: words, and a mark behind each."""


@dataclass(frozen=True)
class Block:
    """A block of code of the page."""

    language: str
    code: str


def path(heading: str) -> list[Block]:
    """Return the blocks below a heading of the page."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [Block(language, textwrap.dedent(code)) for language, code in BLOCK.findall(section)]


def commands(block: Block) -> list[list[str]]:
    """Return the words of every command of a block, as bash expands them: loops, variables, braces, quotes."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed: it reads the commands of the page")
    environment = {"PATH": "/nowhere"}
    shown = subprocess.run(
        [bash, "--norc", "-c", LINES_OF_BASH + block.code], env=environment, capture_output=True, text=True, check=True
    )
    return [line.rstrip("\x1f").split("\x1f") for line in shown.stdout.splitlines()]


# --------------------------------------------------------------------------- the words of each program


def git(words: list[str]) -> None:
    assert words[:2] == ["clone", "ADDRESS"]


def make(words: list[str]) -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition(f"\n{words[0]}: ")[2].partition("\n\n")[0]
    assert f"$(PYTHON) {first_example()}" in recipe


def first_example() -> str:
    """Return the command that the page says `make train` runs."""
    (line,) = [block.code for block in path("A laptop with a CPU") if block.code.startswith("python train.py --batch")]
    return line.strip().removeprefix("python ")


def pip(words: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    requirements = setup["options"]["install_requires"].split()

    if words[0] == "download":
        demands = [word for word in words if ">" in word]
        assert demands and {*demands} <= {*requirements}
    else:
        assert words[0] == "install"
        projects = (".", "./curriculum-distillation")
        names = [Requirement(line).name for line in requirements]
        assert all(word in projects or word in names for word in words[1:])


def remove(words: list[str]) -> None:
    """`rm` leaves the torch of the notebook alone: the wheels that pip brings along with it go."""
    assert words[0] == "-f" and "wheels/torch-*" in words


def python(words: list[str]) -> None:
    program, *arguments = words
    if program == "verify_fixes.py":
        assert verify_fixes.main(arguments) == 0
        return

    assert program == "train.py"
    trains_nothing = arguments[0] in ("--compare", "chat")
    assert train.main(arguments if trains_nothing else [*arguments, *TOY_SIZE]) == 0


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "git": git,
    "pip": pip,
    "rm": remove,
    "make": make,
    "python": python,
    "cd": lambda _: None,
}


def run(block: Block) -> list[list[str]]:
    """Run the commands of a block, and return them."""
    done = commands(block)
    for program, *words in done:
        PROGRAMS[program](words)
    return done


def assert_shown(block: Block, output: str) -> None:
    """Check that every line which the page shows is in an output, but for its figures and what dots stand for."""
    flat = " ".join(output.split())
    for line in block.code.splitlines():
        pattern = re.escape(" ".join(line.split())).replace(re.escape("..."), ".*?")
        pattern = re.sub(r"\d[\d,]*(\\\.\d+)?", r"[\\d.,]+", pattern)
        assert re.search(pattern, flat), f"not shown: {line}\n{output}"


# ------------------------------------------------------------------------------------------- the paths


@pytest.fixture(scope="module")
def home(place: Place, tmp_path_factory) -> Path:
    """Models, a text and conversations, in a folder that commands are typed in."""
    folder = tmp_path_factory.mktemp("home")
    for name, role in MODELS.items():
        target = folder / name
        shutil.copytree(getattr(place, role), target)
        # the page asks for no length, so that windows have the default one
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        (target / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}), encoding="utf-8")
        if not (target / "model.safetensors").exists():
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target)).save_pretrained(target)

    write_jsonl(folder / "my_texts.jsonl", documents(90))
    form = json.loads(next(block.code for block in path("Chat files") if block.language == "json"))
    chats = []
    for text in documents(90):
        question, answer = ({**message} for message in form["messages"])
        question["content"], answer["content"] = text[:40], text[40:]
        chats.append(json.dumps({"messages": [question, answer]}))
    (folder / "chats.jsonl").write_text("\n".join(chats), encoding="utf-8")
    return folder


@pytest.fixture
def at_home(home, at_toy_size, monkeypatch) -> Iterator[Path]:  # noqa: F811
    """That folder as the working one, without what was trained in it before."""
    monkeypatch.chdir(home)
    yield home
    shutil.rmtree(home / "runs", ignore_errors=True)


def assert_reported(folder: Path) -> None:
    """Check that a run ended with its report and a student to take away."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Distilled student" in page
    assert (folder / "student" / "model.safetensors").is_file()


NOTEBOOK = ROOT / "notebooks" / "kaggle_distillation.ipynb"


def cell(tag: str) -> str:
    """Return the source of the notebook's cell with a tag."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    (source,) = ["".join(cell["source"]) for cell in cells if tag in cell["metadata"].get("tags", ())]
    return source


def attach(home: Path, inputs: Path) -> None:
    """Lay out the inputs of a notebook on Kaggle: the project, a text, wheels, and models as Kaggle files them."""
    (inputs / "curriculum-distillation").mkdir(parents=True)
    (inputs / "curriculum-distillation" / "verify_fixes.py").touch()
    (inputs / "my-texts").mkdir()
    shutil.copy(home / "my_texts.jsonl", inputs / "my-texts")
    (inputs / "wheels").mkdir()
    (inputs / "wheels" / "transformers-9.0-py3-none-any.whl").touch()
    shutil.copytree(home / "Qwen/Qwen2.5-1.5B", inputs / "qwen2.5/transformers/1.5b/1")
    shutil.copytree(home / "HuggingFaceTB/SmolLM2-360M", inputs / "smollm2/transformers/360m/1")


def test_kaggle_without_internet(home, measured_once, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The notebook's cells, in a folder of their own; the whole of it is run by tests/test_notebook.py."""
    transforming = pytest.importorskip("IPython.core.inputtransformer2", reason="pip install -e .[test]")
    as_python = transforming.TransformerManager().transform_cell
    fetch, filled_in, shown = path("Kaggle without internet")
    run(fetch)
    inputs = tmp_path / "input"
    attach(home, inputs)
    monkeypatch.setattr(locate, "ATTACHED", inputs)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)

    # transformers is too old, and pip has nothing but the attached wheels
    old = [replace(p, version="4.9") if p.name == "transformers" else p for p in packages.installed_packages()]
    monkeypatch.setattr(packages, "installed_packages", lambda: old)
    calls: list[list[str]] = []
    pip_succeeds = SimpleNamespace(run=lambda call: calls.append(call) or SimpleNamespace(returncode=0))
    monkeypatch.setattr(packages, "subprocess", pip_succeeds)

    scope: dict[str, Any] = {}
    exec(cell("parameters"), scope)
    exec(filled_in.code.replace("/kaggle/input", str(inputs)), scope)
    scope |= {"INPUTS": str(inputs)}
    scope["SETTINGS"] |= {"max_steps": 2, "batch_size": 8, "max_length": 64, "evaluation": SHORT}
    exec(cell("project"), scope)
    exec(cell("packages"), scope)
    exec("from utils.commands.api import distil", scope)  # as the cell of the checks does, which runs a program
    for tag in ("resume", "train", "report", "curves", "export"):
        exec(as_python(cell(tag)), scope)

    ((_, *pip_words),) = calls
    assert {"--no-index", f"--find-links={inputs / 'wheels'}"} <= {*pip_words}
    assert_shown(
        shown, capsys.readouterr().out.replace(str(inputs), "/kaggle/input").replace(str(tmp_path), "/kaggle/working")
    )
    assert_reported(scope["OUTPUT"])


def test_settings_are_compared_over_seeds(at_home, capsys):
    recipe, install, shown = path("Settings compared over seeds")
    (at_home / "pair.yaml").write_text(recipe.code, encoding="utf-8")
    done = run(install)
    folders = [words[words.index("--output-dir") + 1] for words in done if "--output-dir" in words]
    assert len({*folders}) == len(folders) == 6
    for folder in folders:
        assert_reported(at_home / folder)
    assert_shown(shown, capsys.readouterr().out)
    assert (at_home / "comparison.png").is_file() and "distilled-1" in (at_home / "comparison.md").read_text()


def test_a_run_is_done_from_python(at_home, as_installed, capsys, monkeypatch):
    install, program, shown, student = path("A run from Python")
    run(install)
    in_size = {
        "max_steps": 2,
        "batch_size": 8,
        "max_length": 64,
        "gradient_accumulation_steps": 1,
        "evaluation": SHORT,
    }
    package = sys.modules["curriculum_distillation"]
    whole = package.distil
    monkeypatch.setattr(
        package, "distil", lambda *words, **settings: whole(*words, **settings | in_size), raising=False
    )

    scope: dict[str, Any] = {}
    exec(program.code, scope)
    assert_shown(shown, capsys.readouterr().out)
    assert_reported(at_home / "runs" / "mine")
    exec(student.code, scope)
    assert len(scope["tokenizer"]) == scope["student"].config.vocab_size


def test_chats_are_checked_learned_and_continued(at_home, capsys, monkeypatch, tmp_path):
    form, commands_of_path, shown = path("Chat files")
    assert json.loads(form.code)["messages"][-1]["role"] == "assistant"
    monkeypatch.setattr(checks, "TINY", ())  # they check this project, not what is typed
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where do owls live?\n"))
    done = run(commands_of_path)
    assert done[-1] == ["python", "train.py", "chat", "runs/chat"]
    output = capsys.readouterr().out
    assert_shown(shown, output)
    assert "Student: " in output and "Teacher: " in output
    assert_reported(at_home / "runs" / "chat")


def test_a_laptop_runs_the_first_example_and_then_models_of_its_own(at_home, capsys):
    blocks = path("A laptop with a CPU")
    install, example, shown, own = blocks
    run(install)
    run(example)
    assert_reported(at_home / "runs" / "quickstart")
    assert_shown(shown, capsys.readouterr().out)
    run(own)
    assert_reported(at_home / "runs" / "mine")
