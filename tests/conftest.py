"""Fixtures and settings for the whole suite: no network, one thread per process, bounded property tests.

Tests marked `slow` take minutes and run only when asked for: -m slow. Those marked `gpu` run on a pretended CUDA device
where there is a compiler, and on the GPUs of this machine with GPU_TESTS=1 (`GPU_TESTS=1 pytest -m gpu`); from all
other tests GPUs are hidden.
"""

import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports torch or the hub's client: both read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("GPU_TESTS") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite says the same with and without a GPU

import pytest
import torch
from hypothesis import HealthCheck, settings

from utils.logs import terminal
from utils.logs.console import OWN_LOGGERS
from utils.machine import hardware
from utils.machine.hardware import BF16_INSTRUCTIONS

BEHIND_THE_FACE = ("models", "utils.config", "utils.errors", "utils.training", "utils.training.distillation_trainer")
"""Modules that the names of the package `curriculum_distillation` come from."""

if hasattr(signal, "SIGHUP"):  # ignored by whoever starts the suite with nohup, and then by every process of it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("quick", max_examples=40, deadline=None, suppress_health_check=_SLOW_IS_FINE)
settings.register_profile("thorough", max_examples=1000, deadline=None, suppress_health_check=_SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes long; run with -m slow")
    config.addinivalue_line("markers", "gpu: on a pretended GPU; with GPU_TESTS=1 on a real one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(autouse=True)
def a_console_of_its_own() -> None:
    """A console reads columns and colours from the environment once, which tests change."""
    terminal._console.cache_clear()


@pytest.fixture(autouse=True)
def a_cpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite computes in the same precision on every CPU."""
    monkeypatch.setattr(hardware, "BF16_INSTRUCTIONS", {})


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, a_cpu_without_bf16: None) -> Callable[..., None]:
    """Pretend that torch sees another CPU; returns a function that sets its capabilities."""

    def pretend(**capabilities: bool) -> None:
        monkeypatch.setattr(hardware, "BF16_INSTRUCTIONS", BF16_INSTRUCTIONS)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)

    return pretend


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """`setup_logging` changes loggers of the whole process; a test that calls it leaves no trace."""
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, OWN_LOGGERS)]
    levels, handlers = [logger.level for logger in loggers], list(root.handlers)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="session")
def real_models_dir() -> Path:
    """Folder with `models/`, `tokenizers/` and `corpora/`: small trained models and the texts to try them on."""
    folder = os.environ.get("REAL_MODELS_DIR")
    if not folder:
        pytest.skip("REAL_MODELS_DIR is not set: it names a folder with small real models, tokenizers and corpora")
    path = Path(folder)
    if not (path / "models").is_dir():
        pytest.fail(f"REAL_MODELS_DIR={folder}: no folder `models` there")
    return path


@pytest.fixture
def as_installed(monkeypatch):
    """This source tree as the package `curriculum_distillation`, installed or not."""
    for name in BEHIND_THE_FACE:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("models", "utils")]:
        monkeypatch.setitem(sys.modules, f"curriculum_distillation.{name}", sys.modules[name])

    face = Path(__file__).resolve().parent.parent / "models" / "face"
    spec = importlib.util.spec_from_file_location(
        "curriculum_distillation", face / "__init__.py", submodule_search_locations=[str(face)]
    )
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "curriculum_distillation", package)
    spec.loader.exec_module(package)
