"""ServerClient: requests to one server, a few at a time, from a thread of its own.

What may pass by itself is tried again: a server that restarts, answers 500 or 429, or whose answer was cut. What cannot
(a request that is refused) ends at once. The key is in the requests alone: it is taken out of every message.
"""

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, urlsplit

import httpx

from ..config.settings import ServedConfig
from ..errors import RunError, TeacherGone, UserError, shorten

log = logging.getLogger(__name__)

KEY = re.compile(r"[A-Za-z0-9._~+/=:@-]*")
"""What a key consists of (the b64token of RFC 6750, and two signs more)."""

T = TypeVar("T")

CONNECT_SECONDS = 10.0
"""Time for a connection; a server on the same network needs milliseconds."""
FIRST_DELAY = 0.5
"""Seconds before a request is sent a second time; each time after it, twice as many."""
LONGEST_DELAY = 15.0
"""Seconds between two tries, at most."""
LOOKS = 3
"""Tries of a request about the server itself, before a run begins."""
MOST_TRIES = 6
"""Tries of a request to which the server answers, but with an error of its own or with something else."""
POLL_SECONDS = 0.2
"""Seconds between two looks at whether the run is to end while an answer is waited for."""
LONGEST_QUOTE = 300
"""Characters of an answer that a message quotes."""
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
"""Statuses of answers that may be others a moment later."""


class BadAnswer(Exception):
    """An answer that is not what was asked for; the message says what is wrong with it."""


class Reply(NamedTuple):
    """An answer of any status."""

    status: int
    content: Any
    """Parsed JSON, or text where it is none."""


class ServerClient:
    """One server, by its address.

    Args:
        address: http://HOST:PORT/v1; /v1 is added where it is not there.
        settings: requests at a time, timeouts, patience, and the variable that holds the key.
        check: called while an answer is waited for; it raises where the run is to end.

    Raises:
        UserError: the address is none, or has a password in it.
    """

    def __init__(self, address: str, settings: ServedConfig, check: Callable[[], None]) -> None:
        self.address = check_address(address)
        self.settings = settings
        self._check = check
        self._key = key_in(settings.key_variable)
        # Of the server as a whole, not of one request.
        self._outage_began: float | None = None

        # A thread that nobody waits for: a run that ends does not wait for answers that are under way.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="teacher requests", daemon=True).start()
        self._slots = asyncio.Semaphore(settings.requests)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(settings.timeout, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=settings.requests),
        )

    @property
    def root(self) -> str:
        """Return the address without /v1, below which servers have what is their own."""
        return self.address.removesuffix("/v1")

    def close(self) -> None:
        """Close connections and end the thread; answers that are under way are lost."""
        closing = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        try:
            closing.result(CONNECT_SECONDS)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)

    async def _end(self) -> None:
        """Call off what is under way, of which asyncio would complain at the end of the program, and disconnect."""
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._http.aclose()

    # --- one request, tried a few times ------------------------------------------------------------------------------

    def look(self, url: str, body: dict[str, Any] | None = None) -> Reply:
        """Return the reply to a GET, or to a POST with a body, whatever its status.

        Raises:
            UserError: there is no answer.
        """
        try:
            return self.wait(asyncio.run_coroutine_threadsafe(self._look(url, body), self._loop))
        except httpx.HTTPError as error:
            reason = self.clean(error)
            raise UserError(
                f"teacher {self.address}: no answer ({reason}). Expected a running server: start it, or put the "
                "address right."
            ) from None

    async def _look(self, url: str, body: dict[str, Any] | None) -> Reply:
        method = "GET" if body is None else "POST"
        response = None
        for last in range(1, LOOKS + 1):
            # A connection that the server has just closed says nothing of the server, and what is transient passes.
            try:
                response = await self._http.request(method, url, json=body)
                if response.status_code not in TRANSIENT:
                    break
            except httpx.RequestError:
                if last == LOOKS:
                    raise
            if last < LOOKS:
                await asyncio.sleep(FIRST_DELAY)

        assert response is not None
        try:
            return Reply(response.status_code, response.json())
        except ValueError:
            return Reply(response.status_code, response.text)

    # --- one request, until it is answered --------------------------------------------------------------------------

    def begin(self, url: str, body: dict[str, Any], read: Callable[[Any], T]) -> "Future[T]":
        """Send a POST, now or as soon as fewer are under way; return its answer to come, as `read` understands it.

        Args:
            read: content of an answer -> its value; raises `BadAnswer` for another one than was asked for.
        """
        return asyncio.run_coroutine_threadsafe(self._answer(url, body, read), self._loop)

    def wait(self, answer: "Future[T]") -> T:
        """Return an answer as soon as it is there.

        Raises:
            TeacherGone: the server was away for longer than `patience`.
            UserError: the request was refused.
            RunError: every answer was an error, or something else than was asked for.
        """
        while True:
            try:
                return answer.result(POLL_SECONDS)
            except NotYet:
                # An answer may itself have failed for lack of time.
                if answer.done():
                    raise
            self._check()

    async def _answer(self, url: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """Send a request until it is answered."""
        failures = 0
        bad_answers = 0
        while True:
            # A slot is free again while this request waits for its next turn.
            try:
                async with self._slots:
                    response = await self._http.post(url, json=body)
                self._end_outage()
                return read(self._content(response))

            except httpx.RequestError as error:
                self._note_outage(self.clean(error))
            except BadAnswer as error:
                bad_answers += 1
                self._note_bad_answer(self.clean(error), bad_answers)

            # Longer each time: a server that starts anew is not helped by questions.
            await asyncio.sleep(min(FIRST_DELAY * 2**failures, LONGEST_DELAY))
            failures += 1

    def _content(self, response: httpx.Response) -> Any:
        """Return the JSON of an answer.

        Raises:
            BadAnswer: an error that may pass, or no JSON.
            UserError: the request was refused.
        """
        if response.status_code in TRANSIENT:
            raise BadAnswer(f"status {response.status_code}: {self._quoted(response.text)}")
        if response.status_code != httpx.codes.OK:
            raise UserError(self.refusal(Reply(response.status_code, response.text)))
        try:
            return response.json()
        except ValueError:
            raise BadAnswer(f"an answer of {len(response.content):,} bytes is no JSON, or was cut") from None

    # --- messages ---------------------------------------------------------------------------------------------------

    def refusal(self, reply: Reply) -> str:
        """Return the message for a request that was refused."""
        words = self._quoted(str(reply.content))
        if reply.status in (401, 403):
            name = self.settings.key_variable
            state = "which is set, but was not accepted" if self._key else "which is not set"
            return (
                f"teacher {self.address}: the server wants a key (status {reply.status}). Expected it in the "
                f"environment variable {name}, {state}."
            )
        if reply.status in TRANSIENT:
            return (
                f"teacher {self.address}: the server fails (status {reply.status}): {words}. Expected an answer: "
                "its own log says why there is none; the same command goes on once it answers."
            )
        return f"teacher {self.address}: the server refuses the request (status {reply.status}): {words}"

    def _quoted(self, text: str) -> str:
        """Return the beginning of an answer in one line, without the key."""
        return shorten(self.clean(" ".join(text.split())), LONGEST_QUOTE)

    def clean(self, cause: Any) -> str:
        """Return an error or a text without the key, which a server may have sent back."""
        words = str(cause)
        if isinstance(cause, httpx.HTTPError):
            words = f"{type(cause).__name__}: {cause}" if words else type(cause).__name__
        if not self._key:
            return words
        # Some servers write a slash of JSON in this way; `key_in` admits nothing else that is ever escaped.
        return words.replace(self._key, "***").replace(self._key.replace("/", "\\/"), "***")

    # --- what is wrong with the server -------------------------------------------------------------------------------

    def _note_bad_answer(self, reason: str, number: int) -> None:
        """Log an answer of no use, from the second one of a request on.

        Raises:
            RunError: it is the last that is waited for.
        """
        if number >= MOST_TRIES:
            raise RunError(
                f"teacher {self.address}: {number} answers in a row were of no use: look into its log; the same "
                f"command continues. The last one: {reason}"
            ) from None
        log.log(logging.DEBUG if number == 1 else logging.WARNING, "teacher %s: %s", self.address, reason)

    def _note_outage(self, reason: str) -> None:
        """Log the begin of an outage.

        Raises:
            TeacherGone: it lasts longer than `patience`.
        """
        patience = self.settings.patience
        now = time.monotonic()
        if self._outage_began is None:
            self._outage_began = now
            log.warning(
                "teacher %s does not answer (%s): waiting for it, for up to %.0f s", self.address, reason, patience
            )

        if now - self._outage_began > patience:
            raise TeacherGone(
                f"teacher {self.address} has not answered for {patience:.0f} s ({reason}). What was computed is kept. "
                "Start the server again: the same command continues."
            ) from None

    def _end_outage(self) -> None:
        """Log the end of an outage, if there was one."""
        if self._outage_began is not None:
            log.warning("teacher %s answers again, after %.0f s", self.address, time.monotonic() - self._outage_began)
            self._outage_began = None


def key_in(variable: str) -> str:
    """Return the key in an environment variable; empty: there is none.

    Raises:
        UserError: it has characters that are written in another way in a header, an error or JSON, where it would be
            seen.
    """
    key = os.environ.get(variable, "").strip()
    if not KEY.fullmatch(key):
        raise UserError(
            f"the key in the environment variable {variable}: got one with a space, a line break, a quote or another "
            "character that keys do not have, expected letters, digits and -._~+/=:@ alone. Nothing was sent; set it "
            "again."
        )
    return key


def check_access(name: str, variable: str) -> None:
    """Check what can be known of a server's address and of the key for it before anything is sent.

    Args:
        variable: environment variable with the key.

    Raises:
        UserError: see `check_address` and `key_in`.
    """
    check_address(name)
    key_in(variable)


def check_address(name: str) -> str:
    """Return the address of a server, ending in /v1.

    Raises:
        UserError: it is none, or has a password or a query in it, which would stand in every log.
    """
    parts = urlsplit(name)
    if parts.username or parts.password or parts.query or parts.fragment:
        address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        raise UserError(
            f"teacher {address}: got an address with a user, a password or a query in it, which would stand in the "
            "log. Expected http://HOST:PORT/v1, and the key in an environment variable (served.key_variable)."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(parts):
        raise UserError(f"teacher {name}: got no address of a server, expected http://HOST:PORT/v1")

    address = name.rstrip("/")
    return address if address.endswith("/v1") else f"{address}/v1"


def _has_port(parts: SplitResult) -> bool:
    """Return False where an address has a port that cannot be."""
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False
