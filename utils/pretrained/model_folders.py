"""Folders of models: searched, matched with a name, and described where they hold something else.

A model is a folder with config.json, or an adapter: a folder with adapter_config.json.

- `models_below`, `is_model`, `is_adapter`: folders that hold a model
- `attached`: which attached model a name such as `Qwen/Qwen2.5-1.5B` stands for
- `describe_folder`: advice about a folder of another kind (a checkpoint, a GGUF file, ...)
- `wrong_kind`, `wrong_weights`: why a model cannot be taken, found out with no weights loaded
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..git_lfs import is_lfs_pointer

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"

DEEPEST = 6
"""Folders between /kaggle/input and a model's files, at most: models/OWNER/MODEL/FRAMEWORK/VARIATION/VERSION."""
MOST_FOLDERS = 2000
"""Folders that are searched below one that a user names as a model: a home or a whole disk has many more."""
MOST_LISTED = 10
"""Names of a folder that a message lists."""
MOST_EXAMPLES = 3
"""Files that a message names as missing."""

STORED_BY_LFS = ("*.safetensors", "*.bin", "tokenizer.json", "tokenizer.model", "spiece.model")
"""Files of a model that are large: a copy made by git has pointers in their place where Git LFS has not fetched them.
"""

LOADED_FRAMEWORKS = {"transformers", "pytorch", "other"}
"""Parts of the path of a model on Kaggle that name its framework."""
OTHER_FRAMEWORKS = {"keras", "jax", "flax", "tensorflow1", "tensorflow2", "tflite", "tfjs", "gemmacpp", "ggml", "gguf"}
"""Those of frameworks whose models transformers does not load."""
SAYS_NOTHING = {"models", "default"}
"""Those that do not tell one model from another."""


# ----------------------------------------------------------------------------------------- folders


class TooManyFolders(ValueError):
    """More folders than are searched for a model."""


def models_below(folder: Path, most_folders: int | None = None) -> list[Path]:
    """Return model folders: the folder itself, or else those at most `DEEPEST` levels below it; none inside another.

    Args:
        most_folders: folders that are searched at most; None: all.

    Raises:
        TooManyFolders: there are more.
    """
    if is_model(folder):
        return [folder]

    models = []
    for count, (path, folders, _) in enumerate(os.walk(folder, followlinks=True), 1):
        if most_folders is not None and count > most_folders:
            raise TooManyFolders(f"more than {most_folders:,} folders")

        # `os.walk` goes into those of `folders` that are left in the list.
        current = Path(path)
        if current != folder and is_model(current):
            models.append(current)
            folders.clear()
        elif len(current.relative_to(folder).parts) >= DEEPEST:
            folders.clear()
    return sorted(models)


def is_model(folder: Path) -> bool:
    """Tell whether a folder is that of a model, or of an adapter."""
    return (folder / CONFIG).is_file() or (folder / ADAPTER_CONFIG).is_file()


def is_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds a tokenizer without a model."""
    return (folder / "tokenizer.json").is_file() and not is_model(folder)


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter alone: some trainers put the base's config beside it, but no weights."""
    has_whole_weights = any(_is_whole_weights(path.name) for path in folder.glob("*"))
    return (folder / ADAPTER_CONFIG).is_file() and not has_whole_weights


def _is_whole_weights(name: str) -> bool:
    return bool(re.fullmatch(r"(model|pytorch_model).*\.(safetensors|bin)", name))


def may_be_hub_id(name: str) -> bool:
    """Tell whether a name has the form of a hub id, `name` or `owner/name`: anything else is meant as a path."""
    return not name.startswith(("/", ".", "~")) and name.count("/") <= 1


def listing(folder: Path) -> str:
    """Return the names of what is in a folder, the first of them."""
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:MOST_LISTED]) or "nothing"
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return shown + more


# ---------------------------------------------------------------------------------- attached by name


def attached(name: str, root: Path) -> list[Path]:
    """Return attached folders below `root` that a name stands for; several where it does not tell them apart.

    A hub id stands for a folder whose last parts spell the same words: `Qwen/Qwen2.5-1.5B` for
    `qwen2.5/transformers/1.5b/1` and `qwen2.5-1.5b`, and never for `qwen2.5/transformers/1.5b-instruct/1`. A name
    without owner stands besides for every variation of a model: `qwen2.5`.
    """
    owner, _, model = name.rpartition("/")
    model_words = words(model)
    if not model_words:
        return []

    candidates: dict[Path, list[str]] = {}
    for path in models_below(root):
        parts = _telling_parts(path.relative_to(root))
        if parts is not None:
            candidates[path] = parts

    # 1. Folders of the same words; among them, if there are some, those below a folder of the owner.
    same_words = [path for path, parts in candidates.items() if model_words in _readings(parts)]
    of_owner = [path for path in same_words if words(owner) in map(words, candidates[path])]
    if owner and of_owner:
        return of_owner
    if same_words or owner:
        return same_words

    # 2. A name without owner stands for all variations of a model.
    return [path for path, parts in candidates.items() if model_words in map(words, parts)]


def words(name: str) -> tuple[str, ...]:
    """Return words and numbers of a name, whatever stands between them: qwen, 2.5, 1.5, b."""
    return tuple(re.findall(r"\d+(?:\.\d+)*|[a-z]+", name.lower()))


def _telling_parts(path: Path) -> list[str] | None:
    """Return parts of a relative path that tell what the model is; None: it is of a framework that is not loaded."""
    parts = list(path.parts)
    names = {part.lower() for part in parts}
    if names & OTHER_FRAMEWORKS and not names & LOADED_FRAMEWORKS:
        return None

    if len(parts) > 1 and parts[-1].isdigit():
        parts.pop()  # the version
    dropped = LOADED_FRAMEWORKS | SAYS_NOTHING
    return [part for part in parts if part.lower() not in dropped] or parts


def _readings(parts: list[str]) -> list[tuple[str, ...]]:
    """Return words of the last part, of the last two, and so on: `qwen2.5/1.5b` can be read as qwen2.5-1.5b."""
    return [words(" ".join(parts[first:])) for first in range(len(parts))]


# ------------------------------------------------------------------------- folders that are no models


class Layout(NamedTuple):
    """A kind of folder that is given in place of a model."""

    matches: Callable[[Path], bool]
    """Folder -> it is of this kind."""
    explanation: str
    """Name of the kind, and the way from there to a model; `{folder}` stands for its path."""


def _has(*patterns: str) -> Callable[[Path], bool]:
    """Return a test for a folder that holds, for each of the patterns, a file or folder of that name."""

    def has_all(folder: Path) -> bool:
        return all(any(folder.glob(pattern)) for pattern in patterns)

    return has_all


NO_MODELS = (
    Layout(
        _has("manifest.json", "state.json"),
        "This is a checkpoint, to continue its run from: the same command as before, or --resume {folder}. The model "
        "that a finished run leaves is in the folder `student` of the run.",
    ),
    Layout(
        _has("metrics.jsonl", "config.yaml"),
        "This is the folder of a run that has not exported its student yet: the same command as before ends it, and "
        "the model is in {folder}/student then.",
    ),
    Layout(
        _has("model_index.json"),
        "This is a pipeline of diffusers, which makes pictures. Expected a language model.",
    ),
    Layout(
        _has("*.gguf"),
        "This is a folder of models for llama.cpp (GGUF). Name the file: {folder}:FILE.gguf.",
    ),
    Layout(
        _has("global_step*"),
        "This is a checkpoint of DeepSpeed, cut into parts. Its own zero_to_fp32.py in the folder makes weights of it.",
    ),
    Layout(
        _has("*.distcp"),
        "This is a checkpoint of FSDP, cut into parts. `accelerate merge-weights` makes weights of it.",
    ),
    Layout(
        _has("*.nemo"),
        "This is a model of NeMo. Give the same model as transformers writes it.",
    ),
    Layout(
        _has("openvino_*.xml"),
        "This is a model for OpenVINO, which is not trained. Give the model that it was exported from.",
    ),
    Layout(
        _has("params.json"),
        "These are weights in the format of their makers (params.json). Give the same model as transformers writes it: "
        "on the hub its name often ends in -hf.",
    ),
    Layout(
        _has("*.onnx"),
        "This is a model for ONNX Runtime, which is not trained. Give the model that it was exported from.",
    ),
    Layout(
        _has("tokenizer.json"),
        "This is a tokenizer without a model. Put the config.json of the model beside it; with --student-init random "
        "a student needs no weights.",
    ),
    Layout(
        _has("*.safetensors"),
        "These are weights without a config.json. Put that of the model beside them.",
    ),
)
"""Folders without a config.json. The first that fits counts, so that kinds with rare files come before common ones."""


def describe_folder(folder: Path) -> str | None:
    """Describe a folder that holds no model, and the way from there; None for one of no known kind."""
    for layout in NO_MODELS:
        if layout.matches(folder):
            return layout.explanation.format(folder=folder)
    return None


def describe_file(file: Path) -> str:
    """Name what is to be given in place of a file."""
    if is_model(file.parent):
        return f"Give the folder that it lies in: {file.parent}"
    return "Expected the folder of a model, with config.json, weights and tokenizer.json."


# ---------------------------------------------------------------------- models that cannot be taken


def wrong_kind(folder: Path) -> str | None:
    """Return why a folder with a config.json is not that of a language model; None where nothing speaks against it."""
    # Libraries whose models have a config.json too.
    if (folder / "modules.json").is_file() or (folder / "config_sentence_transformers.json").is_file():
        return (
            "it is a model of sentence-transformers, which turns text into vectors. Expected a language model, which "
            "predicts tokens: often the one that this was trained from."
        )
    if (folder / "model.bin").is_file() and "model_type" not in read_json(folder / CONFIG):
        return (
            "it is a model for CTranslate2 (model.bin, and a config.json without model_type), whose weights are not "
            "trained. Give the model that it was converted from."
        )

    # A clone without Git LFS: small text files in place of the large ones.
    large_files: list[Path] = []
    for pattern in STORED_BY_LFS:
        large_files += [path for path in folder.glob(pattern) if path.is_file()]
    pointers = [path.name for path in sorted(large_files) if is_lfs_pointer(path)]
    if pointers:
        examples = ", ".join(pointers[:MOST_EXAMPLES])
        return (
            f"its files are not there: {examples} only points to what is meant (git without LFS). Run `git lfs pull` "
            "in that folder, or download it with `hf download`."
        )
    return None


def wrong_weights(folder: Path) -> str | None:
    """Return why the weights beside a config.json cannot be taken, and the way; None where nothing speaks against them.

    A folder that holds none at all is no matter of this function: a random start needs none.
    """
    if _is_quantised_by_mlx(folder):
        return (
            "its weights are quantised by MLX, for Apple's chips, and no other library reads them. Give the model that "
            "it was converted from: its README.md, or its page on the hub, names it."
        )

    incomplete = _incomplete_weights(folder)
    if incomplete is not None:
        return f"its weights cannot be loaded: {incomplete} Download it again: `hf download` fetches what is missing."
    if has_weights(folder, allow_pickle=True):
        return None

    # Nothing that transformers would load: files of other libraries may be there in their place.
    for patterns, explanation in OTHER_WEIGHTS:
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return explanation
    return None


OTHER_WEIGHTS = (
    (
        ("openvino_*.xml",),
        "its weights are for OpenVINO, and are not trained. Give the model that it was exported from.",
    ),
    (
        ("*.gguf",),
        "its weights are for llama.cpp (GGUF). Name the file: FOLDER:FILE.gguf.",
    ),
    (
        ("*.onnx", "onnx/*.onnx"),
        "its weights are for ONNX Runtime, and are not trained. Give the model that it was exported from.",
    ),
    (
        ("tf_model*.h5", "*.keras", "*.ckpt.index"),
        "its weights are TensorFlow's only, and PyTorch's are needed. Give a model with safetensors, or convert it "
        "with a transformers below version 5: from_pretrained(folder, from_tf=True), then save_pretrained.",
    ),
    (
        ("flax_model*.msgpack",),
        "its weights are Flax's only, and PyTorch's are needed. Give a model with safetensors, or convert it with a "
        "transformers below version 5: from_pretrained(folder, from_flax=True), then save_pretrained.",
    ),
)
"""Patterns of files with weights that are not loaded, and advice where there are no others. The first match counts."""


def has_weights(folder: Path, allow_pickle: bool = False) -> bool:
    """Return whether a folder holds weights that transformers would load."""
    return any(folder.glob("*.safetensors")) or (allow_pickle and any(pickled_weights(folder)))


def pickled_weights(folder: Path) -> list[Path]:
    """Return the pickle files with PyTorch weights: other .bin files are of other libraries, or of a trainer."""
    return sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model*.bin")])


def _is_quantised_by_mlx(folder: Path) -> bool:
    """Tell whether a config.json has the settings of MLX; transformers calls its own `quantization_config`."""
    settings = read_json(folder / CONFIG).get("quantization")
    return isinstance(settings, dict) and {"group_size", "bits"} <= settings.keys()


def _incomplete_weights(folder: Path) -> str | None:
    """Describe what is missing of the files from which transformers would load weights; None: nothing."""
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"

    # transformers takes a single file first, and reads the index of several only without it.
    if not files[0].is_file() and index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            return f"{index.name}, the list of its files of weights, is damaged."
        names = {str(name) for name in shards.values()}
        files = [folder / name for name in sorted(names)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            examples = ", ".join(missing[:MOST_EXAMPLES])
            return f"{len(missing)} of the {len(files)} files of its weights are missing: {examples}."

    for file in files:
        if file.is_file() and not _is_whole_safetensors(file):
            return f"{file.name} is cut off or damaged: {file.stat().st_size:,} bytes are not what its header names."
    return None


def _is_whole_safetensors(file: Path) -> bool:
    """Return whether a file is as long as its header says: 8 bytes of the header's length, the header, the tensors."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = file.stat().st_size

        # A damaged length could ask for more memory than there is.
        if not 0 < length <= size - 8:
            return False

        try:
            tensors = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return False
    return size == 8 + length + max(ends, default=0)


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object; {} where the file is damaged or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
