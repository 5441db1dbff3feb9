"""Checks of a server before anything is asked in earnest: the tokenizer, the length of windows, the length of lists."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .http_client import BadAnswer, ServerClient
from .protocols import Lists, Server, Sglang

PROBE = "The naïve café — 東京, 3.14 “don't”\n\n  x = y\tИ снова: Straße #1!"
"""Text with several scripts, punctuation, numbers and white space, which tokenizers cut differently."""
SPREAD = 40
"""Tokens from all over the vocabulary that are asked for besides."""
MOST_DIFFERING = 0.1
"""Share of the compared tokens that may read otherwise at the server: white space and special tokens can."""
LEAST_COMPARED = 8
"""Tokens below which nothing can be said."""
SHOWN = 3
"""Differing tokens that a message quotes."""


class Demand(NamedTuple):
    """Needs of a run that a server must meet."""

    tokenizer: PreTrainedTokenizerBase
    """The teacher's, as the run reads with it."""
    length: int
    """Tokens of the longest window."""
    top_k: int
    """Tokens that are to be listed at each position."""


def check_server(client: ServerClient, server: Server, demand: Demand) -> None:
    """Check that a server's model reads with the run's tokenizer, and lists as much as the run asks for.

    Raises:
        UserError: it does not.
    """
    _check_length(client, server, demand.length)
    _check_tokenization(client, server, demand.tokenizer)
    _check_vocabulary(client, server, demand.tokenizer)

    ids = _probe_ids(server, demand.tokenizer)
    _compare_texts(client, ids, _probe(client, server, ids, demand.top_k), demand.tokenizer)


def _check_length(client: ServerClient, server: Server, length: int) -> None:
    """Refuse windows that are longer than what the server reads; it generates one token besides."""
    if server.context is not None and length + 1 > server.context:
        raise UserError(
            f"teacher {client.address}: the server reads {server.context:,} tokens at most, one of which it generates, "
            f"and windows have up to {length:,}. Give --max-length {server.context - 1}, or start the server with a "
            "larger context (vLLM: --max-model-len, SGLang: --context-length)."
        )


def _check_tokenization(client: ServerClient, server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the tokens of a text, where the server tells its own."""
    body = {"model": server.model, "prompt": PROBE, "add_special_tokens": False}
    reply = client.look(f"{client.root}/tokenize", body)
    tokens = reply.content.get("tokens") if reply.status == 200 and isinstance(reply.content, dict) else None
    if tokens is None:
        return

    ids = tokenizer(PROBE, add_special_tokens=False).input_ids
    if tokens != ids:
        at = next((i for i, pair in enumerate(zip(tokens, ids, strict=False)) if pair[0] != pair[1]), len(ids))
        raise _wrong_tokenizer(
            client,
            f"it cuts a text into {len(tokens)} tokens and the tokenizer into {len(ids)}, other ones from {at} on",
        )


def _check_vocabulary(client: ServerClient, server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with more tokens than the model of an SGLang server, before that one ends at one of them."""
    if not isinstance(server.protocol, Sglang):
        return
    reply = client.look(*server.protocol.request_naming(len(tokenizer) - 1))
    if reply.status != 200:
        raise UserError(client.refusal(reply) + _hint(str(reply.content), 1))


def _probe_ids(server: Server, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return tokens of a text and from all over the vocabulary, as many as the server reads."""
    last = len(tokenizer) - 1
    spread = [round(number * last / SPREAD) for number in range(SPREAD + 1)]
    ids = [*tokenizer(PROBE, add_special_tokens=False).input_ids, *spread]
    return ids if server.context is None else ids[-(server.context - 1) :]


def _probe(client: ServerClient, server: Server, ids: Sequence[int], top_k: int) -> Lists:
    """Return the lists of some tokens.

    Raises:
        UserError: the server refuses, or answers something else.
    """
    url, body = server.protocol.request(ids, top_k)
    reply = client.look(url, body)
    if reply.status != 200:
        raise UserError(client.refusal(reply) + _hint(str(reply.content), top_k))

    try:
        return server.protocol.read(reply.content, ids, top_k)
    except BadAnswer as error:
        raise UserError(
            f"teacher {client.address}: the answer to a probe is of no use: {client.clean(error)}. Expected a vLLM or "
            "SGLang server."
        ) from None
    except UserError as error:
        raise UserError(f"teacher {client.address}: {error}") from None


def _hint(refusal: str, top_k: int) -> str:
    """Return what to do about the common reasons for which a server refuses."""
    if "vocabulary" in refusal:
        return " Expected the tokenizer of the server's model: --teacher-tokenizer."
    if "logprobs" in refusal:
        return f" Start it with --max-logprobs {top_k} or more, or ask for fewer (--top-k, --cache-top-k)."
    return ""


def _compare_texts(
    client: ServerClient,
    ids: Sequence[int],
    lists: Lists,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Compare the texts of single tokens, of those that are whole characters."""
    compared = 0
    differing = []
    for token, text in zip(ids[1:], lists.texts, strict=True):
        expected = _plain(tokenizer.decode([token]))
        if text is None or not expected or "\ufffd" in expected or not _plain(text):
            continue
        compared += 1
        if _plain(text) != expected:
            differing.append(f"{token} is {text!r}, not {expected!r}")

    if compared >= LEAST_COMPARED and len(differing) > MOST_DIFFERING * compared:
        examples = "; ".join(differing[:SHOWN])
        raise _wrong_tokenizer(client, f"{len(differing)} of {compared} tokens are others there: {examples}")


def _plain(text: str) -> str:
    """Return a token's text without what stands for a space, and without spaces at its ends."""
    return text.replace("\u0120", " ").replace("\u2581", " ").strip()


def _wrong_tokenizer(client: ServerClient, difference: str) -> UserError:
    """Return the error of a tokenizer that is not that of the server's model."""
    return UserError(
        f"teacher {client.address}: the server's model has another tokenizer: {client.clean(difference)}. Expected its "
        "own as --teacher-tokenizer ID or DIR."
    )
