"""The model card: README.md of an exported student, in the hub's form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCardData

from ..config.quickstart_names import NAMES
from ..pretrained.locate import ATTACHED, local_path
from .results import MODELS, figure, headline, model_name, task_table
from .usage_example import how_to_use, is_adapter, pipeline_tag

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
    adapter = ""
    if is_adapter(settings):
        adapter = f"A LoRA adapter of `{_public(settings['student']['name'])}`."

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
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(settings: Mapping[str, Any], results: Mapping[str, Any]) -> ModelCardData:
    """Return the metadata that the hub reads; only names that are on the hub are in it."""
    # A GGUF file of the hub is given as owner/name:FILE.gguf.
    base_model, _, _ = settings["student"]["name"].partition(":")
    if settings["student"]["init"] == "random" or not _is_hub_id(base_model):
        base_model = None

    # A dataset is given as owner/name:configuration.
    datasets = [name.partition(":")[0] for name in settings["data"]["train"]]
    return ModelCardData(
        license="unknown",
        library_name="peft" if is_adapter(settings) else "transformers",
        pipeline_tag=pipeline_tag(results),
        base_model=base_model,
        datasets=[name for name in datasets if _is_hub_id(name)] or None,
        tags=["knowledge-distillation"] if settings["teacher"]["name"] else None,
    )


def _origin(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the paragraph on student, start, teacher and text."""
    student = settings["student"]
    teacher = settings["teacher"]["name"]
    kind, _, count = student["init"].partition(":")
    starts = {"pretrained": "its own weights", "random": "random weights", "layers": f"{count} of its layers"}
    start = starts[kind]
    method = f"distilled from the teacher `{_public(teacher)}`" if teacher else "trained without a teacher"
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
    terms = {name: term for name, term in settings["curriculum"].items() if term["weight"] != 0}
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
