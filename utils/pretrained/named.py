"""Configs and tokenizers of the two models that a run names; no weights."""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..config.protocols import RunConfig
from . import layers, loading


def load_shapes(config: RunConfig) -> dict[str, PretrainedConfig]:
    """Load the configs of `student` and `teacher`; a run without a teacher has the student's for both.

    Of a student that takes some layers of a bigger model, it is the config of the first so many: which ones they are is
    chosen later.

    Raises:
        UserError: for all that could not be loaded, or the student's model has fewer layers.
    """
    names = {"student": config.student.name, "teacher": config.teacher.name or config.student.name}
    shapes = loading.load_each(loading.load_config, names)

    count = config.student.layers
    if count is not None:
        layers.require_count(shapes["student"], count)
        shapes["student"] = layers.cut_config(shapes["student"], range(count))
    return shapes


def load_tokenizers(config: RunConfig) -> dict[str, PreTrainedTokenizerBase]:
    """Load the tokenizers of `student` and `teacher`; a run without a teacher has the student's for both.

    Raises:
        UserError: for all that could not be loaded.
    """
    student = config.student.tokenizer or config.student.name
    teacher = config.teacher.tokenizer or config.teacher.name
    return loading.load_each(loading.load_tokenizer, {"student": student, "teacher": teacher or student})
