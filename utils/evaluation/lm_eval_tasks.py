"""Tasks of lm_eval (the Language Model Evaluation Harness), measured on the models of a run after training."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config.settings import EvaluationConfig
from ..errors import UserError
from ..machine.packages import require
from ..paths import user_path
from .held_out import HeldOut
from .scores import evaluation_mode, float32_evaluation

log = logging.getLogger(__name__)

RESAMPLES = 1000
"""Bootstrap samples behind the standard error of a metric that is no mean."""


def names(config: EvaluationConfig) -> list[str]:
    """Return the tasks and groups of the settings, each once, in their order."""
    requested = []
    for words in config.tasks:
        requested += [name for name in words.split(",") if name]
    return list(dict.fromkeys(requested))


def check(config: EvaluationConfig) -> None:
    """Check, with no model loaded, that the tasks can be measured; their data sets are downloaded where they are not
    there yet.

    Raises:
        UserError: without lm_eval; a task that does not exist, cannot be reached, or runs what a model writes.
    """
    if not names(config):
        return
    require("lm_eval", "--eval-tasks", extra="eval")

    # 1. A folder of the user's own tasks must hold some.
    folder = config.tasks_path
    if folder is not None and not any(user_path(folder).rglob("*.y*ml")):
        raise UserError(f"--eval-tasks-path {folder}: no task there. Expected a folder with lm_eval's YAML files.")
    with _quiet():
        # 2. All unknown names are told at once, before anything is downloaded.
        manager = _manager(config)
        unknown = [name for name in names(config) if name not in manager.all_tasks]
        if unknown:
            raise UserError(
                f"--eval-tasks: lm_eval has no {', '.join(unknown)}. `lm_eval ls tasks` lists the tasks that it has; "
                "--eval-tasks-path names a folder with others."
            )

        # 3. Each task and its data set can be loaded.
        for name in names(config):
            _check_task(name, manager)


def _check_task(name: str, manager: Any) -> None:
    """Load a task.

    Raises:
        UserError: it cannot be loaded, or runs what a model writes.
    """
    try:
        tasks = manager.load([name])["tasks"]
    except Exception as error:  # a task is code and data of others, anything can be wrong with it
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"--eval-tasks: {name} cannot be loaded. Choose another task.\n  {reason}") from error

    if any(getattr(task, "UNSAFE_CODE", False) for task in tasks.values()):
        raise UserError(f"--eval-tasks: {name} executes what a model writes, which is never done here.")


def measure(held_out: HeldOut, models: Mapping[str, Callable[[], nn.Module]]) -> list[dict[str, Any]]:
    """Measure the tasks on each model.

    A failure is told and costs that model's column, not the run. In one process.

    Args:
        held_out: only its settings, its tokenizers and the batch size that fits are used.
        models: key of the results (see `utils.report.results`) -> the model; each is let go before the next.

    Returns:
        `{task, metric, higher_is_better, documents}` of each metric and, under the key of each model,
        `{value, stderr}`.
    """
    config = held_out.config
    with _quiet():
        manager = _manager(config)

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for key, load_model in models.items():
        log.info("lm_eval: %s, %s", ", ".join(names(config)), key.replace("_", " "))
        tokenizer = held_out.tokenizers["teacher" if key == "teacher" else "student"]
        try:
            output = _evaluate(
                config,
                load_model(),
                tokenizer,
                held_out.batch_size,
                manager=manager,
                float32=key != "teacher",
            )
        except Exception as error:  # a task is code and data of others, as in `check`
            log.error("lm_eval: %s not measured: %s: %s", key, type(error).__name__, error, exc_info=error)
            continue

        # the first model that has a metric gives its row; the others add a column each
        for measured in _read(output):
            row = rows.setdefault((measured.task, measured.metric), measured.row)
            row[key] = measured.column
    return list(rows.values())


def _evaluate(
    config: EvaluationConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    *,
    manager: Any,
    float32: bool,
) -> dict[str, Any]:
    """Return lm_eval's own results of one model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = _with_known_padding(tokenizer, model)
    with _quiet(), float32_evaluation(model) if float32 else evaluation_mode(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        return simple_evaluate(
            wrapped,
            tasks=names(config),
            task_manager=manager,
            limit=config.tasks_limit,
            log_samples=False,
            bootstrap_iters=RESAMPLES,
        )


def _with_known_padding(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with a token to pad batches with that the model has a row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id < rows:
        return tokenizer

    # the run's own tokenizer stays as it is: it is exported
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class _Measured(NamedTuple):
    """One metric of one task, measured on one model."""

    task: str
    metric: str
    """Its key in lm_eval's results."""
    row: dict[str, Any]
    """The columns that all models share."""
    column: dict[str, Any]
    """Value and standard error of this model."""


def _read(output: Mapping[str, Any]) -> Iterator[_Measured]:
    """Yield the metrics in lm_eval's results."""
    for task, metrics in output["results"].items():
        for key, value in metrics.items():
            # keys are "METRIC,FILTER"; those without a comma describe the task
            metric, comma, output_filter = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            if not isinstance(value, int | float):
                continue

            # lm_eval writes "N/A" where it knows no standard error
            stderr = metrics.get(f"{metric}_stderr,{output_filter}")
            if not isinstance(stderr, int | float) or not math.isfinite(stderr):
                stderr = None

            row = {
                "task": task,
                "metric": metric if output_filter == "none" else f"{metric} ({output_filter})",
                "higher_is_better": output["higher_is_better"].get(task, {}).get(metric),
                "documents": output["n-samples"].get(task, {}).get("effective"),
            }
            yield _Measured(task, key, row=row, column={"value": value, "stderr": stderr})


def _manager(config: EvaluationConfig) -> Any:
    """Return lm_eval's index of tasks, with those of the user's folder."""
    from lm_eval.tasks import TaskManager

    if config.tasks_path is None:
        return TaskManager(include_path=None)
    return TaskManager(include_path=str(user_path(config.tasks_path)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm_eval: its bars, of which a saved notebook would keep every state, and remarks on how it is called."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)
