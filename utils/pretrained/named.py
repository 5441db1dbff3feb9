"""Configs and tokenizers of the models that a run names; no weights."""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..config.protocols import RunConfig
from ..config.settings import ModelConfig
from . import layers, loading


def teachers_by_role(config: RunConfig) -> dict[str, ModelConfig]:
    """Return the settings of `teacher` and, where there are several, of `teacher_2` and so on."""
    first, *further = config.several_teachers or [config.teacher]
    return {"teacher": first, **{f"teacher_{number}": model for number, model in enumerate(further, start=2)}}


def load_shapes(config: RunConfig) -> dict[str, PretrainedConfig]:
    """Load the configs of `student`, `teacher` and further teachers; a run without one has the student's for both.

    Of a student that takes some layers of a bigger model, it is the config of the first so many: which ones they are is
    chosen later.

    Raises:
        UserError: for all that could not be loaded, or the student's model has fewer layers.
    """
    names = {"student": config.student.name}
    names |= {role: model.name or config.student.name for role, model in teachers_by_role(config).items()}
    shapes = loading.load_each(loading.load_config, names)

    count = config.student.layers
    if count is not None:
        layers.require_count(shapes["student"], count)
        shapes["student"] = layers.cut_config(shapes["student"], range(count))
    return shapes


def load_tokenizers(config: RunConfig) -> dict[str, PreTrainedTokenizerBase]:
    """Load the tokenizers of `student`, `teacher` and further teachers; a run without one has the student's for both.

    Raises:
        UserError: for all that could not be loaded.
    """
    student = config.student.tokenizer or config.student.name
    names = {"student": student}
    names |= {role: model.tokenizer or model.name or student for role, model in teachers_by_role(config).items()}
    return loading.load_each(loading.load_tokenizer, names)
