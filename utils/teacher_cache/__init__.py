"""The teacher's signals on disk, computed once and read by every later epoch and run.

codec                one window's signal as few bytes
store                shards of windows, found by their content
manifest             what a cache was built from, and whether it fits a run
building             the cache of a run: opened, forecast and filled beforehand
conversation_date    the day on which a run reads its conversations, which caches depend on
"""

from .building import CacheBuilding, cache_statistics, flush_cache, open_teacher_cache
from .codec import Codec, Said
from .manifest import open_cache
from .store import TeacherCache

__all__ = [
    "CacheBuilding",
    "Codec",
    "Said",
    "TeacherCache",
    "cache_statistics",
    "flush_cache",
    "open_cache",
    "open_teacher_cache",
]
