"""Demands of installed packages that are not met, and which of them matter."""

import importlib.metadata
import subprocess
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.machine import packages
from utils.machine.packages import (
    Conflict,
    Package,
    find_conflicts,
    install_missing,
    installed_packages,
    own_requirements,
    python_is_supported,
    supported_python,
)

INSTALLED = [
    Package("Torch_Like", "2.10.0+cu128", ("numpy>=1.17", 'gpu-kernels==1; sys_platform == "nowhere"')),
    Package("reader", "4.0", ('fsspec[http]<=2025.9,>=2023.1; python_version >= "3"', 'audio; extra == "audio"')),
    Package("fsspec", "2025.12", ('aio>=3; extra == "http"', 'cloud>9; extra == "cloud"')),
    Package("aio", "2.0"),
    Package("numpy", "2.4.6"),
    Package("google-colab", "1.0", ("numpy<2", "pandas==2.2.2", "not a requirement !!")),
]


def conflicts(*requirements: str, installed=INSTALLED) -> dict[str, bool]:
    return {str(conflict): conflict.harmful for conflict in find_conflicts(requirements, installed)}


def test_only_demands_of_packages_that_training_loads_are_harmful():
    found = conflicts("torch-like>=2.6", "reader")
    assert found == {
        "reader wants fsspec<=2025.9,>=2023.1, 2025.12 is installed": True,
        "fsspec wants aio>=3, 2.0 is installed": True,  # the extra that reader asks for
        "google-colab wants numpy<2, 2.4.6 is installed": False,
        "google-colab wants pandas==2.2.2, it is not installed": False,
    }
    assert list(found.values()) == sorted(found.values(), reverse=True), "harmful ones come first"


def test_what_is_not_loaded_is_harmless_and_its_extras_are_not_asked_for():
    found = conflicts("numpy")
    assert not any(found.values())
    assert "fsspec wants aio>=3, 2.0 is installed" not in found


def test_own_requirements_are_checked_too_where_they_apply():
    assert conflicts(
        "torch-like>=2.11", 'elsewhere; sys_platform == "nowhere"', "missing>=1", installed=INSTALLED[:1]
    ) == {
        "needed: torch-like>=2.11, 2.10.0+cu128 is installed": True,
        "needed: missing>=1, it is not installed": True,
        "Torch_Like wants numpy>=1.17, it is not installed": True,
    }


def test_two_packages_that_need_each_other_are_no_endless_loop():
    pair = [Package("a", "1", ("b",)), Package("b", "1", ("a[x]",))]
    assert conflicts("a", installed=pair) == {}


def test_this_environment_meets_the_requirements_of_setup_cfg():
    names = {package.name.lower() for package in installed_packages()}
    assert {"torch", "transformers"} <= names
    assert [line for line in own_requirements() if line.startswith("torch>=")]
    assert not [c for c in find_conflicts(own_requirements(), installed_packages()) if not c.package]
    assert python_is_supported() and supported_python().startswith(">=")


@pytest.mark.parametrize("text, supported", [(">=3.10", True), (">=3.99", False)])
def test_python_is_compared_with_what_setup_cfg_admits(text, supported, monkeypatch):
    monkeypatch.setattr(packages, "supported_python", lambda: text)
    assert python_is_supported() is supported


# ------------------------------------------------------------------------------------------ installing


class Pip:
    """Stands in for pip: succeeds where a word is among its arguments, and remembers them."""

    def __init__(self) -> None:
        self.succeeds_with = ""
        self.calls: list[list[str]] = []

    def __call__(self, command: list[str]) -> subprocess.CompletedProcess:
        self.calls.append(command[4:])
        return subprocess.CompletedProcess(command, 0 if self.succeeds_with in command else 1)


@pytest.fixture
def pip(monkeypatch) -> Pip:
    lacking = [
        Conflict("", "datasets>=4.0", "3.6.0", True),
        Conflict("", "pydantic>=2", None, True),
        Conflict("other", "numpy<2", "2.4", False),
    ]
    fake = Pip()
    monkeypatch.setattr(packages, "find_conflicts", lambda *_: lacking)
    monkeypatch.setattr(packages.subprocess, "run", fake)
    return fake


def wheels_in(inputs: Path) -> Path:
    folder = inputs / "datasets" / "me" / "wheels"
    folder.mkdir(parents=True)
    (folder / "datasets-4.1-py3-none-any.whl").touch()
    return folder


DEMANDS = ["datasets>=4.0", "pydantic>=2"]
ARGUMENTS = [f"torch=={importlib.metadata.version('torch')}", *DEMANDS]


def test_what_is_missing_is_installed_beside_the_torch_that_is_there(pip, tmp_path):
    pip.succeeds_with = "datasets>=4.0"
    assert install_missing(tmp_path) == DEMANDS
    assert pip.calls == [["--quiet", *ARGUMENTS]]


def test_attached_wheels_come_before_the_index(pip, tmp_path):
    folder = wheels_in(tmp_path)
    pip.succeeds_with = "--no-index"
    assert install_missing(tmp_path) == DEMANDS
    assert pip.calls == [["--quiet", "--no-index", f"--find-links={folder}", *ARGUMENTS]]


def test_what_nobody_has_is_named_with_both_versions_and_the_way_without_internet(pip, tmp_path):
    wheels_in(tmp_path)
    pip.succeeds_with = "nothing"
    with pytest.raises(UserError) as raised:
        install_missing(tmp_path)
    message = str(raised.value)
    assert "datasets>=4.0, 3.6.0 is installed" in message
    assert "pydantic>=2, it is not installed" in message
    assert "pip download" in message and "numpy" not in message
    assert len(pip.calls) == 2


def test_the_command_in_the_docs_that_downloads_wheels_is_the_one_that_is_printed(pip, tmp_path):
    """But for the version of Python, and the demands, which are those of setup.cfg."""
    pip.succeeds_with = "nothing"
    with pytest.raises(UserError) as raised:
        install_missing(tmp_path)
    printed = str(raised.value).partition("pip download")[2].partition("2. Upload")[0].split()

    page = (packages.SETUP_CFG.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    shown = page.partition("pip download")[2].partition("```")[0].replace("\\\n", " ").split()

    demands = [word.strip("'") for word in shown if word.startswith("'")]
    assert demands and set(demands) <= set(own_requirements())
    assert general_words(shown) == general_words(printed)


def general_words(command: list[str]) -> list[str]:
    return [word for word in command if not word.startswith(("'", "3."))]


def test_where_all_is_there_pip_is_not_run(pip, monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "find_conflicts", lambda *_: [])
    assert install_missing(tmp_path) == []
    assert not pip.calls
