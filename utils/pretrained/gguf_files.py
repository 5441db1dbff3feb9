"""GGUF files, the format of llama.cpp, as a source of models.

transformers puts the quantised weights of a GGUF file back into float32, which takes a minute or two for every look at
it, and what comes out can neither be saved nor trained as it is. So a file is converted once, into a plain model folder
in the cache, named by the file's hash; everything else reads that folder like any other.
"""

import copy
import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from filelock import FileLock
from packaging.version import Version
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from ..errors import UserError
from ..files import atomic_folder, sha256_of, write_text
from ..git_lfs import is_lfs_pointer
from ..machine.packages import require
from ..paths import cache_dir
from . import gguf_splits
from .families import auto_class
from .precision import quantisation_method

log = logging.getLogger(__name__)

SUFFIX = ".gguf"
MAGIC = b"GGUF"
"""First bytes of every GGUF file."""

FORMAT = "gguf-3"
"""Name of converted folders, and the version of what is in them."""

PART = re.compile(r"-\d+-of-(?P<parts>\d+)$")
"""End of the name, without suffix, of a file that is one of several parts: NAME-00001-of-00003.gguf."""

OLDEST_TRANSFORMERS = "5.18"
"""First release that reads SentencePiece's tokenizers in GGUF files right. 5.17 cuts Gemma's words into other pieces
("▁l itt le"): the same model then has 13.4 bits per byte in place of 1.2 (measured)."""

NO_TOKENIZER = "no_tokenizer.txt"
"""File that a converted folder has in place of a tokenizer: why there is none."""


class GgufName(NamedTuple):
    """A GGUF file as a user names it."""

    source: str
    """Folder or hub id; empty: `file` is a path."""

    file: str


def parse(name: str) -> GgufName | None:
    """Return the parts of a name: `FILE.gguf`, `FOLDER:FILE.gguf` or `HUB-ID:FILE.gguf`; None: of no GGUF file."""
    if not name.lower().endswith(SUFFIX):
        return None

    source, _, file = name.rpartition(":")
    is_drive_letter = len(source) == 1 and file.startswith(("\\", "/"))
    return GgufName("", name) if is_drive_letter else GgufName(source, file)


# ------------------------------------------------------------------------------------------ conversion


def plain_folder(file: Path, label: str) -> Path:
    """Return the plain model folder made from a GGUF file: config, float32 safetensors, tokenizer; made once.

    Args:
        label: role and name, for messages.

    Raises:
        UserError: it is no GGUF file, transformers cannot read it, the package is missing, or the cache has no room.
    """
    _require_gguf(file, label)
    folder = cache_dir() / f"{FORMAT}-{fingerprint(file)[:16]}"
    if folder.is_dir():
        return folder

    require("gguf", f"{label}, a GGUF file,", extra="gguf")
    _require_transformers(label)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # several processes, or several runs, may want it at the same time
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _convert(file, folder, label)
    except OSError as error:
        raise UserError(
            f"{label}: cannot be converted into {folder}: {error}. Expected room for 4 bytes a parameter there; set "
            "CURRICULUM_DISTILLATION_CACHE to another folder."
        ) from error
    return folder


def _require_transformers(label: str) -> None:
    """Check that transformers is new enough to read tokenizers of GGUF files.

    Raises:
        UserError: it is not.
    """
    version = transformers.__version__
    if Version(version) < Version(OLDEST_TRANSFORMERS):
        raise UserError(
            f"{label}: transformers {version} reads the tokenizers of some GGUF files wrong. Expected "
            f"{OLDEST_TRANSFORMERS} or newer: pip install --upgrade transformers"
        )


def fingerprint(file: Path) -> str:
    """Return the hash of a file's contents, which is read once as long as it does not change."""
    facts = file.stat()
    return _hash(file, facts.st_size, facts.st_mtime_ns)


@cache
def _hash(file: Path, size: int, modified: int) -> str:
    return sha256_of(file)


def _require_gguf(file: Path, label: str) -> None:
    """Check that a file is one whole GGUF file.

    Raises:
        UserError: it is something else, or one part of several.
    """
    if is_lfs_pointer(file):
        raise UserError(
            f"{label}: this file only points to the one that is meant (git without LFS). Run `git lfs pull` in its "
            "folder, or download it with `hf download`."
        )
    with open(file, "rb") as stream:
        start = stream.read(len(MAGIC))
    if start != MAGIC:
        raise UserError(
            f"{label}: this is no GGUF file: it begins with {start!r}, expected {MAGIC!r}. Is the download complete?"
        )

    part = PART.search(file.stem)
    if part is not None and int(part["parts"]) > 1:
        raise UserError(
            f"{label}: this is one part of several. Expected a single file: `llama-gguf-split --merge FIRST_PART "
            "WHOLE` of llama.cpp makes one."
        )


def _convert(file: Path, folder: Path, label: str) -> None:
    """Write the plain folder; it is whole or absent."""
    log.info("%s: converting the GGUF file into %s, once; this takes a minute or two", label, folder)
    config = _read(AutoConfig.from_pretrained, file, label)

    from_pretrained = auto_class(config).from_pretrained
    model, loading_info = _read(from_pretrained, file, label, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(loading_info["missing_keys"]):
        raise UserError(
            f"{label}: its weights lack {len(missing)} tensors of a {type(model).__name__}, such as {missing[0]}. "
            "Expected all of them: is the download complete? Else give the model that the file was made from."
        )

    with atomic_folder(folder) as staging:
        plain_copy(model).save_pretrained(staging)
        _write_tokenizer(file, staging)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a model that can be saved, with the weights of one that was dequantised and calls itself quantised still.

    The two share their weights; other buffers of the copy are empty.
    """
    config = copy.deepcopy(model.config)
    if quantisation_method(config) is not None:
        del config.quantization_config

    with torch.device("meta"):
        plain = auto_class(config).from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain


def _write_tokenizer(file: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file, or else why there is none: another can be given beside the model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        gguf_splits.correct(tokenizer, file)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # an unknown type is a KeyError, an odd vocabulary anything
        reason = f"transformers {transformers.__version__}: {type(error).__name__}: {' '.join(str(error).split())}"
        write_text(folder / NO_TOKENIZER, reason + "\n")


def _read(from_pretrained: Callable[..., Any], file: Path, label: str, **options: Any) -> Any:
    """Load a part of a GGUF file with transformers.

    Raises:
        UserError: transformers cannot.
    """
    try:
        return from_pretrained(file.parent, gguf_file=file.name, **options)
    except Exception as error:  # several libraries raise errors of their own for files that do not fit
        words = " ".join(str(error).split())
        raise UserError(
            f"{label}: transformers {transformers.__version__} cannot read this GGUF file of "
            f"{file.stat().st_size:,} bytes. Expected a whole file (compare its size with that on its page) of an "
            "architecture that the documentation of transformers on GGUF names, such as llama, qwen3, gemma3 or gpt2. "
            "For any other give the model that the file was made from: its page on the hub names it.\n  "
            f"{type(error).__name__}: {words}"
        ) from error


# ------------------------------------------------------------------------------------------- tokenizer


def require_tokenizer(folder: Path, name: str, role: str) -> None:
    """Check that a converted folder has a tokenizer; any other folder passes.

    Raises:
        UserError: the file's own one is of a type that transformers cannot read.
    """
    note = folder / NO_TOKENIZER
    if note.is_file():
        raise UserError(
            f"{role} {name}: transformers cannot read the tokenizer in this GGUF file. Give that of the model that the "
            f"file was made from: --set {role}.tokenizer=ID_OR_FOLDER. After an update of transformers delete "
            f"{folder}: it is made anew then.\n  " + note.read_text(encoding="utf-8").strip()
        )
