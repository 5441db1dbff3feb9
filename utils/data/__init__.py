"""Text from files and hubs, as documents, windows and batches.

In the order in which text passes through them:

- `data_folders`: which files of a folder are data
- `tool_calls`: schemas of functions and calls of them, in the forms that data sets have
- `conversations`: what a conversation may contain, and how it is written
- `columns`: which columns of a table hold documents
- `sources`: files, folders and hub data sets -> documents with their places
- `routes`: which documents are for which teachers
- `texts`: documents in memory, as UTF-8
- `documents`: all sources -> the documents to train on and to evaluate on
- `windows`: documents -> windows, kept on disk
- `batch_order`: which windows a process works on in which step
- `loader`: windows in that order -> collated batches
- `delivery`: a count of what a loader yields
- `stream`: text that is larger than memory, block by block
- `stories`: text of the first run, put together from sentences written for it
"""

from .batch_order import BatchGeometry, permutation, step_batches
from .documents import Corpus, load_documents
from .loader import some_batches
from .windows import make_windows

__all__ = [
    "BatchGeometry",
    "Corpus",
    "load_documents",
    "make_windows",
    "permutation",
    "some_batches",
    "step_batches",
]
