"""The weights of loss terms that nobody gave: `curriculum: auto`, the default of every run.

A weight that a recipe or the command line gives stands. The others suit what the student starts from and how often it
reads its text (`models.config.automatic_curriculum`), or are those that a run began with, where it is continued.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.config import ROUTER_TERMS, TERMS, Beginning, CurriculumConfig, Term, automatic_curriculum
from utils.config.build import build
from utils.config.protocols import ConfigT, RunConfig
from utils.config.schema import lists_of_texts, sections_of
from utils.config.short_forms import expand
from utils.config.yaml_files import load_yaml
from utils.run_layout import CHECKPOINTS, CONFIG

REASONS: dict[Beginning, str] = {
    "trained": "the student is trained already",
    "cut": "the student is made of layers of a trained model",
    "random": "the student starts from random weights",
}


def with_automatic_curriculum(config: ConfigT, values: Mapping[str, Any]) -> tuple[ConfigT, str]:
    """Return the settings of a run with all weights, and a line on those that were not given.

    Args:
        config: with the weights of a trained student where none are given.
        values: the nested values that the settings were built from.

    Raises:
        UserError: the run to be continued has a config.yaml that cannot be read.
    """
    explicit = values.get("curriculum", {})
    missing = [name for name in TERMS if name not in explicit]
    if not missing:
        return config, ""

    weights = _weights_of_run(config)
    if weights is not None:
        reason = f"as this run began ({Path(config.output_dir) / CONFIG})"
    else:
        weights, reason = _suitable(config, explicit)

    curriculum = replace(weights, **{name: getattr(config.curriculum, name) for name in explicit})
    line = f"curriculum auto: {weights.weights_in_words(missing) or 'no further term'}, {reason}"
    if explicit:
        line += f"; as they were given: {', '.join(explicit)}"
    return replace(config, curriculum=curriculum), line


def _weights_of_run(config: RunConfig) -> CurriculumConfig | None:
    """Return the weights in config.yaml of the run that is continued; None: it is a new one."""
    file = Path(config.output_dir) / CONFIG
    has_checkpoints = any(file.with_name(CHECKPOINTS).glob("step-*"))
    if config.resume == "never" or not has_checkpoints or not file.is_file():
        return None

    schema = type(config)
    settings = expand(load_yaml(file), lists_of_texts(schema), sections_of(schema))
    return build(CurriculumConfig, settings.get("curriculum", {}), source=str(file))


def _how_often(config: RunConfig) -> str:
    """Return in words how often a run reads its text."""
    if config.data.streaming:
        return "reads a stream, whose texts are taken to be read once"
    return "reads each text once" if config.reads_once else "may read its text again"


def _suitable(config: RunConfig, explicit: Mapping[str, Any]) -> tuple[CurriculumConfig, str]:
    """Return the weights that suit a student, and in words why.

    Args:
        explicit: weights that were given.
    """
    beginning = config.student.beginning
    reason = REASONS[beginning]
    # The two are a pair: beside a weight that was given, that of the other is the usual one. Both are where the student
    # writes text itself, of which KD alone is learned.
    is_given = bool(explicit.keys() & {"kd", "lm"})
    chooses_pair = beginning != "random" and not is_given and not config.curriculum.uses_own_text
    if chooses_pair:
        reason += f" and {_how_often(config)}"
    weights = automatic_curriculum(beginning, reads_once=config.reads_once and chooses_pair)
    reason = f"since {reason} (docs/choosing.md)"

    state_terms = [name for name in ROUTER_TERMS if name in weights.used()]
    zeros: dict[str, Any] = dict.fromkeys(state_terms, Term(0.0))
    without_states = replace(weights, **zeros)
    if config.teacher.name is None:
        return without_states, "since there is no teacher"
    if state_terms and config.teacher.is_elsewhere:
        names = " and ".join(state_terms)
        return without_states, f"{reason}, but without {names}, which need the teacher's model in this process"
    # Who sets KD to 0 wants to learn from the text alone, such as for a comparison.
    if state_terms and "kd" not in config.curriculum.used():
        return without_states, "since kd is 0"
    if state_terms and config.cache.folder is not None:
        names = " and ".join(state_terms)
        reason += f", but without {names}, which need the teacher in every step that the teacher cache is to spare"
        return without_states, reason
    return weights, reason
