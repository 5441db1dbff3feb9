"""Grouped heads reach attention as they are only where a kernel reads them so; masks have no empty rows."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from models.attention import fill_empty_rows_of_masks, repeat_grouped_heads_where_needed
from models.language_model import body_states
from tests.models.tiny import tiny_llama

CARDS = {"P100": (6, 0), "T4": (7, 5), "A100": (8, 0), "3090": (8, 6), "H100": (9, 0)}


def hands_grouped_heads_on(monkeypatch, capability, dtype, autocast=False, device="cuda", mask=None) -> bool:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode():
        key = torch.empty(2, 5, 16, 64, dtype=dtype, device=device)

    # not torch.autocast, which a build without CUDA refuses
    torch.set_autocast_enabled("cuda", autocast)
    try:
        return sdpa_attention.use_gqa_in_sdpa(mask, key, key)
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("card", CARDS)
def test_half_precision_is_grouped_from_capability_8_on_and_float32_never(monkeypatch, card):
    capability = CARDS[card]
    is_new = capability >= (8, 0)

    for half in (torch.float16, torch.bfloat16):
        assert hands_grouped_heads_on(monkeypatch, capability, half) == is_new
    assert hands_grouped_heads_on(monkeypatch, capability, torch.float32, autocast=True) == is_new
    assert not hands_grouped_heads_on(monkeypatch, capability, torch.float32)


def test_other_devices_and_masks_are_left_to_transformers(monkeypatch):
    assert hands_grouped_heads_on(monkeypatch, (6, 0), torch.float32, device="cpu")
    assert not hands_grouped_heads_on(monkeypatch, (9, 0), torch.float16, mask=torch.ones(1, 1, 16, 16))


@pytest.mark.parametrize(("reads", "expected"), [(False, (4, False)), (True, (2, True))])
def test_what_a_model_with_grouped_heads_gives_to_attention(monkeypatch, reads, expected):
    """Four query heads share two of keys and values."""
    received, attend = set(), F.scaled_dot_product_attention

    def watched(query, key, value, **options):
        received.add((key.shape[1], options.get("enable_gqa", False)))
        return attend(query, key, value, **options)

    model, ids = tiny_llama(300, num_attention_heads=4, num_key_value_heads=2), torch.arange(8)[None]
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr("models.attention.reads_grouped_heads", lambda key: reads)
    body_states(model, ids)
    assert received == {expected}


def test_repeated_heads_give_the_same_states(monkeypatch):
    model, ids = tiny_llama(300, num_attention_heads=4, num_key_value_heads=2), torch.arange(8)[None]
    with torch.no_grad():
        grouped = body_states(model, ids)
        monkeypatch.setattr("models.attention.reads_grouped_heads", lambda key: False)
        repeated = body_states(model, ids)
    torch.testing.assert_close(repeated, grouped)


def test_asking_for_it_twice_changes_nothing():
    before = sdpa_attention.use_gqa_in_sdpa
    repeat_grouped_heads_where_needed()
    assert sdpa_attention.use_gqa_in_sdpa is before


def test_padding_on_the_left_is_no_nan_where_a_kernel_has_nothing_to_attend_to(monkeypatch):
    """Some kernels of GPUs give NaN for such a row, and the next layer spreads it."""
    attend = F.scaled_dot_product_attention

    def like_cudnn(query, key, value, attn_mask=None, **options):
        states = attend(query, key, value, attn_mask=attn_mask, **options)
        return states.masked_fill(~attn_mask.any(-1, keepdim=True), torch.nan)

    model, ids = tiny_llama(300), torch.arange(1, 8)[None]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        monkeypatch.setattr(F, "scaled_dot_product_attention", like_cudnn)
        logits = model(input_ids=padded, attention_mask=mask, position_ids=places).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, 3:], expected)


def test_asking_twice_for_masks_without_empty_rows_changes_nothing():
    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    fill_empty_rows_of_masks()
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is before
