"""Weights of few bits through the kernels that bitsandbytes has for the CPU, where a run refuses them."""

import pytest
import torch

from tests.models.tiny import byte_bpe, pair_of, tiny_llama
from utils.config.settings import LoraConfig
from utils.evaluation.scores import describe_model
from utils.pretrained import loading
from utils.pretrained.lora import add_lora
from utils.training.state import learned

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e .[quant]")

TOKENIZERS = byte_bpe(290), byte_bpe(330)


def saved(folder, size: int, seed: int) -> str:
    tiny_llama(size, seed, width=64, spread=0.1, num_hidden_layers=2).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("weights", "dtype"), [("8bit", torch.float16), ("4bit", torch.bfloat16)])
def test_a_teacher_of_few_bits_says_about_the_same(tmp_path, weights, dtype):
    folder = saved(tmp_path, len(TOKENIZERS[1]), seed=2)
    whole = pair_of(*TOKENIZERS, teacher=loading.load_model(folder, "teacher", torch.float32))
    small = loading.load_model(folder, "teacher", dtype, "cpu", weights)
    assert sum(p.dtype in (torch.int8, torch.uint8) for p in small.parameters()) == 2 * 7
    assert describe_model(small)["parameters"] == describe_model(whole.teacher)["parameters"]
    batch = whole.batch()
    expected, found = (p.frozen().signal(batch, 8) for p in (whole, pair_of(*TOKENIZERS, teacher=small)))
    error = (found.realised - expected.realised).abs().mean()
    assert 0 < error < {"8bit": 0.1, "4bit": 0.4}[weights] and expected.realised.mean() < -4


def test_a_student_over_4_bits_learns_and_only_its_adapter_is_kept(tmp_path):
    folder = saved(tmp_path, len(TOKENIZERS[0]), seed=1)
    base = loading.load_model(folder, "student", torch.bfloat16, "cpu", "4bit")
    pair = pair_of(*TOKENIZERS, student=add_lora(base, folder, LoraConfig(enabled=True)))
    framework = pair.framework({"kd": 0.7, "lm": 0.3})
    assert all("lora_" in name for name in learned(framework)) and len(learned(framework)) == 2 * 2 * 7
    optimizer, batch, losses = torch.optim.AdamW(framework.parameter_groups(1e-2, 0.0)), pair.batch(), []
    for _ in range(6):
        losses.append(framework(batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
