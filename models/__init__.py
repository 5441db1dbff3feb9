"""Learning: alignment, projection, losses, curriculum, and the framework that joins them."""

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
