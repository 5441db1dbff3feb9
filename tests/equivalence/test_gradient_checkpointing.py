"""Layers that are computed twice give the same loss and the same gradients, bit for bit, and keep less in between."""

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, GPT2LMHeadModel

from models.config import RouterConfig
from tests.models.tiny import byte_bpe, pair_of, tiny_llama
from utils.config.settings import LoraConfig
from utils.errors import UserError
from utils.pretrained.loading import recompute_layers

TERMS = {"kd": 0.7, "lm": 0.3, "span": 0.2, "feat": 0.3, "rel": 0.1, "attn": 0.2, "layer": 0.1, "contr": 0.1}
TOKENIZERS = byte_bpe(290), byte_bpe(330)


def student(kind: str):
    if kind == "gpt2":
        shape = {"n_embd": 16, "n_layer": 3, "n_head": 2}
        torch.manual_seed(1)
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZERS[0]), **shape, initializer_range=0.3))
    model = tiny_llama(len(TOKENIZERS[0]), seed=1, num_hidden_layers=3, attention_dropout=0.2)
    if kind == "lora":
        pytest.importorskip("peft", reason="peft is not installed: pip install -e .[peft]")
        from utils.pretrained.lora import add_lora

        torch.manual_seed(2)
        return add_lora(model, "some/base", LoraConfig(enabled=True, dropout=0.3))
    return model


def step(model, terms: dict[str, float]) -> tuple[float, list[torch.Tensor], int]:
    """(loss, gradients, bytes kept for the backward pass) of a training step with dropout."""
    teacher = tiny_llama(len(TOKENIZERS[1]), seed=2, num_hidden_layers=2)
    router = RouterConfig(layers=2, teacher_layers=2, heads=2)
    pair = pair_of(*TOKENIZERS, student=model, teacher=teacher, router=router)
    framework, batch, kept = pair.framework(terms), pair.batch(), {}
    framework.train()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no other one gets its address
        return tensor

    torch.manual_seed(7)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = framework(batch).loss
    loss.backward()
    gradients = [p.grad for p in framework.parameters() if p.requires_grad]
    return loss.item(), gradients, sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora"])
@pytest.mark.parametrize("terms", [{"kd": 0.7, "lm": 0.3}, TERMS], ids=["head", "router"])
def test_loss_and_gradients_are_the_same_bit_for_bit(kind, terms):
    plain = student(kind)
    checkpointed = copy.deepcopy(plain)
    recompute_layers(checkpointed)
    (loss, gradients, kept), (again, same, less) = step(plain, terms), step(checkpointed, terms)
    assert loss == again and len(gradients) == len(same) > 0
    for one, other in zip(gradients, same, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert less < 0.6 * kept


def test_a_model_that_cannot_is_refused(monkeypatch):
    model = student("llama")
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="--gradient-checkpointing: not for this student"):
        recompute_layers(model)
