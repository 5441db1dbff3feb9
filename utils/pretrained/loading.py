"""Models and tokenizers by hub id or local folder, and the finished student as a folder of its own.

Remote code is never run, nothing is resized or padded, and a student's weights are float32. What cannot be
loaded is one `UserError` that names the model and the ways to attach it.
"""

import copy
import hashlib
import importlib.util
import logging
import math
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch
import transformers
from accelerate.utils import align_module_device
from huggingface_hub import constants
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from ..advice import reason
from ..errors import UserError
from ..files import atomic_folder, sha256_of, write_text
from ..machine.hardware import Choice
from ..parallel.sharding import full
from ..paths import user_path
from ..seeding import undisturbed
from . import adapter_folders, generation, model_folders
from .families import auto_class

log = logging.getLogger(__name__)

T = TypeVar("T")

ATTACHED = Path("/kaggle/input")
"""Where a notebook's attached models appear."""

CARD = "README.md"
"""Of an exported model: where the hub looks for a model card."""

QUANTISED = {"8bit": (7, 5), "4bit": (6, 0)}
"""Weights by bitsandbytes, and the compute capability that each needs (installation guide of bitsandbytes 0.50)."""

ATTACH = """\
To attach a model: give its local folder (config.json, weights and tokenizer.json); on Kaggle add it as an input
  of the notebook and give the folder below /kaggle/input; on a machine without internet download it elsewhere
  with `hf download ID` and set HF_HUB_OFFLINE=1 beside a copy of that cache (HF_HOME)."""


def locate(name: str, role: str) -> str:
    """What `from_pretrained` is to be given for a name: a local folder, else the hub id itself.

    A folder without config.json stands for the only model below it (Kaggle adds folders for framework, variation and
    version); a hub id stands for the attached folder of the same name, if there is one (see `model_folders.attached`).

    Raises:
        UserError: a path that does not exist, a folder that holds no model, or several, or a name that stands for
            several attached ones.
    """
    path = user_path(name)
    if path.is_dir():
        return str(_only_model(path, f"{role} {name}"))
    if path.is_file():
        raise UserError(f"{role} {name}: this is a file. {model_folders.what_the_file_is(path)}")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(
            f"{role} {name}: no such folder. Expected one with config.json.{_attached_models()}\n  {ATTACH}"
        )

    candidates = model_folders.attached(name, ATTACHED)
    if len(candidates) > 1:
        raise UserError(
            f"{role} {name}: {len(candidates)} attached models have that name. Expected one: give its folder."
            + "".join(f"\n  - {candidate}" for candidate in candidates[:10])
        )
    if candidates:
        log.info("%s %s: using the attached folder %s", role, name, candidates[0])
        return str(candidates[0])
    return name


def _only_model(folder: Path, shown: str) -> Path:
    """The model folder that a folder is, or the only one below it."""
    try:
        models = model_folders.models_below(folder, model_folders.MOST_FOLDERS)
    except model_folders.TooManyFolders as error:
        raise UserError(
            f"{shown}: this folder holds no config.json, and {error} are below it, too many to look for a model in. "
            "Expected the folder of the model itself."
        ) from None

    if len(models) > 1:
        raise UserError(
            f"{shown}: this folder holds {len(models)} models (folders with a config.json). Expected one."
            + "".join(f"\n  - {model}" for model in models[:10])
        )
    if not models:
        explanation = model_folders.what_it_is(folder)
        raise UserError(
            f"{shown}: this folder holds no models (folders with a config.json). "
            + (explanation or "Expected one.")
            + f"\n  It holds: {model_folders.listing(folder)}"
        )
    if why := model_folders.wrong_kind(models[0]):
        raise UserError(f"{shown}: {why}")
    return models[0]


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


def quantisation_method(config: PretrainedConfig) -> str | None:
    """How a model's weights are stored in a few bits; None: they are not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown method")


def _quantisation(weights: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """int8 with outliers apart (arXiv 2208.07339), or NF4 with quantised scales (arXiv 2305.14314)."""
    if weights == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def check_weights(requested: str, setting: str, device: torch.device) -> None:
    """Find out, with nothing loaded, whether a device can compute with such weights.

    Raises:
        UserError: 8bit or 4bit without a GPU that can, or without bitsandbytes.
    """
    if requested not in QUANTISED:
        return
    needed = QUANTISED[requested]
    has = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if has is None or has < needed:
        got = f"this run is on the {device.type}" if has is None else f"this GPU has {has[0]}.{has[1]}"
        others = ", or 4bit" if has is not None and has >= QUANTISED["4bit"] else ""
        raise UserError(
            f"{setting}: got {requested}, which needs an NVIDIA GPU of compute capability {needed[0]}.{needed[1]} or "
            f"more, and {got}. Expected auto, float32, float16 or bfloat16{others}."
        )
    require("bitsandbytes", f"{setting}={requested}", extra="quant")


def require(package: str, wanted_by: str, extra: str) -> None:
    """Make sure that an optional package is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{wanted_by} needs {package}, which is not installed: pip install '.[{extra}]'")


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


def frozen_dtype(requested: str, device: torch.device, precision: str) -> Choice[torch.dtype]:
    """What frozen weights, a teacher's or those below an adapter, are computed in.

    Args:
        requested: a precision, or `auto`.
        precision: what the student computes in (no, fp16, bf16).
    """
    half = torch.bfloat16 if precision == "bf16" else torch.float16
    if requested in QUANTISED:  # products of 8-bit weights take float16 and nothing else
        return Choice(torch.float16 if requested == "8bit" else half, f"what {requested} weights are computed in")
    if requested != "auto":
        return Choice(getattr(torch, requested), "asked for")
    if device.type != "cuda" or precision == "no":
        return Choice(torch.float32, "as the student")
    return Choice(half, "half the memory; frozen, so nothing is lost in updates")


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


def export(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str | None) -> None:
    """Write model, tokenizer and model card; the folder is whole or absent.

    It loads without this project: with `from_pretrained` of the class that its card names; where the model is peft's,
    what is written is the adapter alone. Generation stops where the tokenizer ends a text (of conversations a turn),
    besides where the model did before, and pads with a token that exists.
    """
    with atomic_folder(folder) as staging:
        _write(model, tokenizer, staging)
        if card is not None:
            write_text(staging / CARD, card)


def _write(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any) -> None:
    """Write the weights and all that belongs to them; `options` of save_pretrained."""
    _put_generation_right(model, tokenizer)
    # peft would ask the hub whether the base's vocabulary was resized, which never happens here
    options |= {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(folder, **options)
    _write_settings(model, tokenizer, folder)


def _write_settings(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    _put_generation_right(model, tokenizer)
    model.generation_config.save_pretrained(folder)  # peft leaves it to the base, which may stop elsewhere
    tokenizer.save_pretrained(folder)


def _put_generation_right(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    # from the config, as a process of several may hold none of the rows
    generation.drop_unusable_ids(model.generation_config, model.config.get_text_config().vocab_size)
    generation.end_with_tokenizer(model.generation_config, tokenizer)
    generation.put_right(model.generation_config)


def rehearse_export(model: nn.Module, tokenizer: PreTrainedTokenizerBase, merges: bool = False) -> None:
    """Do without the weights what `export` will do, into a folder that is gone afterwards, and load what it wrote.

    Generation settings with which the model cannot write two tokens are replaced by none, with a warning.

    Args:
        merges: the adapter of a peft model will be added to the weights of its base, and a plain model be exported.

    Raises:
        UserError: something that came with the base cannot be written, or not be read again.
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    try:
        with tempfile.TemporaryDirectory() as name:
            _write_for_trial(model, tokenizer, Path(name), merges)
    except Exception as error:  # whatever transformers minds in files of others
        raise UserError(
            f"the student (a {type(plain).__name__}, transformers {transformers.__version__}) could not be exported "
            "after training: its configuration or tokenizer cannot be written, or not be loaded again. Expected files "
            f"that save_pretrained takes back: put them right in the student's folder.\n  {reason(error)}"
        ) from error
    _try_generation(plain, tokenizer)


def _write_for_trial(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, merges: bool) -> None:
    if not hasattr(model, "peft_config"):
        _write(model, tokenizer, folder, state_dict={})
    elif merges:
        _write_settings(model, tokenizer, folder)
        model.get_base_model().config.save_pretrained(folder)
    else:
        _write(model, tokenizer, folder)  # an adapter is small
    if (folder / model_folders.CONFIG).is_file():
        AutoConfig.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    GenerationConfig.from_pretrained(folder)


def _try_generation(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model write two tokens as its generation settings say, or else with nothing but its tokens' ids."""
    problem = _generation_problem(model)
    if problem is None:
        return

    log.warning(
        "generation settings of the student: only its tokens' ids are kept, since with the others it writes nothing "
        "(%s)",
        problem,
    )
    generation.reset(model.generation_config)
    _put_generation_right(model, tokenizer)

    problem = _generation_problem(model)
    if problem is not None:
        log.warning(
            "the student writes nothing with its tokens' ids alone either (%s): training needs no generation, but "
            "expect generate() of the exported student to fail in the same way",
            problem,
        )


def _generation_problem(model: nn.Module) -> str | None:
    """Return why a model cannot write two tokens; keep its random generators and its mode as they are."""
    start = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with undisturbed(model), torch.no_grad():
        model.eval()
        try:
            model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=2)
        except Exception as error:  # ids beyond the vocabulary, code of its own, values of another type
            return reason(error)
    return None


def where_from(name: str) -> str:
    """A hub id, or the whole path of a local folder: where anybody on this machine finds the model."""
    folder = user_path(name)
    return str(folder.resolve()) if folder.is_dir() else name


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


def _attached_models() -> str:
    attached = model_folders.models_below(ATTACHED)
    return "\n  Attached models: " + ", ".join(map(str, attached[:10])) if attached else ""


@cache
def hub_is_reachable() -> bool:
    """Whether the hub may be asked: not switched off, and its name resolves. Saves a minute of retries per file."""
    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
    except OSError:
        log.info("%s cannot be reached: only local folders and the cache are used", constants.ENDPOINT)
        return False
    return True
