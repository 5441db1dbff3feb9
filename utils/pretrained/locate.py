"""Location of a model's files: a local folder, an attached input of a notebook, the cache, or the hub."""

import logging
import os
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants

from ..errors import UserError
from ..paths import user_path
from . import model_folders

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


def locate(name: str, role: str) -> str:
    """Return what `from_pretrained` is to be given for a name: a local folder, else the hub id itself.

    A folder without config.json stands for the only model below it (Kaggle adds folders for framework, variation and
    version); a hub id stands for the attached folder of the same name, if there is one (see `model_folders.attached`).

    Raises:
        UserError: a path that does not exist, a folder that holds no model, or several, or a name that stands for
            several attached ones.
    """
    # A path of this machine goes before an attached model of the same name.
    path = user_path(name)
    if path.is_dir():
        return str(_only_model(path, f"{role} {name}"))
    if path.is_file():
        raise UserError(f"{role} {name}: this is a file. {model_folders.describe_file(path)}")
    # A hub id is `name` or `owner/name`; anything else was meant as a path.
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"{role} {name}: no such folder. Expected one with config.json.{attached_models()}\n  {ATTACH}")

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
    """Return the name by which others find a model too: its hub id, or else the whole path of a local folder.

    A folder in the hub's cache has a hub id. Of a folder above the only model, that model's is returned: libraries do
    not look below.
    """
    folder = user_path(name)
    if not folder.is_dir():
        return name

    with suppress(UserError):  # of a folder without a model; whoever loads it tells
        folder = _only_model(folder, name)
    folder = folder.resolve()
    for parent in folder.parents:
        if parent.name == SNAPSHOTS and parent.parent.name.startswith(CACHED_MODEL):
            return parent.parent.name.removeprefix(CACHED_MODEL).replace("--", "/")
    return str(folder)


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
