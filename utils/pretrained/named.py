"""Configs and tokenizers of the models that a run names; no weights."""

from contextlib import suppress

from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase

from ..config.protocols import RunConfig
from ..config.settings import ModelConfig, StudentConfig
from ..errors import UserError
from . import layers, loading

UNLIMITED = 10**9
"""Tokens that a teacher elsewhere reads at most, until its server is asked."""


def teachers_by_role(config: RunConfig) -> dict[str, ModelConfig]:
    """Return the settings of `teacher` and, where there are several, of `teacher_2` and so on."""
    first, *further = config.several_teachers or [config.teacher]
    return {"teacher": first, **{f"teacher_{number}": model for number, model in enumerate(further, start=2)}}


def load_shapes(config: RunConfig) -> dict[str, PretrainedConfig]:
    """Load the configs of `student`, `teacher` and further teachers; a run without one has the student's for both.

    Of a student that takes some layers of a bigger model, it is the config of the first so many: which ones they are is
    chosen later.

    Raises:
        UserError: for all that could not be loaded; the student's model has fewer layers, or none can be made of so
            many.
    """
    names = {"student": config.student.name}
    teachers = teachers_by_role(config)
    names |= {role: model.name or config.student.name for role, model in teachers.items() if not model.is_elsewhere}
    shapes = loading.load_each(loading.load_config, names)
    # In the order of the sides of a window.
    for role, model in teachers.items():
        if model.is_elsewhere:
            shapes[role] = _shape_of_tokenizer(model.tokenizer, f"{role}.tokenizer")
        else:
            shapes[role] = shapes.pop(role)

    count = config.student.layers
    if count is not None:
        layers.require_count(shapes["student"], count)
        shapes["student"] = layers.cut_config(shapes["student"], range(count))
        layers.weightless_model(shapes["student"])
    return shapes


def _shape_of_tokenizer(tokenizer: str, setting: str) -> PretrainedConfig:
    """Return a config that stands for that of a teacher elsewhere: of its sizes only the rows of its head matter here.

    Raises:
        UserError: its tokenizer could not be loaded.
    """
    rows = len(loading.load_tokenizer(tokenizer, setting))
    # A model's head may have more rows than its tokenizer has tokens; its config may lie beside the tokenizer.
    with suppress(UserError):
        rows = max(rows, loading.load_config(tokenizer, setting).get_text_config().vocab_size)
    return LlamaConfig(
        vocab_size=rows,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=UNLIMITED,
    )


def load_tokenizers(config: RunConfig) -> dict[str, PreTrainedTokenizerBase]:
    """Load the tokenizers of `student`, `teacher` and further teachers; a run without one has the student's for both.

    Raises:
        UserError: for all that could not be loaded.
    """
    student = config.student.tokenizer or config.student.name
    models: dict[str, StudentConfig | ModelConfig] = {"student": config.student, **teachers_by_role(config)}
    names = {role: model.tokenizer or model.name or student for role, model in models.items()}

    def load(name: str, role: str) -> PreTrainedTokenizerBase:
        # A fault of a tokenizer that is named by itself is no fault of the model's.
        setting = role if models[role].tokenizer is None else f"{role}.tokenizer"
        return loading.load_tokenizer(name, setting)

    return loading.load_each(load, names)
