"""Models, tokenizers and configs, loaded by hub id or from a local folder.

Remote code is never run, nothing is resized or padded, and a student's weights are float32. What cannot be
loaded is one `UserError` that names the model and the ways to attach it. An adapter can be named wherever a whole model
can: `adapted_base` finds the model that it belongs to.
"""

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from ..errors import UserError
from ..files import sha256_of
from ..machine.packages import require
from ..parallel.sharding import full
from ..paths import user_path
from . import adapter_folders, generation, gguf_files, model_folders
from .families import auto_class
from .locate import ATTACH, attached_models, gguf_file, hub_is_reachable, locate, locate_tokenizer
from .precision import QUANTISED, bitsandbytes_config, quantisation_method

log = logging.getLogger(__name__)

T = TypeVar("T")

Device: TypeAlias = torch.device | str | Mapping[int | str, int]
"""A device; or the bytes that each of several has for a model."""

SAMPLED_VALUES = 64
"""Values of each parameter, at least, that go into a fingerprint: enough to tell models apart."""


# ---------------------------------------------------------------- adapters


def adapted_base(name: str, role: str) -> str | None:
    """Return the model that an adapter belongs to, as a name to load it by; None: `name` is a whole model.

    Raises:
        UserError: the adapter does not say what it belongs to, or peft is not installed.
    """
    folder = _adapter_folder(name, role)
    if folder is None:
        return None

    base = adapter_folders.base_name(folder, f"{role} {name}")
    if user_path(base).resolve() == folder.resolve():
        raise UserError(
            f"{role} {name}: this is an adapter, and its {model_folders.ADAPTER_CONFIG} names its own folder as the "
            "model that it belongs to. Expected base_model_name_or_path with a hub id or another folder."
        )
    require("peft", f"{role} {name}, an adapter of {base},", extra="peft")
    return base


def _adapter_folder(name: str, role: str) -> Path | None:
    """Return the folder of an adapter's files; None: the name is that of a whole model."""
    source = locate(name, role)
    if Path(source).is_dir():
        return adapter_folders.adapter_folder(source, offline=True)
    return _adapter_on_the_hub(source)


@cache
def _adapter_on_the_hub(source: str) -> Path | None:
    """Ask the hub once for each id: config, tokenizer and weights all need the answer."""
    return adapter_folders.adapter_folder(source, offline=not hub_is_reachable())


@contextmanager
def _loading_base(name: str, base: str, role: str) -> Iterator[None]:
    """Explain errors about the base of an adapter, of which the user may never have heard."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{role} {name}: this is an adapter of {base}, and a model needs both. Have {base} there, or write where "
            f"it is as base_model_name_or_path into the adapter's {model_folders.ADAPTER_CONFIG}.\n  {error}"
        ) from error


# ---------------------------------------------------------------- configs and tokenizers


def load_config(name: str, role: str) -> PretrainedConfig:
    """Load the model's config.json; of an adapter that of its base.

    Raises:
        UserError: not reachable.
    """
    base = adapted_base(name, role)
    if base is None:
        return _load(AutoConfig.from_pretrained, name, role, "config.json")

    with _loading_base(name, base, role):
        return load_config(base, role)


def load_tokenizer(name: str, role: str) -> PreTrainedTokenizerBase:
    """Load the model's fast tokenizer; of an adapter its own, or else that of its base.

    Args:
        name: of a model, or of a folder with a tokenizer alone.

    Raises:
        UserError: not reachable, or an empty or a slow tokenizer: without byte offsets nothing can be aligned.
    """
    source = locate_tokenizer(name, role)
    base = None if model_folders.is_tokenizer(Path(source)) else adapted_base(name, role)
    if base is not None and not (_adapter_folder(name, role) / "tokenizer_config.json").is_file():
        with _loading_base(name, base, role):
            return load_tokenizer(base, role)

    gguf_files.require_tokenizer(Path(source), name, role)
    tokenizer = _load(AutoTokenizer.from_pretrained, name, role, "tokenizer")
    if not tokenizer.is_fast:
        raise UserError(
            f"{role} {name}: its tokenizer ({type(tokenizer).__name__}) is slow. Expected a fast one, with a "
            "tokenizer.json; convert it with the `tokenizers` library, or choose a model that has one."
        )
    if tokenizer.vocab_size < 2:  # transformers makes one up where there is none
        raise UserError(
            f"{role} {name}: its tokenizer has a vocabulary of {tokenizer.vocab_size}. Expected the files of a "
            "tokenizer beside the model, such as tokenizer.json."
        )
    return tokenizer


def load_each(load: Callable[[str, str], T], names: Mapping[str, str]) -> dict[str, T]:
    """Return `load(name, role)` of every role, and report all that fails at once.

    Raises:
        UserError: for all that could not be loaded.
    """
    loaded: dict[str, T] = {}
    problems: list[str] = []
    for role, name in names.items():
        try:
            loaded[role] = load(name, role)
        except UserError as error:
            problems.append(str(error))
    if not problems:
        return loaded

    # How to attach a model is said once, at the end, whatever number of models lacks.
    message = "\n".join(problem.removesuffix(f"\n  {ATTACH}") for problem in problems)
    if any(ATTACH in problem for problem in problems):
        message += f"\n  {ATTACH}"
    raise UserError(message)


# ---------------------------------------------------------------- weights


def load_model(
    name: str,
    role: str,
    dtype: torch.dtype,
    device: Device = "cpu",
    weights: str = "auto",
    allow_pickle: bool = False,
) -> nn.Module:
    """Load the model with its weights on a device.

    Args:
        dtype: of its weights, and of its computation where `weights` has fewer bits.
        device: or the bytes that each of several has for it (GPUs by number, `cpu`): accelerate spreads the layers over
            these, over the first as few as can be and what finds no room on the disk, and moves what goes from one
            to the next.
        weights: `8bit` or `4bit` (see `check_weights`) quantises the linear layers, all but the head.
        allow_pickle: take pickle files where there are no safetensors.

    Raises:
        UserError: not reachable, no weights, or weights that lack tensors of this model (which transformers
            would fill with random numbers).
    """
    base = adapted_base(name, role)
    if base is not None:
        return _load_adapted(name, base, role, dtype=dtype, device=device, weights=weights, allow_pickle=allow_pickle)

    # Everything that can be refused by small files is refused before the large ones are read.
    folder = Path(locate(name, role))
    problem = model_folders.wrong_weights(folder)
    if problem is not None:
        raise UserError(f"{role} {name}: {problem}")
    config = load_config(name, role)
    _refuse_quantised_student(config, name, role)
    if not allow_pickle:
        _refuse_pickles_only(folder, name, role)

    options = _weight_options(dtype, device, weights)
    options["use_safetensors"] = None if allow_pickle else True

    # transformers reads the generation settings with the weights, and would fail where they contradict each other.
    offline = not folder.is_dir() and not hub_is_reachable()
    settings = generation.replacement_for_broken(locate(name, role), f"{role} {name}", offline=offline)
    if settings is not None:
        options["generation_config"] = settings

    from_pretrained = auto_class(config).from_pretrained
    model, loading_info = _load(from_pretrained, name, role, "weights", output_loading_info=True, **options)
    _require_all_tensors(model, loading_info["missing_keys"], name, role)

    is_spread = isinstance(device, Mapping)
    if is_spread and model.get_input_embeddings().weight.is_meta:
        raise UserError(f"{role} {name}: no GPU has room for its embedding, and nothing can be spread from there.")
    if is_spread or weights in QUANTISED:
        return model  # transformers has placed it, and quantised weights may not be moved
    return model.to(device)


def _weight_options(dtype: torch.dtype, device: Device, weights: str) -> dict[str, Any]:
    """Return the options of `from_pretrained` that say in which precision weights are loaded, and onto what."""
    options: dict[str, Any] = {"dtype": dtype}
    if weights in QUANTISED:
        options["quantization_config"] = bitsandbytes_config(weights, dtype)
        options["device_map"] = {"": device}

    if isinstance(device, Mapping):
        # "low_0": as little as can be on the first GPU, which the student needs.
        options["device_map"] = "balanced_low_0"
        options["max_memory"] = dict(device)
    return options


def _load_adapted(
    name: str,
    base: str,
    role: str,
    *,
    dtype: torch.dtype,
    device: Device,
    weights: str,
    allow_pickle: bool,
) -> nn.Module:
    """Load the base of an adapter and add the adapter to its weights; arguments as those of `load_model`."""
    if weights in QUANTISED:
        raise UserError(
            f"{role} {name}: this is an adapter of {base}, which is added to whole weights, and {weights} ones were "
            "asked for. Expected auto, float32, float16 or bfloat16; or give a model in which the two are merged."
        )
    with _loading_base(name, base, role):
        model = load_model(base, role, dtype=dtype, device=device, weights=weights, allow_pickle=allow_pickle)

    source = locate(name, role)
    offline = not Path(source).is_dir() and not hub_is_reachable()
    model = adapter_folders.merge_into(
        model, source, label=f"{role} {name}", allow_pickle=allow_pickle, offline=offline
    )

    # An adapter may end texts elsewhere than its base: one trained on conversations does.
    folder = _adapter_folder(name, role)
    settings = generation.load(folder, f"{role} {name}")
    if settings is not None:
        model.generation_config = settings

    log.info("%s %s is an adapter of %s: it is added to the weights of that model", role, name, base)
    return model


def _refuse_quantised_student(config: PretrainedConfig, name: str, role: str) -> None:
    """Refuse weights of a few bits, as GPTQ, AWQ and others store them: they have no gradients.

    Raises:
        UserError: a student has such weights.
    """
    method = quantisation_method(config)
    if role == "student" and method is not None:
        raise UserError(
            f"student {name}: its weights are quantised ({method}) and cannot be trained. Give the model that it was "
            "made from: its page on the hub names it."
        )


def _refuse_pickles_only(folder: Path, name: str, role: str) -> None:
    """Refuse a folder whose weights are pickle files only, which can carry code.

    Raises:
        UserError: it is such a folder.
    """
    pickles = model_folders.pickled_weights(folder)
    if pickles and not model_folders.has_weights(folder):
        files = ", ".join(path.name for path in pickles)
        raise UserError(
            f"{role} {name}: its weights are pickle files only ({files}), which can carry code. Expected safetensors: "
            "choose a model that has them, or convert it with save_pretrained. If you trust its author: "
            f"--set {role}.allow_pickle=true."
        )


def _require_all_tensors(model: nn.Module, missing: Iterable[str], name: str, role: str) -> None:
    """Check that no tensor of a model was missing in its files: transformers fills such tensors with random numbers.

    Raises:
        UserError: one was missing.
    """
    names = sorted(missing)
    if names:
        raise UserError(
            f"{role} {name}: its weights lack {len(names)} tensors of a {type(model).__name__}, such as "
            f"{names[0]}. Expected all of them: is this a language model with its head, and is the download complete?"
        )


def random_model(config: PretrainedConfig) -> nn.Module:
    """Make a model with fresh float32 weights, whatever those of its namesake are stored in; seed torch before."""
    if quantisation_method(config) is not None:
        config = copy.deepcopy(config)
        del config.quantization_config
    return auto_class(config).from_config(config, dtype=torch.float32)


def recompute_layers(model: nn.Module) -> None:
    """Have a model keep only what enters each layer for the backward pass, and compute the rest there once more.

    Raises:
        UserError: transformers cannot do that for this architecture.
    """
    try:
        # renamed in transformers 5; the older name warns where the newer one is there
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"--gradient-checkpointing: not for this student. Leave it out.\n  {error}") from error


# ---------------------------------------------------------------- fingerprints


def fingerprint(model: nn.Module, values: bool = True) -> str:
    """Hash that tells models apart: names and shapes of all parameters and, with `values`, a sample of each.

    Of a sharded model call it in every process.
    """
    total = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        total.update(f"{name} {tuple(parameter.shape)}".encode())
        if values:
            total.update(_sample(model, name).numpy().tobytes())
    return total.hexdigest()


def _sample(model: nn.Module, name: str) -> torch.Tensor:
    """Return values of a parameter at equal distances, at least `SAMPLED_VALUES` where it has so many: [n] float32."""
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)

    # Parameters that accelerate has put on the disk are meta tensors except within this block.
    with align_module_device(module):
        flat = full(getattr(module, parameter_name).detach()).flatten()
        distance = max(1, len(flat) // SAMPLED_VALUES)
        return flat[::distance].float().cpu()


def weights_fingerprint(name: str, role: str) -> str:
    """Identify a model's weights without loading them: the commit of a hub model, else a hash of the files.

    Files are read whole, at the speed of the disk.
    """
    base = adapted_base(name, role)
    if base is not None:
        folder = _adapter_folder(name, role)
        with _loading_base(name, base, role):
            return f"{_files_fingerprint(folder)} on {weights_fingerprint(base, role)}"

    # The file itself: what is made from it may be written otherwise by a newer transformers.
    file = gguf_file(name, role)
    if file is not None:
        return gguf_files.fingerprint(file)

    source = Path(locate(name, role))
    if source.is_dir():
        return _files_fingerprint(source)
    commit = getattr(load_config(name, role), "_commit_hash", None)
    return f"{name}@{commit}"


def _files_fingerprint(folder: Path) -> str:
    """Hash of names and contents of a folder's configs and weights."""
    configs = [folder / name for name in (model_folders.CONFIG, model_folders.ADAPTER_CONFIG)]
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])

    files = [file for file in configs if file.is_file()] + weights
    hashes = "".join(f"{file.name} {sha256_of(file)} " for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


# ---------------------------------------------------------------- length of windows


def context_length(config: PretrainedConfig) -> float:
    """Return how many tokens the model can read at once; infinite where its config names no limit."""
    text = config.get_text_config()

    # Without absolute positions there is none of these, or it is -1 (XLNet).
    limits = [getattr(text, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=math.inf)


def window_length(requested: int, shapes: Iterable[PretrainedConfig]) -> int:
    """Return tokens per window: as requested, or fewer where a model reads no more at once, which is logged."""
    length = int(min(requested, *map(context_length, shapes)))
    if length < requested:
        log.info("windows of %d tokens instead of %d: a model reads no more at once", length, requested)
    return length


# ---------------------------------------------------------------- errors


def _load(
    from_pretrained: Callable[..., Any],
    name: str,
    role: str,
    part: Literal["config.json", "tokenizer", "weights"],
    **options: Any,
) -> Any:
    """Load a part of a model without running its code.

    Raises:
        UserError: it cannot be loaded.
    """
    source = locate_tokenizer(name, role) if part == "tokenizer" else locate(name, role)
    offline = not Path(source).is_dir() and not hub_is_reachable()
    try:
        return from_pretrained(source, trust_remote_code=False, local_files_only=offline, **options)
    except Exception as error:  # five libraries raise errors of their own for files that are damaged or do not fit
        raise _loading_error(name, role, part, error, offline=offline) from error


def _loading_error(name: str, role: str, part: str, error: Exception, *, offline: bool) -> UserError:
    """Return an error that says what could not be loaded, and what may be done about it."""
    words = " ".join(str(error).split())
    if "trust_remote_code" in words or "custom code" in words:
        return UserError(
            f"{role} {name}: it needs Python code of its own, which is never run here. Expected an architecture that "
            "transformers contains; choose another model, or one converted to such an architecture."
        )

    source = Path(locate_tokenizer(name, role) if part == "tokenizer" else locate(name, role))
    if source.is_dir():
        return UserError(
            f"{role} {name}: its {part} cannot be loaded. The folder holds: {model_folders.listing(source)}."
            f"{_hint(source, role, part)}\n  {type(error).__name__}: {words}"
        )
    reason = "the hub cannot be reached, and no copy is in the cache" if offline else words
    return UserError(f"{role} {name}: its {part} cannot be loaded: {reason}.{attached_models()}\n  {ATTACH}")


def _hint(folder: Path, role: str, part: str) -> str:
    """Return advice about files that cannot be loaded; empty where there is none."""
    if part != "weights":
        return ""

    stored = model_folders.read_json(folder / model_folders.CONFIG).get("quantization_config")
    if isinstance(stored, dict):
        method = stored.get("quant_method", "unknown method")
        return f" Its weights are quantised ({method}): the model that it was made from needs no package of its own."
    if role == "student" and not model_folders.has_weights(folder, allow_pickle=True):
        return " A random start needs no weights: --student-init random."
    return ""
