"""Tokens before a plain text: the one place that says how a text starts.

A tokenizer that puts a start of text (bos) in front of every text keeps its convention. Of the others most separate
texts by their end of text, and a text starts behind the end of the one before. Tokenizers of chat models are the
exception: their `eos_token` ends a turn of a conversation (`<|im_end|>`), and what separated the texts of pretraining
is another token (`<|endoftext|>`).
"""

from transformers import PreTrainedTokenizerBase

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
"""Names under which pretraining separates texts, commonest first."""


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The start of text (bos), where the tokenizer puts it in front of every text."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return None
    return bos


def start_candidates(
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None = None,
    *,
    chosen: str | None = None,
    name: str = "the tokenizer",
) -> list[int]:
    """Tokens that a plain text could start with, the one that it does start with first; [] if there is none.

    Args:
        tokenizer: as it was loaded.
        rows: of the model's head; a token beyond them is no candidate. None: all tokens have one.
        chosen: a token that the user wants; it is the only candidate.
        name: what errors call the tokenizer.

    Raises:
        ValueError: `chosen` is no single token of the model.
    """
    if chosen is not None:
        return [_chosen(tokenizer, rows, chosen, name)]
    leading = leading_bos(tokenizer)
    if leading is not None and (rows is None or leading < rows):
        return [leading]

    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    separators = [special[name] for name in SEPARATORS if name in special]
    eos, bos, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    if eos is None:
        ordered = [bos]
    elif eos in separators or not _ends_turns(tokenizer):
        ordered = [eos, bos, *separators, pad]
    else:
        ordered = [*separators, eos, bos, pad]

    known = [i for i in ordered if i is not None and (rows is None or i < rows)]
    return list(dict.fromkeys(known))


def _ends_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the end of text is written by the chat template, which then ends turns with it."""
    template = str(tokenizer.chat_template or "")
    return tokenizer.eos_token in template or "eos_token" in template


def _chosen(tokenizer: PreTrainedTokenizerBase, rows: int | None, chosen: str, name: str) -> int:
    token = tokenizer.get_vocab().get(chosen)
    if token is None or (rows is not None and token >= rows):
        special = [t.content for i, t in tokenizer.added_tokens_decoder.items() if rows is None or i < rows]
        raise ValueError(
            f"{name} has no token {chosen!r} within its model's rows, which plain text was to start with; expected one "
            f"of its tokens, such as {', '.join(special[:8]) or 'any of its vocabulary'}"
        )
    return token
