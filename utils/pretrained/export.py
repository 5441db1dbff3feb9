"""Export of a student: its folder is written whole or not at all, and rehearsed before training, without weights.

The rehearsal finds before hours of training what would fail after them: settings of the base that cannot be saved.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..advice import reason
from ..errors import UserError
from ..files import atomic_folder, write_text
from ..seeding import preserve_rng_and_mode
from . import generation, model_folders

log = logging.getLogger(__name__)

CARD = "README.md"
"""File of an exported model in which the hub looks for a model card."""


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
    """Write the weights and all that belongs to them.

    Args:
        options: of save_pretrained.
    """
    # Before the weights: save_pretrained writes the generation settings too, and refuses contradictory ones.
    _put_generation_right(model, tokenizer)

    if hasattr(model, "peft_config"):
        # peft would ask the hub whether the base's vocabulary was resized, which never happens here
        options["save_embedding_layers"] = False
    model.save_pretrained(folder, **options)
    _write_settings(model, tokenizer, folder)


def _write_settings(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write generation settings and tokenizer."""
    _put_generation_right(model, tokenizer)
    model.generation_config.save_pretrained(folder)  # peft leaves it to the base, which may stop elsewhere
    tokenizer.save_pretrained(folder)


def _put_generation_right(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Change a model's generation settings until they can be saved and end texts where its tokenizer does."""
    # from the config, as a process of several may hold none of the rows
    vocabulary_size = model.config.get_text_config().vocab_size
    generation.drop_unusable_ids(model.generation_config, vocabulary_size)
    generation.end_with_tokenizer(model.generation_config, tokenizer)
    generation.put_right(model.generation_config)


def rehearse_export(model: nn.Module, tokenizer: PreTrainedTokenizerBase, merges: bool = False) -> None:
    """Do without the weights what `export` will do, into a temporary folder, and load what it wrote.

    Generation settings with which the model cannot write two tokens are replaced by none, with a warning.

    Args:
        merges: the adapter of a peft model will be added to the weights of its base, and a plain model be exported.

    Raises:
        UserError: something that came with the base cannot be written, or not be read again.
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    try:
        with tempfile.TemporaryDirectory() as name:
            _write_for_trial(model, tokenizer, Path(name), merges=merges)
    except Exception as error:  # whatever transformers minds in files of others
        raise UserError(
            f"the student (a {type(plain).__name__}, transformers {transformers.__version__}) could not be exported "
            "after training: its configuration or tokenizer cannot be written, or not be loaded again. Expected files "
            f"that save_pretrained takes back: put them right in the student's folder.\n  {reason(error)}"
        ) from error

    _try_generation(plain, tokenizer)


def _write_for_trial(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, *, merges: bool) -> None:
    """Write what `export` will write, but for large weights, and load it again."""
    if not hasattr(model, "peft_config"):
        _write(model, tokenizer, folder, state_dict={})
    elif merges:
        _write_settings(model, tokenizer, folder)
        model.get_base_model().config.save_pretrained(folder)
    else:
        _write(model, tokenizer, folder)  # an adapter is small

    # The folder of an adapter has no config of the whole model.
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

    # Nothing but ids: the model may still write with them, and a text must end somewhere.
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
    with preserve_rng_and_mode(model), torch.no_grad():
        model.eval()
        try:
            model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=2)
        except Exception as error:  # ids beyond the vocabulary, code of its own, values of another type
            return reason(error)
    return None
