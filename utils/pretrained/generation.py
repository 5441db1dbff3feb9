"""Generation settings of a student: those of its base, put right where they contradict each other.

Many bases ship sampling settings without `do_sample`, or beam settings without beams. transformers reads them with a
warning and refuses to write them.
"""

import logging
import re
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..advice import reason
from .model_folders import read_json

log = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
"""File of generation settings beside a model."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that have an effect only where texts are sampled."""
NEUTRAL = {
    "temperature": (None, 1.0),
    "top_p": (None, 1.0),
    "top_k": (None, 0, 50),
    "min_p": (None,),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}
"""Default values of sampling settings: with these alone the author did not ask for sampling."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
"""Settings that name tokens; they stay where all others are dropped."""


def replacement_for_broken(source: str, label: str, offline: bool) -> GenerationConfig | None:
    """Return what a model is to be loaded with in place of a generation_config.json that transformers cannot load.

    None: the file can be loaded, or there is none. What the file says is kept as far as it can be put right.

    Args:
        source: a folder, or a hub id.
        label: role and name of the model, for the log.
        offline: read from the hub's cache alone.
    """
    try:
        GenerationConfig.from_pretrained(source, local_files_only=offline)
        return None
    except OSError:  # no such file, or no JSON: transformers does without it then
        return None
    except Exception as error:  # settings that contradict each other, values of another type
        problem = reason(error)

    # One by one: the constructor would refuse what contradicts itself.
    file = Path(cached_file(source, GENERATION_CONFIG, local_files_only=offline))
    settings = GenerationConfig()
    for name, value in read_json(file).items():
        setattr(settings, name, value)
    put_right(settings)
    log.warning(
        "%s: its %s cannot be loaded (%s); the model is taken with what is left of the settings when they are put "
        "right: correct that file, or delete it, where they matter",
        label,
        GENERATION_CONFIG,
        problem,
    )
    return settings


def load(folder: Path, label: str) -> GenerationConfig | None:
    """Return the generation settings in a folder, put right where they must be; None where it holds none."""
    replacement = replacement_for_broken(str(folder), label, offline=True)
    if replacement is not None:
        return replacement
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # no such file, or no JSON
        return None


def drop_unusable_ids(settings: GenerationConfig, vocabulary_size: int) -> None:
    """Take out, in place, ids of tokens that are none: strings, negative numbers, numbers beyond the vocabulary."""
    dropped: dict[str, Any] = {}
    for name in TOKEN_IDS:
        value = getattr(settings, name, None)
        if value is None:
            continue

        # An empty list names no token either, and is dropped as well.
        ids = value if isinstance(value, list) else [value]
        usable = [token for token in ids if _is_token_id(token, vocabulary_size)]
        if ids and len(usable) == len(ids):
            continue

        dropped[name] = value
        setattr(settings, name, usable or None)

    if dropped:
        listed = ", ".join(f"{name} {value!r}" for name, value in dropped.items())
        log.warning(
            "generation settings of the student: without what is no id of a token in %s; expected integers from 0 "
            "to %d",
            listed,
            vocabulary_size - 1,
        )


def _is_token_id(value: Any, vocabulary_size: int) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and 0 <= value < vocabulary_size


def end_with_tokenizer(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation stop where the tokenizer ends a text (of conversations a turn) besides where it did before.

    It pads with a token that exists: else generate() warns of each text that it pads the end.
    """
    end = tokenizer.eos_token_id
    before = settings.eos_token_id
    ends = before if isinstance(before, list) else [before]
    ends = [token for token in ends if token is not None]
    if end is not None and end not in ends:
        settings.eos_token_id = [end, *ends]

    if settings.pad_token_id is None:
        settings.pad_token_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def put_right(settings: GenerationConfig) -> None:
    """Change, in place, what keeps the settings from being saved; each change is logged.

    Sampling settings say that the author wants sampling: do_sample becomes true. What is left over (beam settings
    without beams, say) has no effect, and is taken out.
    """
    problem = _problem(settings)
    if problem is None:
        return

    # 1. Values that the author chose for sampling take effect.
    chosen = [name for name in SAMPLING if getattr(settings, name, None) not in NEUTRAL[name]]
    if chosen and not settings.do_sample:
        settings.do_sample = True
        log.info("generation settings of the student: do_sample is true now, which its %s asks for", ", ".join(chosen))
        problem = _problem(settings)

    # 2. The settings that transformers complains about, until it has no complaint.
    removed: dict[str, Any] = {}
    while problem is not None:
        names = [name for name in _named_in(problem) if name not in removed and hasattr(settings, name)]
        if not names:
            _reset_with_warning(settings, problem)
            break

        for name in names:
            removed[name] = getattr(settings, name)
            setattr(settings, name, getattr(GenerationConfig(), name, None))
        problem = _problem(settings)

    if removed:
        listed = ", ".join(f"{name} {value}" for name, value in removed.items())
        log.info("generation settings of the student: without %s, which contradicts the others", listed)


def reset(settings: GenerationConfig) -> None:
    """Leave, in place, nothing but the ids of tokens."""
    token_ids = {name: getattr(settings, name, None) for name in TOKEN_IDS}

    # In place, attribute by attribute: the model keeps the same object.
    vars(settings).clear()
    vars(settings).update(vars(GenerationConfig(**token_ids)))


def _reset_with_warning(settings: GenerationConfig, problem: str) -> None:
    reset(settings)
    log.warning("generation settings of the student: only its tokens' ids are kept, because of: %s", problem)


def _problem(settings: GenerationConfig) -> str | None:
    """Return why transformers would not save the settings; None if it would."""
    try:
        settings.validate(strict=True)
    except Exception as error:  # a value of another type fails in some comparison
        return str(error) if isinstance(error, ValueError) else reason(error)
    return None


def _named_in(problem: str) -> list[str]:
    """Return the settings that a message of transformers is about: a line for each."""
    return re.findall(r"^- `(\w+)`:", problem, flags=re.MULTILINE)
