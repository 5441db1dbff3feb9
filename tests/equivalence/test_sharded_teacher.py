"""A teacher whose layers are sharded over two processes says bit for bit what a whole one says."""

import copy
import itertools

import numpy as np
import pytest
import torch

from models.teacher import frozen as teacher_module
from tests.gloo import launch
from tests.models.tiny import STORIES, byte_bpe, pair_of, tiny_llama
from utils.parallel.accelerator import build_accelerator
from utils.pretrained import loading
from utils.pretrained.sharded_teacher import shard_layers

LAYERS = (1, 4)


def said(teacher, batch) -> list[np.ndarray]:
    signal = teacher.signal(batch, 8, LAYERS)
    columns = [signal.ids, signal.log_probs, signal.log_tail, signal.log_mass, signal.realised, *signal.hidden]
    return [column.numpy() for column in columns]


def of_two() -> list[dict]:
    return [compared(tied) for tied in (False, True)]


def compared(tied: bool) -> dict:
    """Each process asks about texts of its own, whose logits it cuts into another number of chunks."""
    accelerator = build_accelerator("no", cpu=True)
    rank = accelerator.process_index
    model = tiny_llama(400, 2, num_hidden_layers=4, tie_word_embeddings=tied)
    whole = copy.deepcopy(model)
    pair = pair_of(byte_bpe(300), byte_bpe(400), teacher=whole)
    batch = pair.batch(STORIES[: 1 + rank])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_module, "chunk_rows", lambda *_, **__: ((3, 64)[rank], ""))
        expected = said(pair.frozen(), batch)
        prints = [loading.fingerprint(model)]
        shard_layers(model, accelerator)
        pair.teacher = model
        found = said(pair.frozen(), batch)

    prints.append(loading.fingerprint(model))
    layers = [p for name, p in model.named_parameters() if "layers." in name]
    held = sum(p.to_local().nbytes for p in layers) / sum(p.nbytes for p in layers)

    ids, settings = torch.arange(1, 6)[None], {"do_sample": False, "max_new_tokens": 2 + 5 * rank}
    texts = [m.generate(ids, **settings).tolist() for m in (whole, model)]
    return {"expected": expected, "found": found, "prints": prints, "held": held, "texts": texts}


def test_signals_are_the_same_and_each_process_holds_half_of_the_layers():
    """Also of a teacher whose head is its embedding."""
    for result in itertools.chain(*launch(2, of_two)):
        for found, expected in zip(result["found"], result["expected"], strict=True):
            np.testing.assert_array_equal(found, expected)
        assert result["held"] == 0.5
        assert result["prints"][0] == result["prints"][1]
        assert result["texts"][0] == result["texts"][1]
