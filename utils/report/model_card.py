"""The README.md of an exported student: what it is, where it comes from, what was measured, in the hub's form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCardData

from ..config.quickstart_names import NAMES
from ..paths import user_path
from ..pretrained.locate import ATTACHED
from .results import MODELS, figure, headline, model_name, task_table
from .usage_example import how_to_use, is_adapter, pipeline_tag

_LICENCE = """\
To be filled in: the field `license` at the top of this file, which says `unknown`. What may be done with this model
depends on the licences of the model that it started from, of its teacher and of the text."""


def model_card(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The card.

    Local paths are told by their last part only: where a folder lies on somebody's machine concerns nobody.

    Args:
        settings: of the run, nested, with the names that the user gave.
        results: see `utils.report.results`.
    """
    student, teacher, text = settings["student"], settings["teacher"]["name"], settings["data"]["train"]
    trained = student["init"] == "pretrained"
    header = ModelCardData(
        license="unknown",
        library_name="peft" if is_adapter(settings) else "transformers",
        pipeline_tag=pipeline_tag(results),
        base_model=student["name"] if trained and _is_hub_id(student["name"]) else None,
        datasets=[name.partition(":")[0] for name in text if _is_hub_id(name.partition(":")[0])] or None,
        tags=["knowledge-distillation"] if teacher else None,
    )
    start = "its own weights" if trained else "random weights"
    how = f"distilled from the teacher `{_public(teacher)}`" if teacher else "trained without a teacher"
    parts = [
        f"---\n{header.to_yaml()}\n---",
        "# Student of a curriculum distillation",
        f"A LoRA adapter of `{_public(student['name'])}`." if is_adapter(settings) else "",
        f"The architecture and tokenizer of `{_public(student['name'])}`, starting from {start}, {how}\n"
        f"on {', '.join(f'`{_public(name)}`' for name in text)} in {results['run']['steps']:,} optimizer steps.",
        "## Results",
        headline(results),
        _table(results),
        task_table(results),
        "## Training",
        f"```yaml\n{_recipe(settings)}```",
        f"With torch {torch.__version__} and transformers {transformers.__version__}.",
        f"## Licence\n\n{_LICENCE}",
        "## Use",
        "```python\n" + how_to_use('"path/to/this/folder"', settings, results) + "\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(results: Mapping[str, Any]) -> str:
    lines = ["| on held-out text | bits per byte | perplexity (own tokens) |", "|---|---:|---:|"]
    for key in MODELS:
        if model := results.get(key):
            cells = [figure(model.get("bits_per_byte")), figure(model.get("perplexity"), 2)]
            lines.append(f"| {model_name(key, results)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _recipe(settings: Mapping[str, Any]) -> str:
    """The settings that made the model what it is: what is learned from, and how; without terms of no weight."""
    terms = {name: term for name, term in settings["curriculum"].items() if term["weight"] != 0}
    told = {"curriculum": terms, "loss": settings["loss"], "training": settings["training"]}
    if settings["student"]["lora"]["enabled"]:
        told["lora"] = settings["student"]["lora"]
    if settings["cache"]["folder"]:
        told["loss"] = {**settings["loss"], "top_k": settings["cache"]["top_k"]}
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


def _is_hub_id(name: str) -> bool:
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists()
    return not is_path and name not in NAMES


def _public(name: str) -> str:
    path = user_path(name)
    if not path.exists():
        return name
    return str(path.relative_to(ATTACHED)) if path.is_relative_to(ATTACHED) else path.resolve().name
