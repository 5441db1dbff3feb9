"""The teacher's side: what it says of a batch, how that is stored, and how it reaches the student's vocabulary.

frozen       FrozenTeacher: a language model that is only read; `PairedBatch` -> `TeacherSignal`
cached       CachedTeacher: the same from a store of signals; RememberingCollator reads the store ahead
listed       ListedTeacher: the same from lists of the most probable tokens, as a server gives them
mixture      TeacherMixture: several teachers, mixed on the student's vocabulary
top_k        the largest logits of long rows, and the mass of the others
projection   Projection: `TeacherSignal` -> `SparseTarget`, the teacher's distribution on the student's vocabulary
"""

from .cached import CachedTeacher, RememberingCollator
from .frozen import FrozenTeacher
from .listed import ListedReader, ListedTeacher, ListedTokens
from .mixture import Member, TeacherMixture
from .projection import Projection

__all__ = [
    "CachedTeacher",
    "FrozenTeacher",
    "ListedReader",
    "ListedTeacher",
    "ListedTokens",
    "Member",
    "Projection",
    "RememberingCollator",
    "TeacherMixture",
]
