"""Learning: alignment, projection, losses, curriculum, and the framework that joins them.

A name is loaded when it is first asked for: settings are read and checked without torch, which takes seconds to load.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, which do not call __getattr__
    from .config import CurriculumConfig, LossConfig, Ramp, RouterConfig, Term
    from .curriculum import CurriculumScheduler
    from .distillation import Distillation, Method
    from .distillation_framework import DistillationFramework
    from .student_aware_router import StudentAwareRouter
    from .teacher.cached import CachedTeacher
    from .teacher.frozen import FrozenTeacher
    from .text.collate import PairCollator
    from .text.vocabulary import VocabularyMap
    from .text.windows import PairEncoder

__all__ = [
    "CachedTeacher",
    "CurriculumConfig",
    "CurriculumScheduler",
    "Distillation",
    "DistillationFramework",
    "FrozenTeacher",
    "LossConfig",
    "Method",
    "PairCollator",
    "PairEncoder",
    "Ramp",
    "RouterConfig",
    "StudentAwareRouter",
    "Term",
    "VocabularyMap",
]

_MODULES = {
    "CachedTeacher": ".teacher.cached",
    "CurriculumConfig": ".config",
    "CurriculumScheduler": ".curriculum",
    "Distillation": ".distillation",
    "DistillationFramework": ".distillation_framework",
    "FrozenTeacher": ".teacher.frozen",
    "LossConfig": ".config",
    "Method": ".distillation",
    "PairCollator": ".text.collate",
    "PairEncoder": ".text.windows",
    "Ramp": ".config",
    "RouterConfig": ".config",
    "StudentAwareRouter": ".student_aware_router",
    "Term": ".config",
    "VocabularyMap": ".text.vocabulary",
}
"""Name -> the module that it comes from."""


def __getattr__(name: str) -> Any:
    """Load a name of `__all__` (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    """Name what can be asked for, for completion in an editor."""
    return sorted({*globals(), *__all__})
