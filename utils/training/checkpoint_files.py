"""Files of a checkpoint: written, hashed, verified."""

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


_NAME = re.compile(r"step-(\d{8,})")


_ALIASES = "aliases"


def step_of(path: Path) -> int:
    """Optimizer steps done at a whole checkpoint, whatever its folder is called."""
    return int(_manifest(path)["step"])


def verify(path: str | Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, in a few words; None if it is whole."""
    path = Path(path)
    if not path.is_dir():
        return "no such folder"
    try:
        manifest = _manifest(path)
        version, step, files = manifest["format"], int(manifest["step"]), dict(manifest["files"])
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__})"
    if version != FORMAT:
        return f"written in format {version}, this program reads format {FORMAT}"
    if (match := _NAME.fullmatch(path.name)) and int(match[1]) != step:
        return f"the manifest is that of step {step}"
    if "state.json" not in expected:
        return "the manifest does not list state.json"
    for name, (size, digest) in expected.items():
        if (reason := _file_damage(path / name, size, digest)) is not None:
            return f"{name} {reason}"
    return None


def _file_damage(file: Path, size: int, digest: str) -> str | None:
    try:
        if file.stat().st_size != size:
            return f"has {file.stat().st_size:,} bytes instead of {size:,}"
        return None if sha256_of(file) == digest else "does not match its sha256"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def _write_manifest(folder: Path, step: int) -> int:
    """List every file of `folder`; returns their total size in bytes."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "step": step, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return sum(entry["bytes"] for entry in files.values())


def _save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict; names of one and the same tensor (tied weights) are stored once, as aliases.

    safetensors refuses tensors that share memory, so views that merely overlap are copied.
    """
    first: dict[tuple, str] = {}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    memory: set[tuple] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
        tensor = tensor.detach()
        block = (str(tensor.device), tensor.untyped_storage().data_ptr())
        view = (*block, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in first:
            aliases[name] = first[view]
            continue
        first[view] = name
        stored[name] = tensor.to("cpu").contiguous()
        if tensor.numel() and block in memory:
            stored[name] = stored[name].clone()
        memory.add(block)
    save_file(stored, file, metadata={_ALIASES: json.dumps(aliases)})


def _save_object(file: Path, value: Any) -> None:
    """`torch.save`, with the reason where the disk refuses: torch hides it behind an error of its own."""
    with open(file, "wb") as stream:
        try:
            torch.save(value, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _load_tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt", device="cpu") as reader:
        aliases = json.loads((reader.metadata() or {}).get(_ALIASES, "{}"))
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (no mapping)
    return tensors | {name: tensors[original] for name, original in aliases.items()}


def _state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text(encoding="utf-8"))
