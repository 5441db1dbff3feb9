"""Tokens before a plain text: the one place that says how a text starts.

A tokenizer that puts a start of text (bos) in front of every text keeps its convention. Of the others most separate
texts by their end of text, and a text starts behind the end of the one before. Tokenizers of chat models are the
exception: their `eos_token` ends a turn of a conversation (`<|im_end|>`), and what separated the texts of pretraining
is another token (`<|endoftext|>`).
"""

from transformers import PreTrainedTokenizerBase

SEPARATORS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
)
"""Names of the tokens by which pretraining separates texts, commonest first."""


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the start of text (bos) where the tokenizer puts it in front of every text; None where it does not."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None

    # a trial, since the settings that decide it differ between kinds of tokenizers
    ids = tokenizer("a")["input_ids"]
    return bos if ids[:1] == [bos] else None


def start_candidates(
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None = None,
    *,
    chosen: str | None = None,
    name: str = "the tokenizer",
) -> list[int]:
    """Return the tokens that a plain text could start with, the one that it does start with first.

    Args:
        tokenizer: as it was loaded.
        rows: of the model's head; a token beyond them is no candidate. None: all tokens have one.
        chosen: a token that the user wants; it is the only candidate.
        name: what errors call the tokenizer.

    Returns:
        token ids; [] if there is none.

    Raises:
        ValueError: `chosen` is no single token of the model.
    """
    if chosen is not None:
        return [_chosen_id(tokenizer, rows, chosen, name)]
    leading = leading_bos(tokenizer)
    if leading is not None and _has_row(leading, rows):
        return [leading]

    # By convention; no field of a tokenizer names the separator of pretraining.
    special = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    separators = [special[separator] for separator in SEPARATORS if separator in special]
    eos = tokenizer.eos_token_id
    bos = tokenizer.bos_token_id
    pad = tokenizer.pad_token_id

    # A chat model's eos ends turns, so that pretraining separated texts by another token, if there is one.
    if eos is None:
        ordered = [bos]
    elif eos in separators or not _ends_turns(tokenizer):
        ordered = [eos, bos, *separators, pad]
    else:
        ordered = [*separators, eos, bos, pad]

    candidates = [token_id for token_id in ordered if token_id is not None]
    candidates = [token_id for token_id in candidates if _has_row(token_id, rows)]
    return list(dict.fromkeys(candidates))  # each once, in this order


def _has_row(token_id: int, rows: int | None) -> bool:
    return rows is None or token_id < rows


def _ends_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the end of text is written by the chat template, which then ends turns with it."""
    template = str(tokenizer.chat_template or "")
    return tokenizer.eos_token in template or "eos_token" in template


def _chosen_id(
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None,
    chosen: str,
    name: str,
) -> int:
    """Return the id of the token that the user wants plain text to start with."""
    token_id = tokenizer.get_vocab().get(chosen)
    if token_id is None or not _has_row(token_id, rows):
        added = tokenizer.added_tokens_decoder.items()
        usable = [token.content for added_id, token in added if _has_row(added_id, rows)]
        raise ValueError(
            f"{name} has no token {chosen!r} within its model's rows, which plain text was to start with; expected one "
            f"of its tokens, such as {', '.join(usable[:8]) or 'any of its vocabulary'}"
        )
    return token_id
