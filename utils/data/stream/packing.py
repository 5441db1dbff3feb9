"""Documents -> windows in a file, in this process or in workers."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

from ...machine.stop_signals import ignore_stop_signals
from ..documents import document_name
from ..windows import DOCUMENTS_PER_PACK, Encode, Window

PACK_BYTES = 1_000_000
"""Text that is packed into windows at once, about: neither windows nor their order depend on the number of workers."""


@dataclass(frozen=True)
class Packer:
    """Packs a group of documents, as `windows.make_windows` does."""

    encode: Encode
    features: datasets.Features
    """Columns and types of windows."""

    def __call__(self, texts: list[str], file: Path) -> int:
        """Write the windows of documents to a file; return their number, and write none where there are none."""
        windows = self.encode(texts, [document_name(text) for text in texts])
        write_windows(windows, self.features, file)
        return len(windows)


def write_windows(windows: list[Window], features: datasets.Features, file: Path) -> None:
    """Write windows to a file, unless there are none."""
    if not windows:
        return
    with ArrowWriter(path=str(file), features=features) as writer:
        writer.write_batch({name: [window[name] for window in windows] for name in features})
        writer.finalize()


def groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the documents that are packed together."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= PACK_BYTES or len(group) == DOCUMENTS_PER_PACK:
            yield group
            group = []
            size = 0
    if group:
        yield group


class Workers:
    """Pack groups of documents, in worker processes where there are any.

    Args:
        count: of worker processes; 0: this thread does the work.
    """

    def __init__(self, packer: Packer, count: int) -> None:
        self.packer = packer
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def pack(self, texts: Iterable[str], folder: Path, check: Callable[[], None]) -> list[Path]:
        """Write the windows of documents to files in a folder; return the files, in the order of the documents.

        Args:
            check: called between two groups; it raises where the windows are not needed any more.
        """
        files: list[Path] = []
        if not self.count:
            for number, group in enumerate(groups(texts)):
                check()
                files.append(_file(folder, number))
                self.packer(group, files[-1])
            return [file for file in files if file.exists()]

        # Few groups wait: the text of a block need not be in memory as a whole.
        waiting: list[Any] = []
        for number, group in enumerate(groups(texts)):
            check()
            files.append(_file(folder, number))
            waiting.append(self._started().submit(_pack, group, files[-1]))
            if len(waiting) > 2 * self.count:
                waiting.pop(0).result()
        for packed in waiting:
            packed.result()
        return [file for file in files if file.exists()]

    def _started(self) -> ProcessPoolExecutor:
        """Return the worker processes, started at the first call."""
        # Not forked: this process has threads, and perhaps a GPU.
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, context, _start_worker, (self.packer,))
        return self._pool

    def close(self) -> None:
        """End the worker processes, once they are done with what they work on."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _file(folder: Path, number: int) -> Path:
    """Return the file of a group."""
    return folder / f"windows-{number:05d}.arrow"


_packer: Packer | None = None
"""Of a worker process."""


def _start_worker(packer: Packer) -> None:
    """Make this process a worker, which ends with the process that started it."""
    global _packer
    _packer = packer
    ignore_stop_signals()

    # A parent that is killed cannot end its workers, which would wait for work for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """Wait for the end of the parent process, and end this one."""
    parent.join()
    os._exit(0)


def _pack(texts: list[str], file: Path) -> int:
    """Pack documents in a worker process."""
    assert _packer is not None
    return _packer(texts, file)
