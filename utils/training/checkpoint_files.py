"""Files of a checkpoint: how they are written, hashed, verified and read. What is in them: `checkpoints`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import sha256_of

FORMAT = 1
"""Version of the format, as the manifest says it; a checkpoint of another one is refused."""

FOLDER_NAME = re.compile(r"step-(\d{8,})")
"""Name of a checkpoint's folder, with the number of its step."""

MANIFEST = "manifest.json"
STATE = "state.json"

_ALIASES = "aliases"
"""Entry in the metadata of a safetensors file: {name of a tensor: name under which the same one is stored}."""


# ------------------------------------------------------------------------------ manifest and hashes


def folder_name(step: int) -> str:
    """Return the name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the optimizer steps done at a whole checkpoint, whatever its folder is called."""
    return int(read_manifest(path)["step"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of manifest.json: format, step, and size and sha256 of each file."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of state.json."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def write_manifest(folder: Path, step: int) -> int:
    """List every file of `folder`; return their total size in bytes."""
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}

    manifest = {"format": FORMAT, "step": step, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return sum(entry["bytes"] for entry in files.values())


def verify(path: str | Path) -> str | None:
    """Return why a checkpoint folder cannot be trusted, in a few words; None if it is whole."""
    path = Path(path)
    if not path.is_dir():
        return "no such folder"

    # The manifest was written last: without it the others may be cut short.
    try:
        manifest = read_manifest(path)
        version = manifest["format"]
        step = int(manifest["step"])
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in dict(manifest["files"]).items()}
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__})"

    if version != FORMAT:
        return f"written in format {version}, this program reads format {FORMAT}"
    # A folder that was renamed would be taken for that of another step.
    match = FOLDER_NAME.fullmatch(path.name)
    if match and int(match[1]) != step:
        return f"the manifest is that of step {step}"
    if STATE not in expected:
        return "the manifest does not list state.json"

    for name, (size, digest) in expected.items():
        damage = _file_damage(path / name, size, digest)
        if damage is not None:
            return f"{name} {damage}"
    return None


def _file_damage(file: Path, size: int, digest: str) -> str | None:
    """Return what is wrong with a file, to follow its name; None if it is what was written."""
    try:
        # Sizes first: they are had at once, and most damage is a file cut short.
        if file.stat().st_size != size:
            return f"has {file.stat().st_size:,} bytes instead of {size:,}"
        if sha256_of(file) != digest:
            return "does not match its sha256"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


# ------------------------------------------------------------------------------ tensors and objects


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict; names of one and the same tensor (tied weights) are stored once, as aliases.

    safetensors refuses tensors that share memory, so views that merely overlap are copied.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_names: dict[tuple, str] = {}
    blocks: set[tuple] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")

        tensor = tensor.detach()
        block = (str(tensor.device), tensor.untyped_storage().data_ptr())
        view = (*block, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        # Empty tensors share no memory, whatever their address is.
        is_empty = tensor.numel() == 0

        if view in first_names and not is_empty:
            aliases[name] = first_names[view]
            continue
        first_names[view] = name
        stored[name] = tensor.to("cpu").contiguous()
        if block in blocks and not is_empty:
            stored[name] = stored[name].clone()
        blocks.add(block)

    save_file(stored, file, metadata={_ALIASES: json.dumps(aliases)})


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Return what `save_tensors` wrote, on the CPU; names that were one tensor are one again."""
    with safe_open(file, framework="pt", device="cpu") as reader:
        aliases = json.loads((reader.metadata() or {}).get(_ALIASES, "{}"))
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (no mapping)
    return tensors | {name: tensors[original] for name, original in aliases.items()}


def save_object(file: Path, value: Any) -> None:
    """Write plain containers and tensors with `torch.save`.

    Raises:
        OSError: the disk refuses. torch hides that behind an error of its own, without the reason.
    """
    with open(file, "wb") as stream:
        try:
            torch.save(value, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_object(file: Path) -> Any:
    """Return what `save_object` wrote, on the CPU. `weights_only`: no code that a pickle carries runs."""
    return torch.load(file, map_location="cpu", weights_only=True)
