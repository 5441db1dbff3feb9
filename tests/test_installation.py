"""The package as `pip install .` leaves it: one name, importable from any folder, with recipes and commands.

A wheel is built of the source tree and unpacked in a folder of its own; whatever is asked of it is asked from another
folder, by a Python that has no checkout on its path.
"""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from utils.checks import miniature

ROOT = Path(__file__).resolve().parent.parent

LEARNING = [
    "CachedTeacher",
    "CurriculumConfig",
    "CurriculumScheduler",
    "Distillation",
    "DistillationFramework",
    "FrozenTeacher",
    "LossConfig",
    "Method",
    "PairCollator",
    "PairEncoder",
    "Ramp",
    "RouterConfig",
    "StudentAwareRouter",
    "Term",
    "VocabularyMap",
]
"""Names of `curriculum_distillation.models`: a promise to those who import them."""
PUBLIC = sorted([*LEARNING, "DistillationTrainer", "LoopOptions", "TrainingConfig", "UserError", "distil", "fit"])
"""Names of `curriculum_distillation`."""


@dataclass(frozen=True)
class Installation:
    """An installed package and a folder to use it from."""

    packages: Path
    elsewhere: Path

    def run(self, *command: str, **environment: str) -> str:
        """Return what a command prints; it must succeed."""
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
        ours = {
            "PYTHONPATH": str(self.packages),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "MPLCONFIGDIR": str(self.elsewhere),
            "CURRICULUM_DISTILLATION_CACHE": str(self.elsewhere / "cache"),
        }

        done = subprocess.run(
            [*command],
            cwd=self.elsewhere,
            env=inherited | ours | environment,
            capture_output=True,
            text=True,
        )

        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def python(self, code: str) -> str:
        return self.run(sys.executable, "-c", code)


@pytest.fixture(scope="module")
def installation(tmp_path_factory) -> Installation:
    pytest.importorskip("setuptools", reason="setuptools builds the package; pip fetches it elsewhere")
    source = tmp_path_factory.mktemp("source")
    no_caches = shutil.ignore_patterns("__pycache__")
    for name in ("models", "utils", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=no_caches)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md", *(path.name for path in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, source / name)

    packages = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(packages), str(source)], check=True, capture_output=True)
    return Installation(packages, tmp_path_factory.mktemp("elsewhere"))


def test_it_has_one_name_and_leaks_no_models_or_utils(installation):
    names = {path.name for path in installation.packages.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"curriculum_distillation", "bin"}
    assert [path.name for path in (installation.packages / "bin").iterdir()] == ["curriculum-distill"]


def test_every_module_of_it_can_be_imported(installation):
    installation.python(
        "import importlib, pkgutil, curriculum_distillation.models as m, curriculum_distillation.utils as u\n"
        "for package in (m, u):\n"
        "    for module in pkgutil.iter_modules(package.__path__):\n"
        "        importlib.import_module(f'{package.__name__}.{module.name}')\n"
    )


def test_its_public_names_are_these(installation):
    told = installation.python(
        "import curriculum_distillation as package\n"
        "import curriculum_distillation.models as models\n"
        "print(sorted(package.__all__), sorted(models.__all__), sep='\\n')\n"
        "assert {*package.__all__} <= {*dir(package)}\n"
        "assert all(getattr(package, name) is getattr(models, name) for name in models.__all__)\n"
        f"from curriculum_distillation import {', '.join(PUBLIC)}\n"
        f"from curriculum_distillation.models import {', '.join(LEARNING)}\n"
        "print(fit.__module__, TrainingConfig.__module__, UserError.__module__)\n"
    )
    public, learning, homes = told.splitlines()
    assert ast.literal_eval(public) == PUBLIC
    assert ast.literal_eval(learning) == LEARNING
    modules = ("training.loop", "config.settings", "errors")
    assert homes.split() == [f"curriculum_distillation.utils.{name}" for name in modules]


def test_an_unknown_name_is_an_error_and_the_bare_import_loads_no_torch(installation):
    installation.python(
        "import sys, curriculum_distillation\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n"
        "    curriculum_distillation.DistilationFramework\n"
        "except AttributeError as error:\n"
        "    assert 'DistilationFramework' in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
    )


def test_type_checkers_see_the_names_that_are_loaded_late():
    """`__getattr__` hides names from them; the imports of the face that only they follow must name them all."""
    face = ast.parse((ROOT / "models" / "face" / "__init__.py").read_text(encoding="utf-8"))
    imported = [node for node in ast.walk(face) if isinstance(node, ast.ImportFrom) and node.level]
    names = {alias.name: node.module for node in imported for alias in node.names}
    assert sorted(names) == PUBLIC
    assert {name for name, module in names.items() if module == "models"} == {*LEARNING}


def test_it_tells_type_checkers_that_it_has_types(installation):
    assert (installation.packages / "curriculum_distillation" / "py.typed").is_file()


def documented_imports() -> list[str]:
    """Every import from the package in a block of Python code of README and docs/."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.S | re.M)]
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block))]
    modules = [node for node in nodes if isinstance(node, ast.ImportFrom) and "curriculum_distillation" in node.module]
    return [ast.unparse(node) for node in modules]


def test_every_documented_import_works(installation):
    documented = documented_imports()
    assert len(documented) >= 3
    installation.python("\n".join(documented))


def test_every_documented_module_exists(installation):
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    named = {name for page in pages for name in re.findall(r"\bcurriculum_distillation(?:\.\w+)+", page.read_text())}
    assert named
    installation.python("".join(f"import {name}\n" for name in sorted(named)))


def test_every_recipe_is_found_by_its_name(installation):
    recipes = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    launchers = sorted(path.name for path in (ROOT / "configs" / "accelerate").glob("*.yaml"))
    told = installation.python(
        "from curriculum_distillation.utils.config import CONFIG_FOLDER, find_config\n"
        f"for name in {recipes}:\n"
        "    print(find_config(name))\n"
        "print(sorted(path.name for path in (CONFIG_FOLDER / 'accelerate').iterdir()))\n"
    )
    *paths, accelerate = told.splitlines()
    assert [Path(path).read_text() for path in paths] == [
        (ROOT / "configs" / f"{name}.yaml").read_text() for name in recipes
    ]
    assert all(Path(path).is_relative_to(installation.packages) for path in paths)
    assert ast.literal_eval(accelerate) == launchers


def test_it_knows_its_own_requirements(installation):
    told = installation.python(
        "from curriculum_distillation.utils.machine.packages import own_requirements, supported_python\n"
        "print(sorted(own_requirements()), supported_python(), sep='\\n')\n"
    )
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    requirements, python = told.splitlines()
    assert ast.literal_eval(requirements) == sorted(setup["options"]["install_requires"].split())
    assert python == setup["options"]["python_requires"]


def test_the_command_is_train_and_verify_from_any_folder(installation):
    command = str(installation.packages / "bin" / "curriculum-distill")
    told = installation.run(sys.executable, command, "--help")
    assert "--train-data" in told and "quickstart" in told
    assert "Checks to run before a long training" in installation.run(sys.executable, command, "verify", "--help")
    assert "--student-only" in installation.run(sys.executable, command, "chat", "--help")
    module = installation.run(sys.executable, "-m", "curriculum_distillation", "--help")
    assert module == told


def test_the_command_answers_without_torch(installation):
    told = installation.python(
        "import runpy, sys\n"
        "sys.argv = ['curriculum-distill', 'verify', '--help']\n"
        "try:\n"
        "    runpy.run_module('curriculum_distillation', run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    print('code', ended.code, {'torch', 'transformers', 'datasets'} & sys.modules.keys())\n"
    )
    assert told.splitlines()[-1] == "code 0 set()"


def test_the_command_trains_from_any_folder(installation):
    tiny = miniature.build(installation.elsewhere)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny.teacher)).save_pretrained(tiny.teacher)
    command = str(installation.packages / "bin" / "curriculum-distill")
    models = ["--teacher", "teacher", "--student", "student", "--student-init", "random"]
    flags = ["--config", "quickstart", *models, "--train-data", tiny.text.name]
    fewer = ["--set", "evaluation.max_windows=4", "evaluation.samples=1", "evaluation.new_tokens=2"]
    installation.run(sys.executable, command, *flags, "--max-steps", "2", *fewer, "--output-dir", "run")
    assert (installation.elsewhere / "run" / "student" / "config.json").is_file()
    assert (installation.elsewhere / "run" / "report.html").is_file()


def test_a_run_is_done_from_a_program_with_the_errors_of_the_package(installation):
    installation.python(
        "from curriculum_distillation import UserError, distil\n"
        "try:\n"
        "    distil('a', 'b', 'c', max_step=3)\n"
        "except UserError as error:\n"
        "    assert 'max_step' in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )


def test_modules_of_a_program_that_are_in_the_way_are_named(installation):
    installation.python(
        "import sys, types\n"
        "sys.modules['utils'] = types.ModuleType('utils')\n"
        "from curriculum_distillation import distil\n"
        "try:\n"
        "    distil('a', 'b', 'c')\n"
        "except ImportError as error:\n"
        "    assert '`utils` of its own' in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )
