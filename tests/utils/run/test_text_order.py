"""Scores of windows by which the training text is put in order."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.models.tiny import STORIES, byte_bpe, pair_of
from utils.evaluation.scores import token_nll
from utils.run.text_order import _ask, _share


def test_processes_share_all_windows_evenly():
    shares = [_share(10, rank, 4) for rank in range(4)]
    assert {len(share) for share in shares} == {3}
    assert set().union(*shares) == set(range(10))


def test_scores_are_the_teachers_loss_on_each_window_by_itself():
    """Not on its batch: padding and neighbours change nothing."""
    pair = pair_of(byte_bpe(300), byte_bpe(400), max_length=24)
    windows, teacher = pair.encoder.windows(STORIES), pair.frozen()
    job = SimpleNamespace(
        windows=windows,
        collate=pair.collator(),
        config=SimpleNamespace(training=SimpleNamespace(batch_size=3)),
        accelerator=SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu")),
        parts=(),
        cache=None,
    )
    session = SimpleNamespace(progress=SimpleNamespace(over=lambda *_: nullcontext(lambda count: None)))
    scores = _ask(job, teacher, session)

    assert len(scores) == len(windows) > 3
    for score, window in zip(scores, windows, strict=True):
        batch = job.collate([window])
        nats, _ = token_nll(teacher.model, [batch.scored("teacher")], torch.device("cpu"))
        assert score == pytest.approx(nats / int(batch.bytes) / math.log(2), rel=1e-4)
