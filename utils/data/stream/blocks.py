"""Blocks of windows on disk, of which the next one is made while the one before is trained on.

A block is a folder `block-NUMBER-KEY`:

    carried.arrow           windows that did not fill a step of the block before
    windows-NUMBER.arrow    windows of its documents
    block.pt                number of windows and steps, and the state of the stream behind it; written last

What is in a block is a pure function of the state of the stream at its beginning, which every checkpoint in it has.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from ...config.settings import DataConfig
from ...errors import RunError, value_errors_are_the_users
from ...files import atomic_folder, clean_leftovers, remove_folder
from ..batch_order import permutation
from ..documents import errors_name_their_document
from ..windows import Encode, Window
from .beginning import Beginning
from .packing import Packer, Workers, write_windows
from .text import TextStream

log = logging.getLogger(__name__)

BLOCK = "block.pt"
CARRIED = "carried.arrow"

State = dict[str, Any]
"""Everything that the rest of a stream depends on, in plain containers, numbers and tensors."""

PATIENCE = 0.2
"""Seconds between two looks at whether a run that waits for a block is to end."""


@dataclass(frozen=True)
class StreamSetUp:
    """A stream that can be begun: its text, and how it is cut into windows."""

    beginning: Beginning
    encode: Encode
    features: datasets.Features
    """Columns and types of windows."""
    fingerprint: str
    """Of `encode`."""

    @property
    def config(self) -> DataConfig:
        """The settings of its text."""
        return self.beginning.text.config

    def text(self) -> TextStream:
        """Return its documents, from the first one on."""
        return TextStream(self.beginning.text, self.beginning.held_out)


@dataclass(frozen=True)
class Block:
    """A part of a stream that is shuffled as a whole."""

    folder: Path
    number: int
    """Counted from 0; the windows of each block have an order of their own."""
    first_step: int
    """Optimizer steps before it."""
    steps: int
    """Optimizer steps in it, each of them full."""
    passes: int
    """Over the text that were done before it."""
    counts: dict[str, int]
    """Documents of the stream up to its end, by `text.COUNTED`."""

    @property
    def end(self) -> int:
        """The first step behind it."""
        return self.first_step + self.steps

    def windows(self) -> datasets.Dataset:
        """Return its windows, which stay on the disk."""
        return _windows_in(self.folder)


class _Outdated(Exception):
    """Nobody needs a block that is being made."""


class Blocks:
    """Makes the blocks of a stream, in one process, one of them ahead.

    Args:
        folder: of the blocks; nothing else may be in it.
        global_batch: windows of an optimizer step.
        seed: of the order of windows.
        check: called while a block is waited for; it raises where the run is to end.
    """

    def __init__(
        self, setup: StreamSetUp, folder: Path, *, global_batch: int, seed: int, check: Callable[[], None]
    ) -> None:
        self.setup = setup
        self.folder = folder
        self.global_batch = global_batch
        self.seed = seed
        self._check = check
        self._stream = setup.text()
        self._states: dict[int, State] = {0: self._first_state()}
        self._workers = Workers(Packer(setup.encode, setup.features), setup.config.num_workers)
        self._thread = ThreadPoolExecutor(1, "blocks")
        self._ahead: dict[int, Future[Block]] = {}
        self._is_outdated = threading.Event()

    def _first_state(self) -> State:
        """Return the state at the beginning of the stream."""
        return {"number": 0, "first_step": 0, "text": self._stream.state_dict(), "carried": []}

    def at(self, step: int) -> Block:
        """Return the block that an optimizer step is in."""
        block = self._made(max(first for first in self._states if first <= step))
        while step >= block.end:
            block = self._made_behind(block)

        self._forget_before(block)
        self._log(block)
        return block

    def begin_behind(self, block: Block) -> None:
        """Begin to make the block behind one."""
        self._states[block.end] = self._state_behind(block)
        self._begin(block.end)

    def _made_behind(self, block: Block) -> Block:
        """Return the block behind one."""
        self._states[block.end] = self._state_behind(block)
        # A block without a step is replaced by the one behind it.
        if block.steps == 0:
            self._ahead.pop(block.end, None)
        return self._made(block.end)

    def _made(self, first_step: int) -> Block:
        """Wait for the block that begins at a step."""
        self._begin(first_step)
        future = self._ahead[first_step]
        while True:
            try:
                return future.result(PATIENCE)
            except TimeoutError:
                self._check()

    def _begin(self, first_step: int) -> None:
        """Let the thread make the block that begins at a step, unless it does or did already."""
        if first_step not in self._ahead:
            self._ahead[first_step] = self._thread.submit(self._make, self._states[first_step])

    def _forget_before(self, block: Block) -> None:
        """Delete the blocks but this one, the one before, and the next."""
        older = sorted(first for first in self._states if first < block.first_step)
        for first in older[:-1]:
            del self._states[first]
            self._ahead.pop(first, None)

        for path in self.folder.glob("block-*"):
            if int(path.name.split("-")[1]) < block.number - 1:
                remove_folder(path)

    def _log(self, block: Block) -> None:
        """Log where the stream is."""
        counts = block.counts
        log.info(
            "stream: block %d, %s steps from step %s on, pass %d over the text; up to its end %s documents read, %s to "
            "learn from (%.2f MB), left out: %s empty, %s seen before, %s held out",
            block.number + 1,
            f"{block.steps:,}",
            f"{block.first_step:,}",
            block.passes + 1,
            f"{counts['read']:,}",
            f"{counts['train']:,}",
            counts["train_bytes"] / 1e6,
            f"{counts['empty']:,}",
            f"{counts['duplicate']:,}",
            f"{counts['in_eval']:,}",
        )

        before = self._states[block.first_step]["text"]["readers"]
        behind = self._state_behind(block)["text"]["readers"]
        for reader, begun, ended in zip(self._stream.readers, before, behind, strict=True):
            if ended["passes"] > begun["passes"]:
                hint = " (docs/choosing.md has weights for text that repeats)" if ended["passes"] == 1 else ""
                log.info("stream: in it %s ends, and is read again: pass %d%s", reader.name, ended["passes"] + 1, hint)

    # --- making -----------------------------------------------------------------------------------------------------

    def _make(self, state: State) -> Block:
        """Make the block that begins with a state, or take it from the disk; in the thread."""
        final = self.folder / f"block-{state['number']:06d}-{self._key(state)}"
        made = _read_made(final)
        if made is None:
            try:
                with _errors_of_text(self.setup.config), atomic_folder(final) as folder:
                    self._write(state, folder)
            except OSError as error:
                raise RunError(
                    f"The next block of the stream cannot be made in {self.folder}: {error}. Where the disk is full, "
                    "free some space, or give a smaller data.block_bytes; then the same command continues."
                ) from error

            made = torch.load(final / BLOCK, weights_only=True)
        return Block(
            folder=final,
            number=state["number"],
            first_step=state["first_step"],
            steps=made["state"]["first_step"] - state["first_step"],
            passes=min(reader["passes"] for reader in state["text"]["readers"]),
            counts=made["state"]["text"]["counts"],
        )

    def _key(self, state: State) -> str:
        """Return a hash of what a block depends on beside what its state was made from."""
        setup, text = self.setup, state["text"]
        held_out = blake2b(b"".join(sorted(setup.beginning.held_out)), digest_size=8).hexdigest()
        facts: list[Any] = [setup.beginning.fingerprint, held_out, setup.fingerprint, str(setup.features)]
        facts += [setup.config.block_bytes, setup.config.deduplicate, setup.config.remembered_documents]
        facts += [self.global_batch, self.seed, state["first_step"], text["readers"], text["drawn"]]
        return blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

    def _write(self, state: State, folder: Path) -> None:
        """Write the files of a block."""
        carried = [_window(row) for row in state["carried"]]
        write_windows(carried, self.setup.features, folder / CARRIED)
        # Where the last block ended the readers are there already, and go on in open files.
        if self._stream.drawn != state["text"]["drawn"]:
            self._stream.load_state_dict(state["text"])
        texts = self._stream.block(self.setup.config.block_bytes)
        self._workers.pack(texts, folder, self._require_need)

        # The rest of its order is carried into the next block: every step is full, and no window is lost.
        windows = _windows_in(folder) if any(folder.iterdir()) else []
        steps = len(windows) // self.global_batch
        order = permutation(len(windows), self.seed, state["number"])
        rest = order[steps * self.global_batch :].tolist()
        behind = {
            "number": state["number"] + 1,
            "first_step": state["first_step"] + steps,
            "text": self._stream.state_dict(),
            "carried": [_plain(windows[index]) for index in rest],
        }
        torch.save({"state": behind}, folder / BLOCK)

    def _require_need(self) -> None:
        """Check that a block that is being made is still needed.

        Raises:
            _Outdated: it is not.
        """
        if self._is_outdated.is_set():
            raise _Outdated

    def _state_behind(self, block: Block) -> State:
        """Return the state at the end of a block."""
        return torch.load(block.folder / BLOCK, weights_only=True)["state"]

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self, step: int) -> State:
        """Return the state at the beginning of the block that a step is in, as a checkpoint holds it."""
        return self._states[max(first for first in self._states if first <= step)]

    def load_state_dict(self, state: State) -> None:
        """Go to where a stream of the same text was."""
        clean_leftovers(self.folder)
        self._states = {state["first_step"]: state}
        self._ahead = {}

    def close(self) -> None:
        """Stop making blocks."""
        self._is_outdated.set()
        self._thread.shutdown(cancel_futures=True)
        self._workers.close()

    def remove(self) -> None:
        """Delete all blocks."""
        remove_folder(self.folder)


@contextmanager
def _errors_of_text(config: DataConfig) -> Iterator[None]:
    """Name the document in errors about it."""
    with value_errors_are_the_users(), errors_name_their_document(config):
        yield


def _read_made(folder: Path) -> dict[str, Any] | None:
    """Return what a block on the disk was made with; None: there is none that is whole, and what is left is removed."""
    try:
        made = torch.load(folder / BLOCK, weights_only=True)
        _windows_in(folder)
        return made
    except FileNotFoundError:
        pass
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, UnpicklingError, pa.ArrowException) as error:
        log.warning("%s is not whole (%s) and is made again", folder, type(error).__name__)
    remove_folder(folder)
    return None


def _windows_in(folder: Path) -> datasets.Dataset:
    """Return the windows in the files of a folder."""
    parts = [datasets.Dataset.from_file(str(file)) for file in sorted(folder.glob("*.arrow"))]
    return datasets.concatenate_datasets(parts).with_format("numpy")


def _plain(window: Window) -> dict[str, Any]:
    """Return a window in values that a checkpoint can hold."""
    plain: dict[str, Any] = {}
    for name, value in window.items():
        if isinstance(value, np.ndarray) and value.ndim:
            plain[name] = torch.from_numpy(value.copy())
        else:
            plain[name] = value.item() if hasattr(value, "item") else value
    return plain


def _window(plain: dict[str, Any]) -> Window:
    """Return the window that `_plain` was called with."""
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in plain.items()}
