"""Evaluation is token-weighted, indifferent to batching and padding, and leaves the model untouched."""

import logging
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.text.text_start import start_candidates
from utils.errors import UserError
from utils.evaluation import scores
from utils.evaluation.samples import generate_samples
from utils.evaluation.scores import (
    IGNORE,
    compare,
    describe_model,
    evaluate,
    float32_evaluation,
    gap_closed,
    metrics,
    retention,
    token_nll,
)
from utils.machine import device_memory

CPU = torch.device("cpu")
VOCABULARY = 61


def tiny(kind: str, dtype: torch.dtype = torch.float32, tied: bool = True):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0}

    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **sizes))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                **sizes,
            )
        )

    model.register_buffer("half_buffer", torch.randn(5).to(dtype))
    return model.to(dtype)


def uneven_batches(rows: int = 7, width: int = 12) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(3):
        ids = torch.randint(0, VOCABULARY, (rows, width), generator=generator)
        lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
        mask = (torch.arange(width) < lengths).long()
        labels = torch.roll(ids, -1, 1).masked_fill(torch.arange(width) >= lengths - 1, IGNORE)
        batches.append(({"input_ids": ids, "attention_mask": mask}, labels))
    return batches


def plain_nll(model, batches) -> tuple[float, int]:
    """Reference: window by window without padding, token by token, float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, labels in batches:
            ids, lengths = inputs["input_ids"], inputs["attention_mask"].sum(1).tolist()
            for row, length in enumerate(lengths):
                log_probs = model(input_ids=ids[row : row + 1, :length]).logits[0].double().log_softmax(-1)
                for j in range(length):
                    if labels[row, j] != IGNORE:
                        total, count = total - log_probs[j, labels[row, j]].item(), count + 1
    return total, count


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_nll_is_a_sum_over_tokens_whatever_the_padding_and_the_chunks(kind, monkeypatch):
    model, batches = tiny(kind).eval(), uneven_batches()
    expected = plain_nll(model, batches)
    for elements in (2**24, 3 * VOCABULARY, 1):
        monkeypatch.setattr(device_memory, "SCORED_LOGITS", elements)
        nll, tokens = token_nll(model, batches, CPU)
        assert tokens == expected[1] and nll == pytest.approx(expected[0], rel=1e-6)


def test_logits_in_one_go_are_bounded(monkeypatch):
    seen = []
    model = tiny("llama")
    monkeypatch.setattr(device_memory, "SCORED_LOGITS", 3 * 12 * VOCABULARY)
    model.register_forward_hook(lambda module, args, kwargs, out: seen.append(out.logits.numel()), with_kwargs=True)
    token_nll(model, uneven_batches(), CPU)
    assert max(seen) == 3 * 12 * VOCABULARY and len(seen) == 9


def test_a_gpu_is_given_more_windows_at_a_time():
    """One window of 512 tokens and SmolLM2's vocabulary does not keep it busy."""
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=49_152))
    assert scores._rows_at_once(model, 512, CPU) == 1
    assert scores._rows_at_once(model, 512, torch.device("cuda:0")) == 5
    assert scores._rows_at_once(model, 2**20, torch.device("cuda:0")) == 1


def test_uneven_batches_are_weighted_by_tokens_not_by_batches():
    """By hand: a model that gives every token p = 1/4 in one batch of 1 token and 1/64 in one of 9."""

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(()))
            self.config = SimpleNamespace(vocab_size=64)

        def forward(self, input_ids, use_cache):
            wide = (input_ids == 1).unsqueeze(-1)
            narrow = torch.where(torch.arange(64) < 4, 0.0, -1e9)
            return SimpleNamespace(logits=torch.where(wide, torch.zeros(64), narrow) + self.anchor)

    def batch(kind, size):
        ids = torch.full((1, size), kind)
        return {"input_ids": ids}, torch.zeros_like(ids), size

    result = evaluate(Fixed(), [batch(0, 1), batch(1, 9)], CPU)
    assert result["perplexity"] == pytest.approx(math.exp((math.log(4) + 9 * math.log(64)) / 10))
    assert result["bits_per_byte"] == pytest.approx((2 + 9 * 6) / 10) and (result["tokens"], result["bytes"]) == (
        10,
        10,
    )


def test_a_fresh_model_has_a_perplexity_near_the_vocabulary_size():
    result = evaluate(tiny("llama"), [(*batch, 10) for batch in uneven_batches()], CPU)
    assert result["perplexity"] == pytest.approx(VOCABULARY, rel=0.1)


def test_masked_batches_count_nothing_and_an_empty_text_is_the_users_to_fix():
    model = tiny("gpt2")
    ids = torch.zeros(2, 4, dtype=torch.long)
    nothing = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.full_like(ids, IGNORE))
    assert token_nll(model, [nothing], CPU) == (0.0, 0)
    with pytest.raises(UserError, match="--eval-data"):
        metrics(0.0, 0, 0)
    assert metrics(8.0, 4, 2) == {
        "loss": 2.0,
        "perplexity": pytest.approx(math.e**2),
        "bits_per_byte": pytest.approx(4 / math.log(2)),
        "tokens": 4,
        "bytes": 2,
    }


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_float32_evaluation_restores_everything_bit_for_bit(kind, dtype, fails):
    model = tiny(kind, dtype).train()
    model.get_submodule("transformer.h.0" if kind == "gpt2" else "model.layers.0").eval()  # its own flag
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    bits = {name: tensor.detach().clone() for name, tensor in {**parameters, **buffers}.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in parameters.items()}
    flags = [module.training for module in model.modules()]

    class Stop(Exception):
        pass

    try:
        with float32_evaluation(model):
            assert {p.dtype for p in model.parameters()} == {torch.float32} and model.half_buffer.dtype == torch.float32
            assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
            assert not model.training and not torch.is_grad_enabled()
            with torch.autocast("cpu", dtype=torch.bfloat16), float32_evaluation(model):
                assert model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.dtype == torch.float32
            if fails:
                raise Stop
    except Stop:
        assert fails

    assert all(after is parameters[name] for name, after in model.named_parameters())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        assert tensor.dtype == bits[name].dtype and torch.equal(tensor, bits[name])
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert [module.training for module in model.modules()] == flags and torch.is_grad_enabled()
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in parameters.values()}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_training_goes_on_as_if_there_had_been_no_evaluation(kind, dtype):
    def trained(evaluated: bool) -> list[torch.Tensor]:
        model = tiny(kind, dtype).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
        batches = uneven_batches()
        for inputs, labels in batches:
            if evaluated:
                evaluate(model, [(*batch, 9) for batch in batches], CPU)
            torch.manual_seed(3)  # dropout
            logits = model(**inputs).logits.float()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


def test_a_half_precision_student_is_scored_like_its_float32_copy():
    half, batches = tiny("llama", torch.float16, tied=False), uneven_batches()
    full = tiny("llama", torch.float16, tied=False).float()
    result = evaluate(half, [(*batch, 5) for batch in batches], CPU)
    assert result["loss"] * result["tokens"] == pytest.approx(token_nll(full, batches, CPU)[0], rel=1e-9)
    assert half.lm_head.weight.dtype == torch.float16


def test_a_model_in_float32_is_not_copied():
    model = tiny("llama")
    before = [p.data_ptr() for p in model.parameters()]
    with float32_evaluation(model):
        assert [p.data_ptr() for p in model.parameters()] == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_teacher_copy_when_float32_is_off(dtype):
    model = tiny("llama", getattr(torch, dtype))
    seen = []
    model.register_forward_hook(lambda module, args, kwargs, out: seen.append(out.logits.dtype), with_kwargs=True)
    evaluate(model, [(*batch, 5) for batch in uneven_batches()], CPU, float32=False)
    assert set(seen) == {getattr(torch, dtype)}
    assert describe_model(model) == {"parameters": sum(p.numel() for p in model.parameters()), "dtype": dtype}


class TwoProcesses:
    """Stands for an accelerator in which the other process has the same numbers."""

    num_processes, device = 2, CPU

    def reduce(self, tensor, how):
        assert how == "sum" and tensor.dtype == torch.float64
        return 2 * tensor


def test_sums_are_taken_over_all_processes():
    model, batches = tiny("llama"), uneven_batches()
    nll, tokens = token_nll(model, batches, CPU)
    assert token_nll(model, batches, CPU, TwoProcesses()) == (pytest.approx(2 * nll), 2 * tokens)
    both = evaluate(model, [(*batch, 5) for batch in batches], CPU, TwoProcesses())
    assert both["bytes"] == 30 and both["loss"] == pytest.approx(nll / tokens)
    result = compare(lambda batch: batch, [{"agree": 3, "kl_sum": 2.0, "count": 4}], TwoProcesses())
    assert result == {"top1_agreement": 0.75, "kl_nats_per_token": 0.5}


def test_retention_arithmetic():
    agreement = compare(lambda b: b, [{"agree": 1, "kl_sum": 0.5, "count": 1}, {"agree": 0, "kl_sum": 4.0, "count": 8}])
    assert agreement == {"top1_agreement": pytest.approx(1 / 9), "kl_nats_per_token": 0.5}
    kept = retention({"bits_per_byte": 1.2}, {"bits_per_byte": 1.0}, {"bits_per_byte": 2.0}, agreement)
    assert kept["bits_per_byte_ratio"] == pytest.approx(1.2) and kept["gap_closed"] == pytest.approx(0.8)
    assert gap_closed(0.9, 1.0, 1.0) is None and gap_closed(0.9, 1.0, 1.1) is None
    assert compare(lambda b: b, []) == {"top1_agreement": None, "kl_nats_per_token": None}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 1]
    inner = Tokenizer(models.BPE(vocab={"<end>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<end>", eos_token="<end>")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_samples_are_greedy_silent_and_end_with_the_context(kind, dtype, tokenizer, caplog):
    from transformers.utils import logging as transformers_logging

    model = tiny(kind, dtype).train()
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.3  # must not matter
    own = model.generation_config
    prompts = [[0, *tokenizer("ABC")["input_ids"]], [0] * 60, [0] * 64]
    transformers_logging.enable_propagation()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        first, again = (generate_samples(model, tokenizer, prompts, 16) for _ in range(2))
    assert caplog.records == [] and first == again and len(first) == 3 and first[2] == ""
    assert model.training and model.generation_config is own and next(model.parameters()).dtype == dtype

    ids = torch.tensor([prompts[0]])
    with float32_evaluation(model):
        for _ in range(16):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
            if ids[0, -1] == 0:
                break
    assert first[0] == tokenizer.decode(ids[0, len(prompts[0]) :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["stories260k-llama", "tinystories-neo-chat-3m"])
def test_real_models_continue_a_story(name, real_models_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real_models_dir / "models" / name
    model, real = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = [start_candidates(real)[0], *real("Once upon a time", add_special_tokens=False)["input_ids"]]
    assert generate_samples(model, real, [prompt], 12)[0].startswith(", there was a little girl named Lily")
