"""A served teacher says what the same model says in this process, and works while the student does."""

import time

import numpy as np
import pytest
import torch

from models.teacher.listed import ListedTeacher
from tests.models.tiny import STORIES, byte_bpe, gradients
from tests.served import PretendedServer, running
from utils.errors import RunError
from utils.served.protocols import recognise
from utils.served.teacher import ListServer

PATIENCE = 60


def teacher_of(pair, client) -> ListedTeacher:
    source = ListServer(client, recognise(client, None), rows=400)
    return ListedTeacher(source, pair.vocabulary)


@pytest.mark.parametrize("kind", ["vLLM", "SGLang"])
def test_losses_and_gradients_are_those_of_the_model_in_this_process(pair, clients, kind):
    """With lists of the whole vocabulary: on rows at every depth."""
    batch = pair.batch()
    module = pair.framework({"kd": 0.6, "lm": 0.3, "span": 0.1}, top_k=400)
    module.zero_grad()
    local = module(batch)
    local.loss.backward()
    expected = [gradient.clone() for gradient in gradients(module)]
    module.zero_grad()

    with running(PretendedServer(pair.teacher, byte_bpe(400), kind)) as server:
        signal = teacher_of(pair, clients(server.address)).signal(batch, 400)
    served = module(batch, signal=signal)
    served.loss.backward()

    for name, term in local.terms.items():
        assert served.terms[name].sum.item() == pytest.approx(term.sum.item(), rel=2e-5)
    for ours, theirs in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-6)
    assert served.terms["kd"].unlisted == local.terms["kd"].unlisted == 0


def test_short_lists_are_those_of_the_model_at_depth_0(pair, served, clients):
    batch = pair.batch()
    signal, local = teacher_of(pair, clients(served.address)).signal(batch, 8), pair.frozen().signal(batch, 8)
    shallow = batch.depth == 0
    assert torch.equal(signal.ids[shallow], local.ids[shallow])
    for field in ("log_probs", "log_tail", "log_mass"):
        ours, theirs = getattr(signal, field)[shallow], getattr(local, field)[shallow]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert batch.teacher_nll(signal) == pytest.approx(batch.teacher_nll(local), rel=1e-5)

    # Deeper rows of which too little is listed are left to LM, and counted.
    term = pair.framework({"kd": 1.0, "lm": 1.0}, top_k=8)(batch, signal=signal).terms["kd"]
    assert 0 < term.unlisted <= term.skipped <= term.count


def test_longer_lists_than_are_kept_leave_fewer_rows_out(pair, served, clients):
    batch = pair.batch()
    signals = [
        teacher_of(pair, clients(served.address, listed=listed)).signal(batch, 8) for listed in (None, 4, 64, 10_000)
    ]
    lost = [int(signal.log_mass.isneginf().sum()) for signal in signals]
    assert lost[0] == lost[1] > lost[2] > lost[3] == 0
    assert all(signal.ids.shape == signals[0].ids.shape for signal in signals)
    shallow = batch.depth == 0
    assert all(torch.equal(signal.ids[shallow], signals[0].ids[shallow]) for signal in signals)


def test_each_window_is_asked_for_once_however_it_is_asked(pair, served, clients):
    teacher, batch = teacher_of(pair, clients(served.address)), pair.batch()
    windows = len(batch.teacher_ids)
    teacher.begin(batch, 8)
    teacher.begin(batch, 8)
    first = teacher.signal(batch, 8)
    assert served.scored == windows

    # What was taken is forgotten: a run of weeks does not fill the memory.
    second = teacher.signal(batch, 8)
    assert served.scored == 2 * windows
    assert torch.equal(first.log_probs, second.log_probs)


def test_answers_that_nobody_fetches_are_dropped(pair, served, clients, monkeypatch):
    """And asked for again by whoever comes for them after all."""
    teacher, batch = teacher_of(pair, clients(served.address)), pair.batch()
    expected = teacher.signal(batch, 8)
    monkeypatch.setattr("utils.served.teacher.MOST_BYTES_AHEAD", 1.0)
    for _ in range(3):
        teacher.begin(batch, 8)
    assert torch.equal(teacher.signal(batch, 8).log_probs, expected.log_probs)


def test_asked_ahead_it_works_while_the_student_does(pair, clients):
    """No answer is waited for when it is asked for, and what has come needs no server any more."""
    batches = [pair.collator()([window]) for window in pair.encoder.windows(STORIES)]
    with running(PretendedServer(pair.teacher, byte_bpe(400))) as server:
        may_answer = server.hold()
        teacher = teacher_of(pair, clients(server.address, patience=0.2))
        for batch in batches:
            teacher.begin(batch, 8)
        assert server.answered == 0

        may_answer.set()
        limit = time.monotonic() + PATIENCE
        while server.answered < len(batches):
            assert time.monotonic() < limit, "nothing is asked before somebody waits for it"
            time.sleep(0.01)
    early = [teacher.signal(batch, 8) for batch in batches]

    with running(PretendedServer(pair.teacher, byte_bpe(400))) as server:
        teacher = teacher_of(pair, clients(server.address))
        late = [teacher.signal(batch, 8) for batch in batches]
    assert len(early) > 1
    for ours, theirs in zip(early, late, strict=True):
        assert torch.equal(ours.log_probs, theirs.log_probs)


def test_tokens_that_the_tokenizer_lacks_are_in_the_tail_where_they_are_rare(pair, served, clients):
    """The head of a model may have rows to spare; a likely token is one of another tokenizer."""
    client = clients(served.address)
    server = recognise(client, None)
    ids = pair.encoder.windows(STORIES)[0]["teacher_ids"][:8]
    [(tokens, log_probs, _)] = ListServer(client, server, rows=400).lists([ids], 400)
    by_token = np.take_along_axis(log_probs, tokens.argsort(1), 1)

    # The last rows that are rare at all of these positions, and those before which are not.
    mass_beyond = np.exp(by_token)[:, ::-1].cumsum(1)[:, ::-1].max(0)
    rare = int(np.argmax(mass_beyond < 0.005))
    [(tokens, log_probs, _)] = ListServer(client, server, rows=rare).lists([ids], 400)
    assert tokens.max() == rare - 1
    assert ((tokens < 0).sum(1) == 400 - rare).all()
    assert (log_probs[tokens < 0] == -np.inf).all()

    with pytest.raises(RunError, match="of which the tokenizer has 200"):
        ListServer(client, server, rows=200).lists([ids], 400)


def test_it_is_the_model_that_the_server_has_loaded(served, clients):
    client = clients(served.address)
    assert ListServer(client, recognise(client, None), 400).identity() == {"served": "/models/tiny"}
