"""A whole run from Python: what `train.py` does, as one function."""

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.commands.run import start
from utils.commands.settings import configure
from utils.config.arguments import SHORT_FLAGS
from utils.errors import Plain, UserError
from utils.logs.console import setup_logging
from utils.logs.progress import terminal_bar
from utils.on_policy.sampling import Engine
from utils.run.exit_codes import Interrupted

RESULTS_NAME = "evaluation_report.json"

FileName = str | PathLike[str]


@dataclass(frozen=True)
class Distilled:
    """A run that has ended, in its folder."""

    folder: Path
    """Everything that the run wrote; report.html there shows it."""
    results: dict[str, Any]
    """The text of evaluation_report.json: each model on the same unseen text; empty without an evaluation."""

    @property
    def student(self) -> Path:
        """Folder of the student, as `from_pretrained` takes it."""
        return self.folder / "student"

    def __repr__(self) -> str:
        scores = {}
        for name, result in self.results.items():
            if isinstance(result, dict) and "bits_per_byte" in result:
                scores[name] = round(result["bits_per_byte"], 4)
        return f"Distilled({str(self.folder)!r}, bits per byte: {scores})"


class Stopped(Plain, KeyboardInterrupt):
    """A run was interrupted, and can be continued."""


def distil(
    teacher: FileName | None = None,
    student: FileName | None = None,
    data: FileName | Sequence[FileName] | dict[str, Any] | None = None,
    *,
    config: FileName | None = None,
    engine: Engine | None = None,
    **settings: Any,
) -> Distilled:
    """Do a whole run: the same checks, files and results as the command, and continued like it.

        distil("Qwen/Qwen2.5-1.5B", "HuggingFaceTB/SmolLM2-360M", "my_texts.jsonl", max_steps=1000, lr=1e-4)
        distil(config="quickstart", output_dir="runs/first", curriculum={"feat": 0.3})

    Args:
        teacher: hub id, local folder or GGUF file; None: as the recipe says.
        student: likewise.
        data: texts to learn from, such as files and ids of data sets; a dict holds settings of the section `data`.
        config: recipe or YAML file; None: as the command chooses one.
        engine: writes the text that the student learns from under `curriculum.on_policy`, in place of transformers;
            see `utils.on_policy.sampling.Engine`.
        settings: flags of the command without their dashes (`max_steps`, `output_dir`), and sections
            (`training={"seed": 7}`).

    Raises:
        UserError: every mistake in what was asked for, at once.
        KeyboardInterrupt: the run was interrupted (in a notebook by Interrupt); a checkpoint is saved, and the same
            call continues.
    """
    started = time.monotonic()
    setup_logging(None, main_process=True)
    run_config, recipe = configure(flags(teacher, student, data, config=config, **settings))
    stopped_by = None
    try:
        start(run_config, recipe, started, engine)
    except Interrupted as interrupted:
        stopped_by = str(interrupted)
    finally:
        terminal_bar().stop()
        # A notebook goes on, with the memory of its GPU.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # Out here: an exception keeps those before it, and with them the models of the frames that they passed.
    if stopped_by is not None:
        raise Stopped(f"stopped by {stopped_by}; {run_config.output_dir} is kept, the same call continues it")

    folder = Path(run_config.output_dir)
    results = folder / RESULTS_NAME
    return Distilled(folder, json.loads(results.read_text(encoding="utf-8")) if results.exists() else {})


def flags(
    teacher: FileName | None = None,
    student: FileName | None = None,
    data: FileName | Sequence[FileName] | dict[str, Any] | None = None,
    *,
    config: FileName | None = None,
    **settings: Any,
) -> list[str]:
    """Return the words of the command line that says the same as a call of `distil`, for its arguments.

    With them `verify_fixes.py` checks a run before it starts, and a launcher starts it in several processes.

    Raises:
        UserError: a value that no command line can say.
    """
    data_name = "data" if isinstance(data, dict) else "train_data"
    named = {"teacher": teacher, "student": student, data_name: data, **settings}
    words = _words({name: value for name, value in named.items() if value is not None})
    return words if config is None else ["--config", fspath(config), *words]


def _words(settings: dict[str, Any]) -> list[str]:
    """Return settings as the words of a command line.

    Raises:
        UserError: a value that no command line can say.
    """
    words = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        plain = _plain(name, value)

        if flag not in SHORT_FLAGS and isinstance(plain, dict):
            # One by one: the section as a whole would lose what the recipe says in it.
            for key, inner in plain.items():
                words += ["--set", f"{name}.{key}={json.dumps(inner)}"]
        elif flag not in SHORT_FLAGS:
            words += ["--set", f"{name}={json.dumps(plain)}"]
        elif isinstance(plain, dict):
            words += ["--set", f"{SHORT_FLAGS[flag]}={json.dumps(plain)}"]
        elif plain == []:  # no flag says it: one of a list wants a word
            words += ["--set", f"{SHORT_FLAGS[flag]}=[]"]
        elif isinstance(plain, list):
            words += [flag, *map(_word, plain)]
        else:
            words += [flag, _word(plain)]

    return words


def _word(value: Any) -> str:
    """Return a plain value as a word of a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _plain(name: str, value: Any) -> Any:
    """Return a value as JSON knows it; paths become names.

    Raises:
        UserError: JSON has nothing like it.
    """
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, dict):
        return {key: _plain(f"{name}.{key}", inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, inner) for inner in value]
    if isinstance(value, np.generic):  # a number of numpy, from a grid of settings
        return value.item()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise UserError(
        f"{name}: got a {type(value).__name__}, expected a name, a number, or a list or dict of them; a pair that is "
        "loaded already is what Distillation and fit are for (docs/library.md)"
    )
