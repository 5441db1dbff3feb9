"""Masks without the checks of transformers: the same states and gradients, and nothing left behind."""

import contextlib

import pytest
import torch
from transformers import masking_utils

from models import language_model, mask_checks
from models.language_model import body_states
from models.mask_checks import CAUSAL_CHECK, CHECKS, without_mask_checks
from models.types import Source
from tests.models.test_language_model import PAIRS, build

BODIES = {
    **{name: lambda name=name: build(name) for name in ("Llama", "GPT2", "Gemma2", "Mistral")},
    **PAIRS,
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_states_and_gradients_are_those_of_transformers_own_masks_bit_for_bit(name, padded, monkeypatch):
    model = BODIES[name]()
    ids, source = torch.randint(1, 40, (2, 9)), None
    if model.config.is_encoder_decoder:
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, 5:] = 0
        source = Source(torch.randint(1, 40, (2, 9)), mask if padded else None)

    def states_and_gradients():
        model.zero_grad()
        states = body_states(model, ids, source)
        states.square().sum().backward()
        return [states, *(p.grad for p in model.parameters() if p.grad is not None)]

    ours = states_and_gradients()
    monkeypatch.setattr(language_model, "without_mask_checks", contextlib.nullcontext)
    if source is not None and source.mask is None:
        source.mask = torch.ones_like(ids)
    assert all(map(torch.equal, ours, states_and_gradients()))


def test_the_checks_are_those_of_this_transformers_and_are_put_back_after_an_error():
    originals = [getattr(masking_utils, name) for name in CHECKS]
    with pytest.raises(RuntimeError), without_mask_checks():
        assert not any(getattr(masking_utils, name) in originals for name in CHECKS)
        raise RuntimeError

    assert [getattr(masking_utils, name) for name in CHECKS] == originals


def test_a_check_that_transformers_does_not_have_is_left_out(monkeypatch):
    monkeypatch.delattr(masking_utils, CAUSAL_CHECK)
    with without_mask_checks():
        assert not hasattr(masking_utils, CAUSAL_CHECK)
        assert masking_utils.find_packed_sequence_indices is mask_checks.no_packed_texts
    assert not hasattr(masking_utils, CAUSAL_CHECK)
