"""A student with a low-rank adapter learns what the same student with the product of its factors would."""

import copy

import pytest
import torch
import transformers
from torch import nn

from models.language_model import check_head
from models.losses.losses import span_loss, span_sums
from tests.models.test_language_model import build
from tests.models.tiny import byte_bpe, pair_of, tiny_llama
from tests.toy import digest
from utils.config.settings import LoraConfig
from utils.pretrained.lora import add_lora, merged

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e .[peft]")

TERMS = {"kd": 0.7, "lm": 0.3, "span": 0.5}


def pair(**settings):
    """A pair whose student has an adapter that already does something, on every linear layer and the head."""
    tokenizers = byte_bpe(290), byte_bpe(330)
    base = tiny_llama(len(tokenizers[0]), seed=1).double()
    modules = [name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=modules, **settings)
    student = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    torch.manual_seed(5)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return pair_of(*tokenizers, student=student, teacher=tiny_llama(len(tokenizers[1]), seed=2).double())


def test_loss_and_gradients_are_those_of_the_merged_weights():
    """W + s B A: its gradient G gives s G A^T for B and s B^T G for A."""
    adapted = pair()
    merged = copy.deepcopy(adapted)
    merged.student = merged.student.merge_and_unload().requires_grad_(True)
    batch = adapted.batch()

    losses = []
    for one in (adapted, merged):
        output = one.framework(TERMS)(batch)
        output.loss.backward()
        losses.append(output.loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)

    gradients = {name: p.grad for name, p in merged.student.named_parameters()}
    inner = adapted.student.get_base_model()
    adapters = [(name, module) for name, module in inner.named_modules() if hasattr(module, "lora_A")]
    assert "lm_head" in dict(adapters) and len(adapters) == 8

    for name, module in adapters:
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        whole = gradients[f"{name}.weight"]
        assert torch.allclose(b.grad, 2 * whole @ a.T, rtol=1e-6, atol=1e-12)
        assert torch.allclose(a.grad, 2 * b.T @ whole, rtol=1e-6, atol=1e-12)

    assert {name for name, p in inner.named_parameters() if p.grad is not None} == {
        f"{name}.lora_{side}.default.weight" for name, _ in adapters for side in "AB"
    }


def test_the_optimizer_gets_the_adapter_alone():
    adapted = pair()
    groups = adapted.framework(TERMS).parameter_groups(1e-3, 0.1)
    names = {id(p): name for name, p in adapted.student.named_parameters()}
    given = {names[id(p)] for group in groups for p in group["params"]}
    assert given == {name for name in names.values() if "lora_" in name}


def test_every_pass_of_a_head_with_dropout_draws_one_mask():
    """The span term needs the labels' log-probabilities before the pass that learns from them."""
    adapted = pair(lora_dropout=0.5)
    adapted.student.train()
    batch, framework = adapted.batch(), adapted.framework({"span": 1.0})
    signal = adapted.frozen().signal(batch, 8)
    torch.manual_seed(3)
    output = framework(batch, signal=signal)
    output.loss.backward()
    parameters = [p for p in adapted.student.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in parameters]

    torch.manual_seed(3)
    model = adapted.student.get_base_model()
    states = model.model(input_ids=batch.student_ids, attention_mask=batch.student_mask).last_hidden_state
    labels = batch.labels.flatten()[batch.supervised]
    logits = model.lm_head(states.flatten(0, 1)[batch.supervised])
    realised = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    spans, held = batch.counts["span"], batch.teacher_mask.flatten().bool()
    student = span_sums(realised, batch.student_spans.flatten()[batch.supervised], spans)
    teacher = span_sums(signal.realised, batch.teacher_spans.flatten()[held], spans)
    options = framework.loss_config
    value = span_loss(
        student, teacher, temperature=options.span_temperature, kind=options.divergence, skew=options.skew
    )
    expected = torch.autograd.grad(value / spans, parameters)
    assert output.loss.item() == pytest.approx(value.item() / spans, rel=1e-6)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-9)


def test_what_is_measured_besides_changes_no_mask():
    losses = []
    for measure in (False, True):
        adapted = pair(lora_dropout=0.5)
        adapted.student.train()
        torch.manual_seed(3)
        losses.append(adapted.framework({"lm": 1.0})(adapted.batch(), measure=measure).loss.item())
    assert losses[0] == losses[1]


FAMILIES = ["Llama", "tied Llama", "GPT2", "GPTNeoX", "Gemma2", "Cohere", "Granite"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_an_adapter_and_merges_it(family):
    student = add_lora(build(family), "some/base", LoraConfig(enabled=True, rank=3)).eval()
    torch.manual_seed(5)
    for parameter in student.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    check_head(student, "student")
    ids = torch.randint(1, 40, (2, 9))
    with torch.no_grad():
        expected, before = student(input_ids=ids).logits, build(family)(input_ids=ids).logits
        found = merged(student, build(family))(input_ids=ids).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert (found - before).abs().max() > 0.1


def test_training_leaves_the_weights_below_the_adapter_bit_for_bit(real_models_dir):
    """A trained model, with a teacher of the same tokenizer; the adapter learns, and merged it computes the same."""
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(real_models_dir / "models" / name)
        for name in ("stories260k-llama", "bitstories-1m")
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_models_dir / "models" / "stories260k-llama")

    base = copy.deepcopy(student)
    torch.manual_seed(0)
    student = add_lora(student, "some/base", LoraConfig(enabled=True, targets=["q_proj", "v_proj", "lm_head"]))
    one = pair_of(tokenizer, tokenizer, student=student, teacher=teacher)
    framework, batch, losses = one.framework({"kd": 0.7, "lm": 0.3}), one.batch(), []
    optimizer = torch.optim.AdamW(framework.parameter_groups(3e-3, 0.0))

    for _ in range(8):
        losses.append(framework(batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]

    with torch.no_grad():
        expected = student.eval()(input_ids=batch.student_ids).logits
        plain = merged(student, copy.deepcopy(base))
        assert torch.allclose(
            plain(input_ids=batch.student_ids).logits, expected, rtol=0, atol=1e-5 * expected.abs().max()
        )

    assert digest(student.unload()) == digest(base)
