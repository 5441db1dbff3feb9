"""Tasks of lm_eval (the Language Model Evaluation Harness), measured on the models of a run after training."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config.settings import EvaluationConfig
from ..errors import UserError
from ..machine.packages import require
from ..paths import user_path
from .scores import evaluation_mode, float32_evaluation

log = logging.getLogger(__name__)

RESAMPLES = 1000
"""Bootstrap samples behind the standard error of a metric that is no mean."""


def names(config: EvaluationConfig) -> list[str]:
    """The tasks and groups that were asked for, in the order they were."""
    return list(dict.fromkeys(name for words in config.tasks for name in words.split(",") if name))


def check(config: EvaluationConfig) -> None:
    """Find out, with no model loaded, whether the tasks can be measured: downloads their data sets, or finds them.

    Raises:
        UserError: without lm_eval; a task that does not exist, cannot be reached, or runs what a model writes.
    """
    if not names(config):
        return
    require("lm_eval", "--eval-tasks", extra="eval")
    folder = config.tasks_path
    if folder is not None and not any(user_path(folder).rglob("*.y*ml")):
        raise UserError(f"--eval-tasks-path {folder}: no task there. Expected a folder with lm_eval's YAML files.")
    with _quiet():
        manager = _manager(config)
        if unknown := [name for name in names(config) if name not in manager.all_tasks]:
            raise UserError(
                f"--eval-tasks: lm_eval has no {', '.join(unknown)}. `lm_eval ls tasks` lists the tasks that it has; "
                "--eval-tasks-path names a folder with others."
            )
        for name in names(config):
            try:
                loaded = manager.load([name])["tasks"]
            except Exception as error:  # a task is code and data of others, anything can be wrong with it
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise UserError(f"--eval-tasks: {name} cannot be loaded. Choose another task.\n  {reason}") from error
            if any(getattr(task, "UNSAFE_CODE", False) for task in loaded.values()):
                raise UserError(f"--eval-tasks: {name} executes what a model writes, which is never done here.")


def measure(held_out: Any, models: Mapping[str, Callable[[], nn.Module]]) -> list[dict[str, Any]]:
    """`{task, metric, higher_is_better, documents}` of each metric and, under the key of each model, `{value, stderr}`.

    A failure is told and costs that model's column, not the run. In one process.

    Args:
        held_out: with the run's `config` (an `EvaluationConfig`), `tokenizers` of `student` and `teacher`, and the
            `batch_size` that fits (see `utils.evaluation.held_out`).
        models: key of the results (see `utils.report.results`) -> the model; each is let go before the next.
    """
    config: EvaluationConfig = held_out.config
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with _quiet():
        manager = _manager(config)
    for key, model in models.items():
        log.info("lm_eval: %s, %s", ", ".join(names(config)), key.replace("_", " "))
        tokenizer = held_out.tokenizers["teacher" if key == "teacher" else "student"]
        try:
            found = _evaluate(config, model(), tokenizer, held_out.batch_size, manager, float32=key != "teacher")
        except Exception as error:  # as in check
            log.error("lm_eval: %s not measured: %s: %s", key, type(error).__name__, error, exc_info=error)
            continue
        for name, metric, row, measured in _read(found):
            rows.setdefault((name, metric), row)[key] = measured
    return list(rows.values())


def _evaluate(
    config: EvaluationConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    manager: Any,
    *,
    float32: bool,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = _with_known_padding(tokenizer, model)
    with _quiet(), float32_evaluation(model) if float32 else evaluation_mode(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        options = {"limit": config.tasks_limit, "log_samples": False, "bootstrap_iters": RESAMPLES}
        return simple_evaluate(wrapped, tasks=names(config), task_manager=manager, **options)


def _with_known_padding(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> PreTrainedTokenizerBase:
    """The tokenizer, with a token to pad batches with that the model has a row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id < rows:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read(found: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """(task, metric, the columns that all models share, value and standard error) of lm_eval's results."""
    for name, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            row = {
                "task": name,
                "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
                "documents": found["n-samples"].get(name, {}).get("effective"),
            }
            error = metrics.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, int | float) and math.isfinite(error)
            yield name, key, row, {"value": value, "stderr": error if known else None}


def _manager(config: EvaluationConfig) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if config.tasks_path is None else str(user_path(config.tasks_path)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm_eval's bars, of which a saved notebook would keep every state, and its remarks on how it is called."""
    theirs = logging.getLogger("lm_eval")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        theirs.setLevel(level)
