"""The model card: README.md of an exported student, in the hub's form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..config.quickstart_names import NAMES
from ..pretrained.locate import ATTACHED, local_path, where_from
from .results import MODELS, figure, headline, model_name, task_table, teacher_of
from .usage_example import how_to_use, is_adapter, lm_eval_command, pipeline_tag

_LICENCE = """\
To be filled in: the field `license` at the top of this file, which says `unknown`. What may be done with this model
depends on the licences of the model that it started from, of its teacher and of the text."""


def model_card(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the card: where the student comes from, what was measured, how it was trained, how it is used.

    Of local paths it has the last part only: where a folder lies on somebody's machine concerns nobody.

    Args:
        settings: of the run, nested, with the names that the user gave.
        results: see `utils.report.results`.
    """
    # The folder in the example is for the reader to fill in.
    usage = how_to_use('"path/to/this/folder"', settings, results)
    measure = lm_eval_command("path/to/this/folder", _base(settings), settings)
    adapter = ""
    if is_adapter(settings):
        adapter = f"A LoRA adapter of `{_base(settings)}`."

    parts = [
        f"---\n{_header(settings, results).to_yaml()}\n---",
        "# Student of a curriculum distillation",
        adapter,
        _origin(settings, results),
        "## Results",
        headline(results),
        _table(results),
        task_table(results),
        "## Training",
        f"```yaml\n{_recipe(settings)}```",
        f"With torch {torch.__version__} and transformers {transformers.__version__}.",
        f"## Licence\n\n{_LICENCE}",
        "## Use",
        f"```python\n{usage}\n```",
        f"Measured on tasks, by lm_eval:\n\n```\n{measure}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(settings: Mapping[str, Any], results: Mapping[str, Any]) -> ModelCardData:
    """Return the metadata that the hub reads; only names that are on the hub are in it."""
    starts_from_base = settings["student"]["init"] != "random"

    # A dataset is given as owner/name:configuration.
    datasets = [name.partition(":")[0] for name in settings["data"]["train"]]
    evaluations = _evaluations(settings, results)
    return ModelCardData(
        license="unknown",
        library_name="peft" if is_adapter(settings) else "transformers",
        pipeline_tag=pipeline_tag(results),
        base_model=_hub_base(settings) if starts_from_base else None,
        datasets=[name for name in datasets if _is_hub_id(name)] or None,
        tags=["knowledge-distillation"] if settings["teacher"]["name"] else None,
        model_name=_model_name(settings) if evaluations else None,
        eval_results=evaluations or None,
    )


def _base(settings: Mapping[str, Any]) -> str:
    """Return the name of the model that the student started from: on the hub, or else without its folders."""
    return _hub_base(settings) or _public(settings["student"]["name"])


def _hub_base(settings: Mapping[str, Any]) -> str | None:
    """Return the hub id of the model that the student started from; None: it is not on the hub."""
    source = where_from(settings["student"]["name"])

    # A GGUF file of the hub is given as owner/name:FILE.gguf.
    repository, _, file = source.partition(":")
    if file.lower().endswith(".gguf"):
        source = repository
    return source if _is_hub_id(source) else None


def _model_name(settings: Mapping[str, Any]) -> str:
    """Return the student's name in the hub's index: its run's, or else its base's."""
    return Path(settings.get("output_dir") or "").name or Path(_base(settings)).name


def _evaluations(settings: Mapping[str, Any], results: Mapping[str, Any]) -> list[EvalResult]:
    """Return what was measured of the student, for the hub's index of models."""
    kind = pipeline_tag(results)
    evaluations = []
    bits = results["student"].get("bits_per_byte")
    if bits is not None:
        # By default a part of the training text is held out.
        held_out = settings["data"].get("eval")
        texts = [held_out] if held_out else settings["data"]["train"]
        name = f"held-out text of {', '.join(map(_public, texts))}"
        evaluations.append(EvalResult(kind, "held-out-text", name, "bits_per_byte", bits))

    for task in results.get("tasks") or []:
        score = task.get("student") or {}
        if score.get("value") is not None:
            evaluations.append(
                EvalResult(
                    kind,
                    task["task"],
                    task["task"],
                    task["metric"],
                    score["value"],
                    source_name="lm_eval",
                    source_url="https://github.com/EleutherAI/lm-evaluation-harness",
                )
            )
    return evaluations


def _origin(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the paragraph on student, start, teacher and text."""
    student = settings["student"]
    teacher = teacher_of(settings)
    kind, _, count = student["init"].partition(":")
    starts = {"pretrained": "its own weights", "random": "random weights", "layers": f"{count} of its layers"}
    start = starts[kind]
    method = f"distilled from the teacher `{_public(teacher)}`" if teacher else "trained without a teacher"
    if several := (results.get("teacher") or {}).get("teachers"):
        method = "distilled from the teachers " + " and ".join(f"`{_public(one['name'])}`" for one in several)
    text = ", ".join(f"`{_public(name)}`" for name in settings["data"]["train"])
    return (
        f"The architecture and tokenizer of `{_public(student['name'])}`, starting from {start}, {method}\n"
        f"on {text} in {results['run']['steps']:,} optimizer steps."
    )


def _table(results: Mapping[str, Any]) -> str:
    """Return a table with a row for each model."""
    lines = ["| on held-out text | bits per byte | perplexity (own tokens) |", "|---|---:|---:|"]
    for key in MODELS:
        if model := results.get(key):
            bits = figure(model.get("bits_per_byte"))
            perplexity = figure(model.get("perplexity"), 2)
            lines.append(f"| {model_name(key, results)} | {bits} | {perplexity} |")
    return "\n".join(lines)


def _recipe(settings: Mapping[str, Any]) -> str:
    """Return the settings that shaped the model as YAML: curriculum, loss and training; without terms of no weight."""
    terms = {}
    for name, term in settings["curriculum"].items():
        weight = term["weight"] if isinstance(term, Mapping) and "weight" in term else term
        if weight != 0:
            terms[name] = term
    recipe = {"curriculum": terms, "loss": settings["loss"], "training": settings["training"]}
    if settings["student"]["lora"]["enabled"]:
        recipe["lora"] = settings["student"]["lora"]

    # A teacher read from a cache has the outcomes that the cache holds, whatever the loss asks for.
    if settings["cache"]["folder"]:
        recipe["loss"] = {**settings["loss"], "top_k": settings["cache"]["top_k"]}
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


def _is_hub_id(name: str) -> bool:
    """Return True if a name can be one on the hub: neither a path, nor one of the embedded material."""
    looks_like_a_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if looks_like_a_path or Path(name).exists():
        return False
    return name not in NAMES


def _public(name: str) -> str:
    """Return a name without the folders of this machine."""
    path = local_path(name)
    if not path.exists():
        return name

    # What Kaggle attaches is called by its path there, which anybody can attach too.
    if path.is_relative_to(ATTACHED):
        return str(path.relative_to(ATTACHED))
    return path.resolve().name
