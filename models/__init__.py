"""What is learned: alignment, projection, losses, curriculum, and the framework that joins them."""

from .cached_teacher import CachedTeacher
from .config import CurriculumConfig, LossConfig, Ramp, RouterConfig, Term
from .curriculum import CurriculumScheduler
from .distillation_framework import DistillationFramework
from .pairing import PairCollator, PairEncoder
from .student_aware_router import StudentAwareRouter
from .teacher import FrozenTeacher
from .vocabulary import VocabularyMap

__all__ = [
    "CachedTeacher",
    "CurriculumConfig",
    "CurriculumScheduler",
    "DistillationFramework",
    "FrozenTeacher",
    "LossConfig",
    "PairCollator",
    "PairEncoder",
    "Ramp",
    "RouterConfig",
    "StudentAwareRouter",
    "Term",
    "VocabularyMap",
]
