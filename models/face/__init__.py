"""Curriculum Distillation: teach a small language model from a large one, across tokenizers.

These are the names for a program of your own; README and docs/library.md show them at work. A name is loaded when it
is first asked for, so that `import curriculum_distillation` alone costs nothing.

This file is the package `curriculum_distillation` itself once the project is installed (setup.cfg, `package_dir`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, which do not call __getattr__
    from .models import (
        CachedTeacher,
        CurriculumConfig,
        CurriculumScheduler,
        Distillation,
        DistillationFramework,
        FrozenTeacher,
        LossConfig,
        Method,
        PairCollator,
        PairEncoder,
        Ramp,
        RouterConfig,
        StudentAwareRouter,
        Term,
        VocabularyMap,
    )
    from .towers import distil
    from .utils.config import TrainingConfig
    from .utils.errors import UserError
    from .utils.training import LoopOptions, fit
    from .utils.training.distillation_trainer import DistillationTrainer

__all__ = [
    "CachedTeacher",
    "CurriculumConfig",
    "CurriculumScheduler",
    "Distillation",
    "DistillationFramework",
    "DistillationTrainer",
    "FrozenTeacher",
    "LoopOptions",
    "LossConfig",
    "Method",
    "PairCollator",
    "PairEncoder",
    "Ramp",
    "RouterConfig",
    "StudentAwareRouter",
    "Term",
    "TrainingConfig",
    "UserError",
    "VocabularyMap",
    "distil",
    "fit",
]

_MODULES = {
    "DistillationTrainer": ".utils.training.distillation_trainer",
    "LoopOptions": ".utils.training",
    "TrainingConfig": ".utils.config",
    "UserError": ".utils.errors",
    "distil": ".towers",
    "fit": ".utils.training",
}
"""Modules of the names that do not come from `.models`."""


def __getattr__(name: str) -> Any:
    """Load a name of `__all__` (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    module = import_module(_MODULES.get(name, ".models"), __name__)
    return getattr(module, name)


def __dir__() -> list[str]:
    """Name what can be asked for, for completion in an editor."""
    return sorted({*globals(), *__all__})
