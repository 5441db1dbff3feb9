"""What no single section of a run's configuration can know: settings that contradict each other."""

from collections.abc import Sequence
from typing import Any

from .quickstart_names import NAMES


def contradictions(config: Any, heads: Sequence[str]) -> list[str]:
    """Every contradiction, with what to do about it.

    Args:
        config: of a whole run.
        heads: terms on the student's own predictions; one of them is needed to learn from.
    """
    wrong = []
    if config.student.name is None:
        wrong.append("no student: give --student ID or DIR")
    if config.student.lora.enabled and config.student.name in NAMES:
        wrong.append("--lora adapts trained weights, and the embedded student has none: give --student ID or DIR")
    if config.student.lora.enabled and config.student.init == "random":
        wrong.append("lora adapts trained weights, and init is random: leave out --lora or the random start")
    if config.student.lora.merge and not config.student.lora.enabled:
        wrong.append("lora.merge is for a student with an adapter: give --lora too")
    if not config.data.train:
        wrong.append("no training data: give --train-data")
    used = config.curriculum.used()
    if not used & {*heads}:
        wrong.append(f"nothing to learn from: the weights of {', '.join(heads)} are 0; raise one of them")
    signals = sorted(used - {"lm"})
    if config.teacher.name is None and signals:
        wrong.append(f"no teacher, but {' and '.join(signals)} weigh more than 0: give --teacher or set them to 0")
    if config.teacher.name is None and config.evaluation.without_teacher:
        wrong.append("evaluation.without_teacher compares with a run that has a teacher: give --teacher")
    if config.cache.folder and config.teacher.name is None:
        wrong.append("a teacher cache, but no teacher: give --teacher")
    if config.training.patience and not config.evaluation.every:
        wrong.append("training.patience counts evaluations, and evaluation.every is 0: give --eval-every")
    return wrong
