"""The protocols of servers that tell the log-probabilities of a text that they are given.

vLLM     POST /v1/completions with `prompt_logprobs`: for each position a map from tokens to log-probabilities, with the
         real token always among them
SGLang   POST /generate with `return_logprob`: the real tokens' log-probabilities, and lists of the most probable ones

llama.cpp and Ollama tell log-probabilities of tokens that they generate, not of a text: they are of no use here.

Shapes: T tokens of a window, K listed tokens of each position.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import UserError
from .http_client import BadAnswer, ServerClient

GENERATED_ONLY = (
    "tells the log-probabilities of tokens that it generates, not those of a text that it is given. Expected a vLLM or "
    "SGLang server, or a teacher in this process (--teacher ID or DIR)."
)
"""Reason for which a server is of no use."""

LARGEST_MASS = 1.001
"""Sum of the listed probabilities of a position, at most: rounding makes it a little more than 1."""
ROUNDING = 1e-3
"""Nats by which a log-probability may be too large."""
LARGEST_TOKEN = 2**31 - 1
"""Beyond it nothing is the number of a token."""


class Lists(NamedTuple):
    """The most probable tokens of a window's positions, and what is needed to check that they are those."""

    ids: np.ndarray
    """[T - 1, K] int64."""
    log_probs: np.ndarray
    """[T - 1, K] float32."""
    realised: np.ndarray
    """[T - 1] float32 log-probability of each token but the first."""
    texts: list[str | None]
    """[T - 1] the server's own text of each token but the first, where it tells one."""


class ServerProtocol(Protocol):
    """One kind of server."""

    name: str

    def request(self, ids: Sequence[int], top_k: int) -> tuple[str, dict[str, Any]]:
        """Return URL and body of the request for a window's lists."""

    def read(self, answer: Any, ids: Sequence[int], top_k: int) -> Lists:
        """Return the lists of an answer.

        Raises:
            BadAnswer: it is not what was asked for.
        """


class Vllm:
    """vLLM, and servers that speak as it does."""

    name = "vLLM"

    def __init__(self, client: ServerClient, model: str) -> None:
        self.url = f"{client.address}/completions"
        self.model = model

    def request(self, ids: Sequence[int], top_k: int) -> tuple[str, dict[str, Any]]:
        """Return URL and body of the request for a window's lists."""
        body = {
            "model": self.model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 1,
            "prompt_logprobs": top_k,
        }
        return self.url, body

    def read(self, answer: Any, ids: Sequence[int], top_k: int) -> Lists:
        """Return the lists of an answer."""
        try:
            entries = answer["choices"][0].get("prompt_logprobs")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise BadAnswer("an answer without choices") from None
        if entries is None:
            raise UserError(f"the server {GENERATED_ONLY}")
        if not isinstance(entries, list) or len(entries) != len(ids):
            raise BadAnswer(f"log-probabilities of {_length(entries)} positions, expected {len(ids)}")

        # The first token has none before it that could tell it.
        positions = []
        for entry, token in zip(entries[1:], ids[1:], strict=True):
            positions.append(_vllm_position(entry, int(token), top_k))
        return _stacked(positions, top_k)


class Sglang:
    """SGLang.

    Args:
        adapter: name of a LoRA adapter there; None: the model itself.
    """

    name = "SGLang"

    def __init__(self, client: ServerClient, adapter: str | None = None) -> None:
        self.url = f"{client.root}/generate"
        self.adapter = adapter

    def request(self, ids: Sequence[int], top_k: int) -> tuple[str, dict[str, Any]]:
        """Return URL and body of the request for a window's lists."""
        body = {
            "input_ids": list(ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": top_k,
            "return_text_in_logprobs": True,
        }
        if self.adapter is not None:
            body["lora_path"] = self.adapter
        return self.url, body

    def request_naming(self, token: int) -> tuple[str, dict[str, Any]]:
        """Return URL and body of a request that only names a token, which the server refuses if it has none such.

        One that is given it to read instead ends: nothing there checks the numbers of a text's tokens.
        """
        url, body = self.request([0], 1)
        return url, {**body, "token_ids_logprob": [token]}

    def read(self, answer: Any, ids: Sequence[int], top_k: int) -> Lists:
        """Return the lists of an answer."""
        try:
            facts = answer["meta_info"]
            real, tops = facts.get("input_token_logprobs"), facts.get("input_top_logprobs")
        except (KeyError, TypeError, AttributeError):
            raise BadAnswer("an answer without meta_info") from None
        if real is None or tops is None:
            raise UserError(f"the server {GENERATED_ONLY}")
        for column in (real, tops):
            if not isinstance(column, list) or len(column) != len(ids):
                raise BadAnswer(f"log-probabilities of {_length(column)} positions, expected {len(ids)}")

        largest = int(max(ids))
        positions = []
        for token, own, top in zip(ids[1:], real[1:], tops[1:], strict=True):
            positions.append(_sglang_position(own, top, int(token), top_k, is_largest=int(token) == largest))
        return _stacked(positions, top_k)


class _Position(NamedTuple):
    """One position of an answer."""

    token: int
    """The real one."""
    ids: list[int]
    log_probs: list[float]
    realised: float
    text: str | None


def _vllm_position(entry: Any, token: int, top_k: int) -> _Position:
    """Return a position of vLLM's: a map of K tokens, or K + 1 where the real one is not among the most probable."""
    if not isinstance(entry, Mapping) or str(token) not in entry:
        raise BadAnswer(f"a position without its real token {token}: another text was scored")
    try:
        real = entry[str(token)]
        listed = {int(key): float(value["logprob"]) for key, value in entry.items()}
        realised = float(real["logprob"])
        _require_numbers(listed)
    except (KeyError, TypeError, ValueError):
        raise BadAnswer("a position whose entries are no tokens with a logprob") from None

    # The real token comes with its rank; where it is listed besides, that is its place in the list.
    rank = real.get("rank")
    is_besides = rank > top_k if isinstance(rank, int) else len(listed) > top_k
    if is_besides:
        del listed[token]
    return _checked(_Position(token, [*listed], [*listed.values()], realised, real.get("decoded_token")), top_k)


def _sglang_position(own: Any, top: Any, token: int, top_k: int, *, is_largest: bool) -> _Position:
    """Return a position of SGLang's: the real token's [log-probability, id, text], and a list of such.

    Args:
        is_largest: no token of the window has a larger number.
    """
    try:
        realised, scored, *text = own
        ids = [int(entry[1]) for entry in top]
        log_probs = [float(entry[0]) for entry in top]
        realised = float(realised)
        _require_numbers(ids)
    except (TypeError, ValueError, IndexError):
        raise BadAnswer("a position whose entries are no [logprob, id, text]") from None
    # It writes the last token of a vocabulary as 0, whose text is another's; the log-probability is its own.
    is_last = scored == 0 and is_largest
    if scored != token and not is_last:
        raise BadAnswer(f"a position with the token {scored} in place of {token}: another text was scored")
    words = text[0] if text and scored == token else None
    return _checked(_Position(token, ids, log_probs, realised, words), top_k)


def _require_numbers(ids: Iterable[int]) -> None:
    """Check that numbers of tokens have a size that any vocabulary has.

    Raises:
        ValueError: they have not.
    """
    if any(abs(token) > LARGEST_TOKEN for token in ids):
        raise ValueError("no numbers of tokens")


def _checked(position: _Position, top_k: int) -> _Position:
    """Return a position whose list is one of distinct tokens with log-probabilities.

    Raises:
        BadAnswer: it is another.
    """
    if len(position.ids) != top_k or len({*position.ids}) != top_k:
        raise BadAnswer(f"a position with {len({*position.ids})} listed tokens, expected {top_k}")
    mass = float(np.exp(position.log_probs).sum())
    if not 0 < mass <= LARGEST_MASS:
        raise BadAnswer(
            f"listed probabilities that add to {mass:.3g}, expected at most 1: are these log-probabilities, as "
            "--logprobs-mode raw_logprobs gives them?"
        )
    if min(position.ids) < 0:
        raise BadAnswer(f"a listed token {min(position.ids)}, expected numbers from 0 on")
    _check_realised(position)
    return position


def _check_realised(position: _Position) -> None:
    """Check the log-probability of the real token: that of a token which comes behind all listed ones, if it is none.

    Raises:
        BadAnswer: it is no such number.
    """
    is_number = math.isfinite(position.realised) and position.realised <= ROUNDING
    if is_number and position.token not in position.ids:
        room = LARGEST_MASS - float(np.exp(position.log_probs).sum())
        is_number = math.exp(position.realised) <= room and position.realised <= min(position.log_probs) + ROUNDING
    if not is_number:
        raise BadAnswer(f"a real token with the log-probability {position.realised:.4g}, which it cannot have")


def _stacked(positions: Sequence[_Position], width: int) -> Lists:
    """Return the positions of a window, with so many listed tokens each."""
    return Lists(
        ids=np.array([position.ids for position in positions], dtype=np.int64).reshape(-1, width),
        log_probs=np.array([position.log_probs for position in positions], dtype=np.float32).reshape(-1, width),
        realised=np.array([position.realised for position in positions], dtype=np.float32),
        texts=[position.text for position in positions],
    )


def _length(column: Any) -> int | str:
    """Return the length of a list, or words for something else."""
    return len(column) if isinstance(column, list) else "no"


# ------------------------------------------------------------------------------------------ which server it is


class Server(NamedTuple):
    """A server that was recognised."""

    protocol: ServerProtocol
    model: str
    """Name of the model there."""
    source: str
    """What the server loaded it from, as far as it tells; else its name."""
    context: int | None
    """Tokens that it reads at most, as far as it tells."""


def recognise(client: ServerClient, model: str | None) -> Server:
    """Find out what a server is, and which of its models is meant.

    Args:
        model: name at the server; None: the only one that it has.

    Raises:
        UserError: it does not answer, has no such model, or is one that is of no use.
    """
    entry = _choose_model(client, model)
    owner = str(entry.get("owned_by", "")).lower()
    kind = OWNERS.get(owner) or _recognise_by_paths(client)
    if kind in USELESS:
        raise UserError(f"teacher {client.address}: this is {kind}, which {GENERATED_ONLY}")

    if kind == "SGLang":
        return _sglang(client, entry)
    name = str(entry["id"])
    return Server(
        protocol=Vllm(client, name),
        model=name,
        source=str(entry.get("root") or name),
        context=_whole_number(entry.get("max_model_len")),
    )


def _sglang(client: ServerClient, entry: Mapping[str, Any]) -> Server:
    """Return an SGLang server with one of its models, or with an adapter of its model."""
    name = str(entry["id"])
    # Its list of models gives a model the name that users chose, also as what it was loaded from.
    source = entry.get("root") if entry.get("parent") else _facts(client, MODEL_FACTS).get("model_path")
    # The longest text has one token fewer, and is a little shorter than the model's context.
    longest = _facts(client, SERVER_FACTS).get("max_req_input_len", entry.get("max_model_len"))
    return Server(
        protocol=Sglang(client, adapter=name if entry.get("parent") else None),
        model=name,
        source=str(source or entry.get("root") or name),
        context=_whole_number(longest),
    )


def _facts(client: ServerClient, paths: Sequence[str]) -> Mapping[str, Any]:
    """Return what an SGLang server says under the first of some paths that it has."""
    for path in paths:
        reply = client.look(client.root + path)
        if reply.status == 200 and isinstance(reply.content, Mapping):
            return reply.content
    return {}


def _whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


MODEL_FACTS = ("/model_info", "/get_model_info")
"""Paths under which SGLang tells of its model: today's, and one that older servers have."""

SERVER_FACTS = ("/server_info", "/get_server_info")
"""The same of the server."""


OWNERS = {"vllm": "vLLM", "sglang": "SGLang", "llamacpp": "llama.cpp", "library": "Ollama"}
"""Owner of its models by a server's own word -> the server."""

USELESS = ("llama.cpp", "Ollama")
"""Servers that only tell log-probabilities of generated tokens."""

PATHS = {
    "/model_info": "SGLang",
    "/get_model_info": "SGLang",
    "/api/tags": "Ollama",
    "/props": "llama.cpp",
    "/version": "vLLM",
}
"""Path that one kind of server alone has, of those that come later -> the server. SGLang answers Ollama's, too."""


def _recognise_by_paths(client: ServerClient) -> str:
    """Return the kind of a server whose models do not tell it; vLLM, whose protocol others speak too, if none does."""
    for path, kind in PATHS.items():
        if client.look(client.root + path).status == 200:
            return kind
    return "vLLM"


def _choose_model(client: ServerClient, model: str | None) -> Mapping[str, Any]:
    """Return a server's entry of the model that is meant.

    Raises:
        UserError: there is none.
    """
    reply = client.look(f"{client.address}/models")
    if reply.status != 200:
        raise UserError(client.refusal(reply))
    try:
        entries = {str(entry["id"]): entry for entry in reply.content["data"]}
    except (KeyError, TypeError):
        raise UserError(
            f"teacher {client.address}: /models is not what a server of language models answers. Expected the "
            "address of a vLLM or SGLang server, such as http://HOST:PORT/v1."
        ) from None

    names = client.clean(", ".join(entries)) or "none"
    if model is not None and model not in entries:
        raise UserError(f"teacher {client.address}: got the model {model}, and the server has: {names}")
    if model is None and len(entries) != 1:
        raise UserError(
            f"teacher {client.address}: the server has these models: {names}. Expected one: choose it with "
            "--teacher-model NAME."
        )
    return entries[model] if model is not None else next(iter(entries.values()))
