"""A server that does not fit the run is refused before anything is asked in earnest, with what to do."""

import pytest

from tests.models.tiny import byte_bpe, permuted, tiny_llama
from tests.served import PretendedServer, running
from utils.errors import UserError
from utils.served.checks import Demand, check_server
from utils.served.protocols import recognise


def check(clients, server: PretendedServer, tokenizer, length: int = 48, top_k: int = 8) -> None:
    client = clients(server.address)
    check_server(client, recognise(client, None), Demand(tokenizer, length, top_k))


@pytest.mark.parametrize("kind", ["vLLM", "SGLang"])
def test_the_right_tokenizer_passes(pair, clients, kind):
    with running(PretendedServer(pair.teacher, byte_bpe(400), kind)) as server:
        check(clients, server, byte_bpe(400))


@pytest.mark.parametrize("kind", ["vLLM", "SGLang"])
def test_another_tokenizer_of_the_same_size_is_refused(pair, clients, kind):
    shuffled = permuted(byte_bpe(400), [0, *range(399, 0, -1)])
    wrong = pytest.raises(UserError, match=r"has another tokenizer: .*Expected its own as --teacher-tokenizer")
    with running(PretendedServer(pair.teacher, byte_bpe(400), kind)) as server, wrong:
        check(clients, server, shuffled)


def test_another_tokenizer_is_told_by_single_tokens_too(pair, clients):
    """A server may tell nothing of how it cuts a text into tokens."""
    shuffled = permuted(byte_bpe(400), [0, *range(399, 0, -1)])
    wrong = pytest.raises(UserError, match=r"\d+ of \d+ tokens are others there: \d+ is ")
    with running(PretendedServer(pair.teacher, byte_bpe(400), "SGLang", tokenizes=False)) as server, wrong:
        check(clients, server, shuffled)


@pytest.mark.parametrize("kind", ["vLLM", "SGLang"])
def test_a_tokenizer_with_more_tokens_than_the_server_is_refused_and_the_server_goes_on(clients, kind):
    wrong = pytest.raises(UserError, match=r"out.of.vocabulary.*Expected the tokenizer of the server's model")
    with running(PretendedServer(tiny_llama(300), byte_bpe(300), kind, tokenizes=False)) as server:
        with wrong:
            check(clients, server, byte_bpe(400))
        check(clients, server, byte_bpe(300))


def test_windows_are_as_long_as_sglang_takes_them_and_no_longer(pair, clients):
    """It takes a few tokens fewer than the context that its list of models tells."""
    with running(PretendedServer(pair.teacher, byte_bpe(400), "SGLang", context=64)) as server:
        with pytest.raises(UserError, match=r"reads 58 tokens at most.*Give --max-length 57"):
            check(clients, server, byte_bpe(400), length=58)
        check(clients, server, byte_bpe(400), length=57)

        client = clients(server.address)
        url, body = recognise(client, None).protocol.request([5] * 58, 3)
        assert client.look(url, body).status == 400


def test_windows_and_lists_that_are_too_long_are_refused(pair, clients):
    with running(PretendedServer(pair.teacher, byte_bpe(400), context=64, max_logprobs=20)) as server:
        with pytest.raises(UserError, match=r"reads 64 tokens at most.*Give --max-length 63"):
            check(clients, server, byte_bpe(400), length=64)
        with pytest.raises(UserError, match="Start it with --max-logprobs 64 or more"):
            check(clients, server, byte_bpe(400), length=63, top_k=64)
        check(clients, server, byte_bpe(400), length=63, top_k=20)


def test_a_server_that_answers_otherwise_is_refused(served, clients):
    for text in ('{"choices": []}', '{"choices": [{"text": "", "prompt_logprobs": null}]}'):
        served.fault = lambda number, body, text=text: (200, text)
        with pytest.raises(UserError, match="Expected a vLLM or SGLang server"):
            check(clients, served, byte_bpe(400))
