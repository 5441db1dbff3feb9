"""Models and tokenizers by hub id or local folder, and the finished student as a folder of its own.

Remote code is never run, nothing is resized or padded, and a student's weights are float32. What cannot be
loaded is one `UserError` that names the model and the ways to attach it.
"""

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from ..advice import reason
from ..errors import UserError
from ..files import sha256_of
from ..machine.packages import require
from ..parallel.sharding import full
from ..paths import user_path
from ..seeding import preserve_rng_and_mode
from . import adapter_folders, generation, model_folders
from .families import auto_class
from .locate import ATTACH, _attached_models, hub_is_reachable, locate
from .precision import QUANTISED, _quantisation, quantisation_method

log = logging.getLogger(__name__)

T = TypeVar("T")


def adapted_base(name: str, role: str) -> str | None:
    """The model that an adapter belongs to, as a name to load it by; None: `name` is a whole model.

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
    """Where the files of an adapter lie; None: the name is that of a whole model."""
    source = locate(name, role)
    if Path(source).is_dir():
        return adapter_folders.adapter_folder(source, offline=True)
    return _adapter_on_the_hub(source)


@cache
def _adapter_on_the_hub(source: str) -> Path | None:
    return adapter_folders.adapter_folder(source, offline=not hub_is_reachable())


@contextmanager
def _loading_base(name: str, base: str, role: str) -> Iterator[None]:
    """What fails inside concerns the base of an adapter, of which the user may never have heard."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{role} {name}: this is an adapter of {base}, and a model needs both. Have {base} there, or write where "
            f"it is as base_model_name_or_path into the adapter's {model_folders.ADAPTER_CONFIG}.\n  {error}"
        ) from error


def load_config(name: str, role: str) -> PretrainedConfig:
    """The model's config.json; of an adapter that of its base.

    Raises:
        UserError: not reachable.
    """
    base = adapted_base(name, role)
    if base is None:
        return _load(AutoConfig.from_pretrained, name, role, "config.json")
    with _loading_base(name, base, role):
        return load_config(base, role)


def load_tokenizer(name: str, role: str) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer; of an adapter its own, or else that of its base.

    Raises:
        UserError: not reachable, or an empty or a slow tokenizer: without byte offsets nothing can be aligned.
    """
    base = adapted_base(name, role)
    if base is not None and not (_adapter_folder(name, role) / "tokenizer_config.json").is_file():
        with _loading_base(name, base, role):
            return load_tokenizer(base, role)
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
    """`load(name, role)` for every role; what fails is told together.

    Raises:
        UserError: for all that could not be loaded.
    """
    found, problems = {}, []
    for role, name in names.items():
        try:
            found[role] = load(name, role)
        except UserError as error:
            problems.append(str(error))
    if problems:
        told = "\n".join(problem.removesuffix(f"\n  {ATTACH}") for problem in problems)
        raise UserError(f"{told}\n  {ATTACH}" if any(ATTACH in problem for problem in problems) else told)
    return found


def load_model(
    name: str,
    role: str,
    dtype: torch.dtype,
    device: torch.device | str | Mapping[int | str, int] = "cpu",
    weights: str = "auto",
    allow_pickle: bool = False,
) -> nn.Module:
    """The model with its weights on a device.

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
        return _load_adapted(name, base, role, dtype, device, weights, allow_pickle)

    folder = Path(locate(name, role))
    if why := model_folders.wrong_weights(folder):
        raise UserError(f"{role} {name}: {why}")
    config = load_config(name, role)
    _refuse_quantised_student(config, name, role)
    options: dict[str, Any] = {"dtype": dtype}
    if weights in QUANTISED:
        options |= {"quantization_config": _quantisation(weights, dtype), "device_map": {"": device}}
    if spread := isinstance(device, Mapping):
        options |= {"device_map": "balanced_low_0", "max_memory": dict(device)}
    load = auto_class(config).from_pretrained
    pickles = model_folders.pickled_weights(folder)
    if pickles and not allow_pickle and not model_folders.has_weights(folder):
        files = ", ".join(path.name for path in pickles)
        raise UserError(
            f"{role} {name}: its weights are pickle files only ({files}), which can carry code. Expected safetensors: "
            "choose a model that has them, or convert it with save_pretrained. If you trust its author: "
            f"--set {role}.allow_pickle=true."
        )
    options["use_safetensors"] = None if allow_pickle else True
    offline = not folder.is_dir() and not hub_is_reachable()
    settings = generation.replacement_for_broken(locate(name, role), f"{role} {name}", offline)
    if settings is not None:
        options["generation_config"] = settings
    model, loading = _load(load, name, role, "weights", output_loading_info=True, **options)
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{role} {name}: its weights lack {len(missing)} tensors of a {type(model).__name__}, such as "
            f"{missing[0]}. Expected all of them: is this a language model with its head, and is the download complete?"
        )
    if spread and model.get_input_embeddings().weight.is_meta:
        raise UserError(f"{role} {name}: no GPU has room for its embedding, and nothing can be spread from there.")
    return model if spread or weights in QUANTISED else model.to(device)  # quantised weights may not be moved


def _load_adapted(
    name: str,
    base: str,
    role: str,
    dtype: torch.dtype,
    device: torch.device | str | Mapping[int | str, int],
    weights: str,
    allow_pickle: bool,
) -> nn.Module:
    """The base of an adapter with the adapter added to its weights; arguments as those of `load_model`."""
    if weights in QUANTISED:
        raise UserError(
            f"{role} {name}: this is an adapter of {base}, which is added to whole weights, and {weights} ones were "
            "asked for. Expected auto, float32, float16 or bfloat16; or give a model in which the two are merged."
        )
    with _loading_base(name, base, role):
        model = load_model(base, role, dtype, device, weights, allow_pickle)

    source = locate(name, role)
    offline = not Path(source).is_dir() and not hub_is_reachable()
    model = adapter_folders.merge_into(model, source, f"{role} {name}", allow_pickle, offline)
    folder = _adapter_folder(name, role)
    settings = generation.load(folder, f"{role} {name}")
    if settings is not None:  # it may end texts elsewhere than its base
        model.generation_config = settings
    log.info("%s %s is an adapter of %s: it is added to the weights of that model", role, name, base)
    return model


def _refuse_quantised_student(config: PretrainedConfig, name: str, role: str) -> None:
    """Weights of a few bits, as GPTQ, AWQ and others store them, have no gradients.

    Raises:
        UserError: a student has such weights.
    """
    method = quantisation_method(config)
    if role == "student" and method is not None:
        raise UserError(
            f"student {name}: its weights are quantised ({method}) and cannot be trained. Give the model that it was "
            "made from: its page on the hub names it."
        )


def random_model(config: PretrainedConfig) -> nn.Module:
    """A model with fresh float32 weights, whatever those of its namesake are stored in; seed torch before."""
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


def fingerprint(model: nn.Module, values: bool = True) -> str:
    """Hash that tells models apart: names and shapes of all parameters and, with `values`, a sample of each.

    Of a sharded model call it in every process.
    """
    total = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        total.update(f"{name} {tuple(parameter.shape)}".encode())
        if values:
            owner, _, own = name.rpartition(".")
            with align_module_device(model.get_submodule(owner)):  # loads what was put on the disk
                flat = full(getattr(model.get_submodule(owner), own).detach()).flatten()
                total.update(flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes())
    return total.hexdigest()


def weights_fingerprint(name: str, role: str) -> str:
    """What a model's weights are, without loading them: the commit of a hub model, else a hash of the folder's files.

    A folder's files are read whole, at the speed of the disk.
    """
    base = adapted_base(name, role)
    if base is not None:
        folder = _adapter_folder(name, role)
        with _loading_base(name, base, role):
            return f"{_files_fingerprint(folder)} on {weights_fingerprint(base, role)}"

    source = Path(locate(name, role))
    if not source.is_dir():
        return f"{name}@{getattr(load_config(name, role), '_commit_hash', None)}"
    return _files_fingerprint(source)


def _files_fingerprint(folder: Path) -> str:
    configs = [folder / name for name in (model_folders.CONFIG, model_folders.ADAPTER_CONFIG)]
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    files = [file for file in configs if file.is_file()] + weights
    hashes = "".join(f"{file.name} {sha256_of(file)} " for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


def context_length(config: PretrainedConfig) -> float:
    """Tokens the model can read at once; infinite where its config names no limit."""
    text = config.get_text_config()
    limits = [getattr(text, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=math.inf)


def window_length(asked: int, shapes: Iterable[PretrainedConfig]) -> int:
    """Tokens per window: as many as asked for, or fewer where a model reads no more at once, which is logged."""
    length = int(min(asked, *map(context_length, shapes)))
    if length < asked:
        log.info("windows of %d tokens instead of %d: a model reads no more at once", length, asked)
    return length


def _generation_problem(model: nn.Module) -> str | None:
    """Return why a model cannot write two tokens; keep its random generators and its mode as they are."""
    start = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with preserve_rng_and_mode(model), torch.no_grad():
        model.eval()
        try:
            model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=2)
        except Exception as error:  # ids beyond the vocabulary, code of its own, values of another type
            return reason(error)
    return None


def _load(load: Any, name: str, role: str, what: Literal["config.json", "tokenizer", "weights"], **options: Any) -> Any:
    source = locate(name, role)
    local = not Path(source).is_dir() and not hub_is_reachable()
    try:
        return load(source, trust_remote_code=False, local_files_only=local, **options)
    except Exception as error:  # five libraries raise errors of their own for files that are damaged or do not fit
        raise _unreachable(name, role, what, error, local) from error


def _unreachable(name: str, role: str, what: str, error: Exception, offline: bool) -> UserError:
    words = " ".join(str(error).split())
    if "trust_remote_code" in words or "custom code" in words:
        return UserError(
            f"{role} {name}: it needs Python code of its own, which is never run here. Expected an architecture that "
            "transformers contains; choose another model, or one converted to such an architecture."
        )

    source = Path(locate(name, role))
    if source.is_dir():
        return UserError(
            f"{role} {name}: its {what} cannot be loaded. The folder holds: {model_folders.listing(source)}."
            f"{_hint(source, role, what)}\n  {type(error).__name__}: {words}"
        )
    why = "the hub cannot be reached, and no copy is in the cache" if offline else words
    return UserError(f"{role} {name}: its {what} cannot be loaded: {why}.{_attached_models()}\n  {ATTACH}")


def _hint(folder: Path, role: str, what: str) -> str:
    """What may be done about files that cannot be loaded; empty where nobody knows."""
    if what != "weights":
        return ""
    stored = model_folders.read_json(folder / model_folders.CONFIG).get("quantization_config")
    if isinstance(stored, dict):
        method = stored.get("quant_method", "unknown method")
        return f" Its weights are quantised ({method}): the model that it was made from needs no package of its own."
    if role == "student" and not model_folders.has_weights(folder, allow_pickle=True):
        return " A random start needs no weights: --student-init random."
    return ""
