"""A server of a tiny model, and a client that waits briefly."""

import pytest

from tests.models.tiny import byte_bpe, pair_of
from tests.served import PretendedServer, running
from utils.config.settings import ServedConfig
from utils.served import http_client

KEY = "sk-very-secret-1234"


@pytest.fixture(scope="session")
def pair():
    """A pair whose teacher is sure enough of something to list it."""
    made = pair_of(byte_bpe(300), byte_bpe(400))
    made.teacher.get_output_embeddings().weight.data *= 2
    return made


@pytest.fixture
def served(pair):
    """A vLLM-like server of that teacher."""
    with running(PretendedServer(pair.teacher, byte_bpe(400))) as server:
        yield server


@pytest.fixture
def clients(monkeypatch):
    """Make clients, which are closed at the end."""
    monkeypatch.setattr(http_client, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(http_client, "POLL_SECONDS", 0.01)
    made = []

    def make(address: str, check=lambda: None, **settings):
        client = http_client.ServerClient(address, ServedConfig(**settings), check)
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()
