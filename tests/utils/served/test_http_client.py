"""A server that stumbles is asked again, one that is gone is waited for, and nobody gets to see the key."""

import gc
import logging
import time

import pytest

from tests.utils.served.conftest import KEY
from utils.config.settings import ServedConfig
from utils.errors import RunError, TeacherGone, UserError
from utils.served.http_client import BadAnswer, ServerClient, check_address
from utils.served.protocols import Vllm

IDS = [5, 9, 300, 21, 7]


def ask(client, top_k: int = 3):
    protocol = Vllm(client, "tiny")
    url, body = protocol.request(IDS, top_k)
    return client.wait(client.begin(url, body, lambda answer: protocol.read(answer, IDS, top_k)))


@pytest.mark.parametrize(
    "fault",
    [(500, "oops"), (503, "loading"), (429, "slow down"), (200, '{"choices": [{"prompt_lo'), (200, '{"choices": []}')],
    ids=["500", "503", "429", "cut", "other"],
)
def test_what_may_pass_is_tried_again(served, clients, fault):
    served.fault = lambda number, body: fault if number < 4 else None
    assert ask(clients(served.address)).ids.shape == (4, 3)
    assert served.scored == 4


def test_a_server_that_never_makes_sense_ends_the_run(served, clients):
    served.fault = lambda number, body: (500, "CUDA out of memory")
    with pytest.raises(
        RunError, match=r"6 answers in a row were of no use: .* The last one: status 500: CUDA out of memory"
    ):
        ask(clients(served.address))


def test_a_request_that_is_refused_is_not_repeated(served, clients):
    served.max_logprobs = 2
    with pytest.raises(UserError, match=r"status 400\).*greater than max allowed: 2"):
        ask(clients(served.address))
    assert served.scored == 1


def test_a_server_that_comes_back_is_waited_for(served, clients, caplog):
    def start_once_it_is_missed():
        if "does not answer (ConnectError" in caplog.text and not served.is_up:
            served.start()

    client = clients(served.address, check=start_once_it_is_missed)
    served.stop()
    with caplog.at_level(logging.WARNING):
        assert ask(client).ids.shape == (4, 3)
    assert "answers again, after" in caplog.text


def test_a_server_that_stays_away_ends_the_run_with_what_to_do(served, clients):
    client = clients(served.address, patience=0.2)
    served.stop()
    with pytest.raises(TeacherGone, match="Start the server again: the same command continues"):
        ask(client)


def test_a_slow_answer_is_asked_for_again_and_counts_as_none(served, clients):
    served.fault = lambda number, body: time.sleep(10) if number == 1 else None
    assert ask(clients(served.address, timeout=1.0)).ids.shape == (4, 3)
    assert served.scored == 2


def test_a_run_that_is_to_end_does_not_wait(served, clients):
    class End(BaseException):
        pass

    def check():
        raise End

    may_answer = served.hold()
    with pytest.raises(End):
        ask(clients(served.address, check=check))
    assert served.answered == 0
    may_answer.set()


def test_what_is_under_way_at_the_end_is_called_off(served, caplog):
    """Without a word of asyncio's about tasks that were destroyed."""
    may_answer = served.hold()
    client = ServerClient(served.address, ServedConfig(requests=1), lambda: None)
    url, body = Vllm(client, "tiny").request(IDS, 3)
    answers = [client.begin(url, body, lambda answer: answer) for _ in range(2)]
    client.close()
    assert all(answer.cancelled() for answer in answers)
    may_answer.set()
    del client
    gc.collect()
    assert not caplog.records


def test_so_many_requests_are_under_way_and_no_more(served, clients):
    client = clients(served.address, requests=3)
    protocol = Vllm(client, "tiny")
    url, body = protocol.request(IDS, 3)
    served.delay = 0.05
    answers = [client.begin(url, body, lambda answer: answer) for _ in range(12)]
    for answer in answers:
        client.wait(answer)
    assert 1 < served.most_at_once <= 3


@pytest.mark.parametrize("status", [400, 401, 500])
def test_the_key_is_in_no_message(served, clients, monkeypatch, caplog, status):
    """Also where the server sends it back."""
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    served.fault = lambda number, body: (status, f"the request with Bearer {KEY} failed")
    with caplog.at_level(logging.DEBUG), pytest.raises((UserError, RunError)) as raised:
        ask(clients(served.address))
    assert KEY not in str(raised.value) and KEY not in caplog.text
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("key", [f"{KEY}\nsecond", f"{KEY}'", f'{KEY}"', f"{KEY}\\", f"{KEY}\u00fc", f"{KEY} x"])
def test_a_key_that_would_be_written_in_another_way_somewhere_is_refused(served, clients, monkeypatch, key):
    monkeypatch.setenv("TEACHER_API_KEY", key)
    with pytest.raises(UserError, match=r"TEACHER_API_KEY: got one with .* Nothing was sent") as raised:
        clients(served.address)
    assert KEY not in str(raised.value)


def test_a_key_with_a_slash_is_in_no_message_however_it_is_escaped(served, clients, monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", "ab/cd")
    served.fault = lambda number, body: (400, "ab/cd and ab\\/cd")
    with pytest.raises(UserError, match=r"\*\*\* and \*\*\*"):
        ask(clients(served.address))


def test_the_key_opens_the_server_and_its_absence_is_told(served, clients, monkeypatch):
    served.key = KEY
    with pytest.raises(UserError, match="environment variable TEACHER_API_KEY, which is not set"):
        ask(clients(served.address))
    monkeypatch.setenv("ANOTHER_KEY", KEY)
    assert ask(clients(served.address, key_variable="ANOTHER_KEY")).ids.shape == (4, 3)


def test_a_connection_that_breaks_says_nothing_of_the_server(served, clients):
    address, get = served.address, served.get
    calls = []

    def breaking(path):
        calls.append(path)
        if len(calls) == 1:
            raise ConnectionAbortedError
        return get(path)

    served.get = breaking
    assert clients(address).look(f"{address}/models").status == 200
    assert len(calls) == 2


def test_what_may_pass_is_looked_at_again_and_told_where_it_stays(served, clients):
    address, get = served.address, served.get
    replies = iter([(503, "loading")] * 4)
    served.get = lambda path: next(replies, None) or get(path)

    client = clients(address)
    reply = client.look(f"{address}/models")
    assert reply.status == 503
    assert "the server fails (status 503)" in client.refusal(reply)
    assert "the same command goes on once it answers" in client.refusal(reply)
    assert client.look(f"{address}/models").status == 200


def test_addresses():
    assert check_address("http://127.0.0.1:8000/v1/") == check_address("http://127.0.0.1:8000")
    for wrong in ("http://", "ftp://host/v1", "http://127.0.0.1:99999/v1", "http://127.0.0.1:port/v1"):
        with pytest.raises(UserError, match="expected http://HOST:PORT/v1"):
            check_address(wrong)
    for leaking in ("http://me:secret@host/v1", "https://host/v1?key=secret"):
        with pytest.raises(UserError) as raised:
            check_address(leaking)
        assert "secret" not in str(raised.value)


def test_an_unreadable_answer_is_one_kind_of_error(served, clients):
    def read(answer):
        raise BadAnswer("something else")

    client = clients(served.address)
    url, body = Vllm(client, "tiny").request(IDS, 3)
    with pytest.raises(RunError, match="something else"):
        client.wait(client.begin(url, body, read))
