"""ListServer: the lists of windows from a server, for `models.teacher.listed`; and how a run comes by one."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from ..config.protocols import RunConfig
from ..config.settings import ServedConfig
from .checks import Demand, check_server
from .http_client import BadAnswer, ServerClient
from .protocols import Lists, Server, recognise

log = logging.getLogger(__name__)

MOST_BYTES_AHEAD = 256e6
"""Memory of answers that are there, or will be, before anybody has asked for them."""
BYTES_PER_TOKEN = 12
"""Memory of one listed token."""
LARGEST_UNKNOWN = 0.01
"""Probability, at most, of tokens that the tokenizer does not have: the head of a model may have rows to spare."""

SERVED = "served "
"""Beginning of the name by which caches know a served teacher."""

Key = tuple[tuple[int, ...], int]
"""Tokens of a window, and how many are to be listed."""


class ListServer:
    """Lists of windows from one server.

    Args:
        client: requests to it.
        server: what it is.
        rows: tokens of the vocabulary map; listed ones beyond are left to the tail.
    """

    def __init__(self, client: ServerClient, server: Server, rows: int) -> None:
        self.client = client
        self.server = server
        self.rows = rows
        self._begun: OrderedDict[Key, Future[Lists]] = OrderedDict()

    def identity(self) -> dict[str, Any]:
        """Return what makes the teacher the one it is: the model that the server has loaded."""
        return {"served": self.server.source}

    def begin(self, windows: Sequence[Sequence[int]], top_k: int) -> None:
        """Send the requests for some windows, unless they are under way; returns at once."""
        for window in windows:
            self._begin(self._key(window, top_k))

        # What nobody has come for is of an old order of the windows; whoever still does has it asked for again.
        size = sum(len(ids) * k * BYTES_PER_TOKEN for ids, k in self._begun)
        while size > MOST_BYTES_AHEAD and len(self._begun) > 1:
            (ids, k), answer = self._begun.popitem(last=False)
            answer.cancel()
            size -= len(ids) * k * BYTES_PER_TOKEN

    def lists(self, windows: Sequence[Sequence[int]], top_k: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return ids, log-probabilities and those of the real tokens, for each window.

        Raises:
            TeacherGone: the server was away for too long.
            UserError: it refuses a request.
            RunError: its answers are of no use.
        """
        keys = [self._key(window, top_k) for window in windows]
        answers = {key: self._begin(key) for key in keys}
        read = {key: self.client.wait(answer) for key, answer in answers.items()}
        for key in answers:
            self._begun.pop(key, None)
        return [read[key][:3] for key in keys]

    def _key(self, window: Sequence[int], top_k: int) -> Key:
        """Return the key of a window, in whole numbers that JSON can write."""
        return tuple(map(int, window)), listed_tokens(self.client.settings, top_k, self.rows)

    def _begin(self, key: Key) -> "Future[Lists]":
        """Return the answer to come of a window, for which a request is sent unless one is under way."""
        if key not in self._begun:
            ids, top_k = key
            url, body = self.server.protocol.request(ids, top_k)
            self._begun[key] = self.client.begin(url, body, lambda answer: self._read(answer, ids, top_k))
        return self._begun[key]

    def _read(self, answer: Any, ids: Sequence[int], top_k: int) -> Lists:
        """Return the lists of an answer, in which tokens beyond the vocabulary are empty places."""
        lists = self.server.protocol.read(answer, ids, top_k)
        is_unknown = lists.ids >= self.rows
        if not is_unknown.any():
            return lists

        mass = np.where(is_unknown, np.exp(lists.log_probs), 0).sum(1).max()
        if mass > LARGEST_UNKNOWN:
            token = int(lists.ids[is_unknown][0])
            raise BadAnswer(
                f"tokens such as {token:,}, of which the tokenizer has {self.rows:,}, with a probability of "
                f"{mass:.2f}: is --teacher-tokenizer that of the server's model?"
            )
        return lists._replace(
            ids=np.where(is_unknown, -1, lists.ids),
            log_probs=np.where(is_unknown, -np.inf, lists.log_probs).astype(np.float32),
        )


def listed_tokens(settings: ServedConfig, top_k: int, rows: int) -> int:
    """Return how many tokens a server is asked to list where so many are kept; for one alone no more than that."""
    if top_k == 1 or settings.listed is None:
        return min(top_k, rows)
    return min(max(top_k, settings.listed), rows)


def connect(config: RunConfig, demand: Demand, rows: int, check: Callable[[], None]) -> ListServer:
    """Return the lists of the server that a run names as its teacher, once it was checked.

    Args:
        demand: what the run will ask of it.
        rows: tokens of the vocabulary map.
        check: called while answers are waited for; it raises where the run is to end.

    Raises:
        UserError: there is no server, or one that this run has no use for.
    """
    client = _client(config, check)
    server = recognise(client, config.teacher.model)
    check_server(client, server, demand)
    context = "" if server.context is None else f", up to {server.context:,} tokens"
    log.info(
        "teacher %s: %s with the model %s%s; %d requests at a time",
        client.address,
        server.protocol.name,
        server.model,
        context,
        config.served.requests,
    )
    return ListServer(client, server, rows)


def served_name(config: RunConfig) -> str:
    """Return the name by which a cache knows a run's served teacher: what the server says that it has loaded.

    Raises:
        UserError: the server does not answer, or has no such model.
    """
    client = _client(config, lambda: None)
    try:
        return f"{SERVED}{recognise(client, config.teacher.model).source}"
    finally:
        client.close()


def _client(config: RunConfig, check: Callable[[], None]) -> ServerClient:
    return ServerClient(config.teacher.name, config.served, check)
