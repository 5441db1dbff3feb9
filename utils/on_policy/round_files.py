"""Texts of a round on disk: written before anything is learned from them, so that a run goes on in mid-round.

    OUTPUT/rounds/step-XXXXXXXX.json.gz     of the round that begins behind so many optimizer steps

A file appears whole or not at all. It holds the sampled ids, which are what the student learns from, the settings that
they were written with, and for people the prompts and texts.
"""

import gzip
import json
import logging
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..files import free_disk, write_bytes

log = logging.getLogger(__name__)

FILE_NAME = re.compile(r"step-(\d{8})\.json\.gz")
FORMAT = 2


@dataclass(frozen=True)
class WrittenText:
    """Tokens that the student wrote in one slot."""

    step: int
    """Optimizer step that learns from it, counted from 0."""
    slot: int
    window: int
    """Index of the given window whose beginning is its prompt."""
    ids: Sequence[int] | None
    """None: the window has no place behind which something could be written."""


class RoundFiles:
    """The files of a run's rounds.

    Args:
        folder: `OUTPUT/rounds`; created at the first write.
        settings: of prompts and sampling; texts that were written with others are not read.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.settings = dict(settings or {})

    def write(self, first_step: int, texts: Sequence[WrittenText], shown: Sequence[dict[str, Any]]) -> None:
        """Write the texts of a round.

        Args:
            shown: prompts and texts for people.

        Raises:
            RunError: the disk is full, or the folder may not be written to.
        """
        value = {
            "format": FORMAT,
            "settings": self.settings,
            "texts": [asdict(text) for text in texts],
            "shown": list(shown),
        }
        content = gzip.compress(json.dumps(value).encode(), mtime=0)

        file = self._file(first_step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(file, content)
        except OSError as error:
            raise RunError(
                f"{file} cannot be written: {error.strerror or error}; needs {len(content) / 1e6:,.1f} MB, "
                f"{free_disk(self.folder) / 1e6:,.1f} MB are free. Free some space there, then the same command "
                "continues, from its newest checkpoint if it has one."
            ) from error

    def read(self, first_step: int) -> list[WrittenText] | None:
        """Return the texts of a round; None where there are none of these settings, or none that are whole."""
        value = self._content(self._file(first_step))
        return None if value is None else value["texts"]

    def newest_shown(self) -> tuple[int, list[dict[str, Any]]] | None:
        """Return the step at which the last round began, and its prompts and texts for people; None: there is none."""
        for step, file in sorted(self._steps().items(), reverse=True):
            value = self._content(file)
            if value is not None:
                return step, value["shown"]
        return None

    def remove_after(self, step: int | None) -> None:
        """Remove the rounds that begin behind a step, where a run goes on; None: all, for a run that begins."""
        self._remove(lambda first: step is None or first > step)

    def remove_before(self, step: int) -> None:
        """Remove the rounds that begin before a step."""
        self._remove(lambda first: first < step)

    def _remove(self, is_outdated: Any) -> None:
        for step, file in self._steps().items():
            if is_outdated(step):
                try:
                    file.unlink(missing_ok=True)
                except OSError as error:
                    log.warning("old texts %s could not be removed: %s", file, error)

    def _steps(self) -> dict[int, Path]:
        """Return every file by the step at which its round begins."""
        files = {}
        for path in self.folder.glob("step-*") if self.folder.is_dir() else ():
            if match := FILE_NAME.fullmatch(path.name):
                files[int(match[1])] = path
        return files

    def _file(self, first_step: int) -> Path:
        return self.folder / f"step-{first_step:08d}.json.gz"

    def _content(self, file: Path) -> dict[str, Any] | None:
        """Return what a file holds; None where there is none of these settings, or none that is whole, which is
        logged."""
        try:
            value = json.loads(gzip.decompress(file.read_bytes()))
            if value["format"] != FORMAT:
                problem = f"format {value['format']}"
            elif value["settings"] != self.settings:
                problem = "other settings"
            else:
                texts = [WrittenText(**text) for text in value["texts"]]
                return {"texts": texts, "shown": value["shown"]}
        except FileNotFoundError:
            return None
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            problem = type(error).__name__
        log.warning("texts of the student in %s are not used (%s)", file, problem)
        return None
