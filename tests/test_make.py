"""`make train` and `make test` on a machine with nothing but Python: which build of torch, and what is done again."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPU, OLD, NEW = (f"https://download.pytorch.org/whl/{build}" for build in ("cpu", "cu126", "cu128"))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install_torch, make_venv, changed_tests = map(script, ("install_torch", "make_venv", "changed_tests"))


@pytest.mark.parametrize(
    ("system", "capabilities", "index"),
    [
        ("Linux", None, CPU),
        ("Linux", [6.0], OLD),
        ("Linux", [7.0], OLD),
        ("Linux", [9.0, 6.1], OLD),
        ("Linux", [7.5, 7.5], None),
        ("Linux", [12.0], None),
        ("Linux", [], None),
        ("Windows", None, None),
        ("Windows", [8.9], NEW),
        ("Windows", [6.1], OLD),
        ("Darwin", None, None),
    ],
)
def test_the_build_of_torch_follows_the_machine(system, capabilities, index):
    assert install_torch.choose(system, capabilities).index == index


@pytest.mark.parametrize(
    ("answers", "capabilities"),
    [
        ({"-L": "exit 9"}, None),
        ({"-L": "true"}, None),
        ({"-L": "echo GPU 0: P100", "--query-gpu=compute_cap": "echo 6.0"}, [6.0]),
        ({"-L": "echo GPU 0: T4", "--query-gpu=compute_cap": "echo 7.5; echo 7.5"}, [7.5, 7.5]),
        ({"-L": "echo GPU 0: K80", "--query-gpu=compute_cap": "echo not a valid field; exit 2"}, []),
    ],
    ids=["no driver", "no GPU", "P100", "two T4", "a driver that does not tell"],
)
def test_gpus_are_counted_by_what_nvidia_smi_says(tmp_path, monkeypatch, answers, capabilities):
    cases = "\n".join(f"{argument}) {answer};;" for argument, answer in answers.items())
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncase "$1" in\n{cases}\nesac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert install_torch.compute_capabilities() == capabilities


@pytest.fixture
def installed(monkeypatch) -> list[str | None]:
    """The indexes that pip was asked for; PyTorch's own has nothing."""
    indexes = []

    def install(requirement: str, index: str | None) -> int:
        indexes.append(index)
        return 0 if index is None else 1

    monkeypatch.setattr(install_torch, "install", install)
    monkeypatch.setattr(install_torch, "is_installed", lambda requirement: False)
    monkeypatch.setattr(install_torch.platform, "system", lambda: "Linux")
    monkeypatch.setattr(install_torch, "compute_capabilities", lambda: None)
    return indexes


@pytest.mark.parametrize(("reachable", "indexes"), [(False, [None]), (True, [CPU, None])])
def test_where_pytorchs_index_does_not_serve_that_of_pip_does_and_it_is_said(
    installed, monkeypatch, capsys, reachable, indexes
):
    monkeypatch.setattr(install_torch, "is_reachable", lambda index: reachable)
    assert install_torch.main([]) == 0
    assert installed == indexes
    assert f"{CPU} did not serve" in capsys.readouterr().out


def test_an_index_that_was_asked_for_is_not_replaced(installed):
    assert install_torch.main(["https://mirror.example/simple"]) == 1
    assert installed == ["https://mirror.example/simple"]


def test_the_version_that_is_there_stays_whatever_its_build(installed, monkeypatch):
    monkeypatch.undo()
    version = install_torch.pinned().partition("==")[2]
    monkeypatch.setattr(install_torch.importlib.metadata, "version", lambda name: f"{version}+cu126")
    monkeypatch.setattr(install_torch, "install", lambda *_: pytest.fail("installed again"))
    assert install_torch.main([]) == 0


def test_an_index_that_is_not_there_is_not_waited_for():
    assert not install_torch.is_reachable("http://127.0.0.1:9")


def test_a_python_that_is_too_old_is_told_with_the_way_out():
    assert "BASE_PYTHON=" in make_venv.problem_with((3, 9))
    assert make_venv.problem_with((3, 10)) is None


def test_a_python_without_venv_is_told_and_leaves_nothing_half_made(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nmkdir "$3"\necho ensurepip is not available\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    problem = make_venv.make(str(tmp_path / "venv"))
    assert "ensurepip is not available" in problem and "-venv" in problem
    assert not (tmp_path / "venv").exists()


# ------------------------------------------------------------------------------------------ the Makefile


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder with the files that the Makefile looks at, and no environment yet."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    return tmp_path


def commands(folder: Path, *arguments: str) -> list[str]:
    """Return the commands that make would run; these tests may run under make, which hands itself down in variables."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MAKE", "MFLAGS"))
    }
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if not line.startswith("echo")]


def make_ready(folder: Path) -> None:
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", "ready-to-run", "ready-to-test"):
        (folder / ".venv" / name).touch()


LAST = {
    "train": "train.py --batch-size 2 --epochs 1",
    "test": "-m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 25",
}


@pytest.mark.parametrize(("target", "last"), LAST.items())
def test_a_fresh_machine_gets_everything_once(clone, target, last):
    first = "\n".join(commands(clone, target, "BASE_PYTHON=python3.12"))
    steps = ["python3.12 .ci/make_venv.py .venv", ".ci/install_torch.py", "-m pip install", last]
    assert [first.index(step) for step in steps] == sorted(first.index(step) for step in steps)

    make_ready(clone)
    assert commands(clone, target) == [f".venv/bin/python {last}"]

    later = (clone / ".venv" / "ready-to-test").stat().st_mtime + 10
    os.utime(clone / "setup.cfg", (later, later))
    again = "\n".join(commands(clone, target))
    assert "-m pip install" in again and "make_venv" not in again


@pytest.mark.parametrize("target", ["train", "test", "lint", "types", "quick"])
def test_an_environment_of_ones_own_is_used_and_left_alone(clone, target):
    for command in commands(clone, target, "PYTHON=my-python"):
        assert command.startswith("my-python ") and "pip" not in command


def test_ci_runs_the_command_that_tests_are_run_with():
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


# --------------------------------------------------------------------------- the tests of what has changed


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("models/text/alignment.py", ["tests/models/text/test_alignment.py"]),
        ("tests/models/test_curriculum.py", ["tests/models/test_curriculum.py"]),
        ("tests/faults/test_kill.py", []),
        ("tests/conftest.py", []),
        ("train.py", []),
        ("README.md", []),
    ],
)
def test_a_changed_file_is_tested_by_the_file_that_mirrors_it(changed, tests):
    assert changed_tests.tests_of(Path(changed)) == [Path(test) for test in tests]


def test_a_module_without_tests_of_its_own_is_tested_by_those_of_its_folder():
    tests = changed_tests.tests_of(Path("utils/data/sources.py"))
    assert Path("tests/utils/data/test_documents.py") in tests
    assert all(test.parent == Path("tests/utils/data") for test in tests)


def test_what_has_changed_is_asked_of_git(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "changed.py").write_text("")
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "changed.py").write_text("1")
    (tmp_path / "new.py").write_text("")

    monkeypatch.setattr(changed_tests, "ROOT", tmp_path)
    assert changed_tests.changed_files("HEAD") == [Path("changed.py"), Path("new.py")]
