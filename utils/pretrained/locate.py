"""Location of a model's files: a local folder, an attached input of a notebook, the cache, or the hub."""

import logging
import os
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, hf_hub_download

from ..errors import UserError
from ..paths import user_path
from . import gguf_files, model_folders

log = logging.getLogger(__name__)

ATTACHED = Path("/kaggle/input")
"""Folder below which a notebook's attached models appear."""

CACHED_MODEL, SNAPSHOTS = "models--", "snapshots"
"""Beginning of the name of a model's folder in the hub's cache, where the owner follows, and the folder of its versions
in there."""

MOST_LISTED = 10
"""Models that a message lists."""

ATTACH = """\
To attach a model: give its local folder (config.json, weights and tokenizer.json); on Kaggle add it as an input
  of the notebook and give the folder below /kaggle/input; on a machine without internet download it elsewhere
  with `hf download ID` and set HF_HUB_OFFLINE=1 beside a copy of that cache (HF_HOME)."""


def locate(name: str, role: str, expected: str = "one with config.json") -> str:
    """Return what `from_pretrained` is to be given for a name: a local folder, else the hub id itself.

    A folder without config.json stands for the only model below it (Kaggle adds folders for framework, variation and
    version); a hub id stands for the attached folder of the same name, if there is one (see `model_folders.attached`).
    A GGUF file stands for the plain folder that it is converted into, see `gguf_files`.

    Args:
        role: of the model, or the setting that names it, for messages.
        expected: the kind of folder that is meant, for messages.

    Raises:
        UserError: a path that does not exist, a folder that holds no model, or several, or a name that stands for
            several attached ones.
    """
    file = gguf_file(name, role)
    if file is not None:
        return str(gguf_files.plain_folder(file, f"{role} {name}"))

    # A path of this machine goes before an attached model of the same name.
    path = user_path(name)
    if path.is_dir():
        return str(_only_model(path, f"{role} {name}"))
    if path.is_file():
        raise UserError(f"{role} {name}: this is a file. {model_folders.describe_file(path)}")
    if not model_folders.may_be_hub_id(name):  # it was meant as a path
        raise UserError(f"{role} {name}: no such folder. Expected {expected}.{attached_models()}\n  {ATTACH}")

    # Before the hub: whoever attaches a model to a notebook wants that copy, and may have no network.
    candidates = model_folders.attached(name, ATTACHED)
    if len(candidates) > 1:
        raise UserError(
            f"{role} {name}: {len(candidates)} attached models have that name. Expected one: give its folder."
            + "".join(f"\n  - {candidate}" for candidate in candidates[:MOST_LISTED])
        )
    if candidates:
        log.info("%s %s: using the attached folder %s", role, name, candidates[0])
        return str(candidates[0])
    return name


def locate_tokenizer(name: str, role: str) -> str:
    """Return what a tokenizer's `from_pretrained` is to be given: a folder with a tokenizer alone, else as `locate`.

    Raises:
        UserError: see `locate`.
    """
    folder = user_path(name)
    if model_folders.is_tokenizer(folder):
        return str(folder)
    return locate(name, role, "one with tokenizer.json, or a model whose tokenizer is meant")


def gguf_file(name: str, role: str) -> Path | None:
    """Return the GGUF file that a name stands for, fetched from the hub where it is there; None: another kind of name.

    Raises:
        UserError: there is no such file.
    """
    parts = gguf_files.parse(name)
    if parts is None or user_path(name).is_dir():
        return None

    file = local_path(name)
    if file.is_file():
        return file

    folder = file.parent
    is_local = not parts.source or user_path(parts.source).is_dir()
    if not is_local and model_folders.may_be_hub_id(parts.source):
        return _gguf_on_the_hub(parts, f"{role} {name}")

    where = f"It holds: {model_folders.listing(folder)}" if folder.is_dir() else f"There is no folder {folder}."
    raise UserError(
        f"{role} {name}: no such file. Expected a GGUF file: FILE.gguf, FOLDER:FILE.gguf or HUB-ID:FILE.gguf.\n  "
        + where
    )


@cache
def _gguf_on_the_hub(name: gguf_files.GgufName, label: str) -> Path:
    """Return a GGUF file of the hub, from its cache or fetched now.

    Raises:
        UserError: it cannot be had.
    """
    offline = not hub_is_reachable()
    try:
        return Path(hf_hub_download(name.source, name.file, local_files_only=offline))
    except Exception as error:  # of the network, of the hub, of a name that neither takes
        words = "the hub cannot be reached, and no copy is in the cache" if offline else " ".join(str(error).split())
        raise UserError(
            f"{label}: {name.file} of {name.source} cannot be had: {words}. Expected HUB-ID:FILE.gguf with a file that "
            "the model's page lists, or the path of a file."
        ) from error


def _only_model(folder: Path, label: str) -> Path:
    """Return the folder itself if it is a model's, or the only model folder below it.

    Raises:
        UserError: there is none, more than one, or one that holds no language model.
    """
    try:
        models = model_folders.models_below(folder, model_folders.MOST_FOLDERS)
    except model_folders.TooManyFolders as error:
        raise UserError(
            f"{label}: this folder holds no config.json, and {error} are below it, too many to look for a model in. "
            "Expected the folder of the model itself."
        ) from None

    if len(models) > 1:
        raise UserError(
            f"{label}: this folder holds {len(models)} models (folders with a config.json). Expected one."
            + "".join(f"\n  - {model}" for model in models[:MOST_LISTED])
        )
    if not models:
        explanation = model_folders.describe_folder(folder)
        raise UserError(
            f"{label}: this folder holds no models (folders with a config.json). "
            + (explanation or "Expected one.")
            + f"\n  It holds: {model_folders.listing(folder)}"
        )

    problem = model_folders.wrong_kind(models[0])
    if problem is not None:
        raise UserError(f"{label}: {problem}")
    return models[0]


def where_from(name: str) -> str:
    """Return the name by which others find a model too: its hub id, or else the whole path of a local folder or file.

    A folder in the hub's cache has a hub id. Of a folder above the only model, that model's is returned: libraries do
    not look below.
    """
    path = local_path(name)
    if not path.exists():
        return name

    if path.is_dir():
        with suppress(UserError):  # of a folder without a model; whoever loads it tells
            path = _only_model(path, name)
    path = path.resolve()
    for parent in path.parents:
        if parent.name == SNAPSHOTS and parent.parent.name.startswith(CACHED_MODEL):
            return parent.parent.name.removeprefix(CACHED_MODEL).replace("--", "/")
    return str(path)


def local_path(name: str) -> Path:
    """Return the path that a name stands for on this machine, whether there is something or not."""
    parts = gguf_files.parse(name)
    is_in_folder = parts is not None and parts.source and user_path(parts.source).is_dir()
    if parts is not None and is_in_folder:
        return user_path(parts.source) / parts.file
    return user_path(name)


def attached_models() -> str:
    """Return a line that lists attached models, for the end of a message; empty where there are none."""
    models = model_folders.models_below(ATTACHED)
    if not models:
        return ""
    return "\n  Attached models: " + ", ".join(map(str, models[:MOST_LISTED]))


@cache
def hub_is_reachable() -> bool:
    """Tell whether the hub can be used: not switched off, and it answers. Saves a minute of retries per file."""
    if constants.HF_HUB_OFFLINE:
        return False

    # Behind a proxy a direct connection fails although the hub can be reached.
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True

    # One short connection, remembered for the process, in place of retries for each file.
    host = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
    except OSError:
        log.info("%s cannot be reached: only local folders and the cache are used", constants.ENDPOINT)
        return False
    return True
