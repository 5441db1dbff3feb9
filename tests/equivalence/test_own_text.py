"""Learning from the student's own text: what its loss is, what it leaves out, and its gradient on average."""

import copy
import itertools

import pytest
import torch

from models.config import CurriculumConfig, Ramp
from models.curriculum import CurriculumScheduler
from models.text.own_text import own_prompt, own_window
from tests.models.tiny import KINDS, STORIES, byte_bpe, from_merges, gradients, metaspace, pair_of, tiny_llama

TOKENIZER = byte_bpe(300)
LETTERS = from_merges(["a", "b"])
"""Two letters and the end of text: a language whose texts can be counted."""


def own_windows(pair, count: int = 3, length: int = 9) -> list[dict]:
    """Windows that a student wrote by chance."""
    generator = torch.Generator().manual_seed(0)
    rows = pair.encoder.tables[0].rows
    windows = []
    for n, window in enumerate(pair.encoder.windows(STORIES)[:count]):
        prompt = own_prompt(pair.encoder, window, 6, n / count)
        sampled = torch.randint(1, rows, (length,), generator=generator).tolist()
        own = own_window(pair.encoder, prompt, [*sampled[: length - n], pair.encoder.end_of_text[0]])
        windows.append(own.window or own_window(pair.encoder, prompt, [pair.encoder.end_of_text[0]]).window)
    return windows


def gradient_of(framework, batch, counts=None) -> tuple[float, list[torch.Tensor]]:
    framework.zero_grad()
    output = framework(batch, step=0, counts=counts)
    output.loss.backward()
    return float(output.loss.detach()), [gradient.clone() for gradient in gradients(framework)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_that_is_its_teacher_learns_nothing_from_its_own_text(kind, temperature):
    model = tiny_llama(len(TOKENIZER)).double()
    pair = pair_of(TOKENIZER, TOKENIZER, student=copy.deepcopy(model), teacher=model)
    framework = pair.framework({"kd": 1.0, "lm": 1.0}, divergence=kind, temperature=temperature, top_k=20)
    batch = pair.collator()(own_windows(pair))
    assert batch.counts["kd"] and not batch.counts["lm"]
    loss, gradient = gradient_of(framework, batch)
    assert abs(loss) < 2e-5 and all(part.abs().max() < 2e-5 for part in gradient)


@pytest.mark.parametrize("teacher", [byte_bpe(400), metaspace()], ids=["bytes", "metaspace"])
def test_a_window_of_its_own_text_is_no_text_to_the_lm_term(teacher):
    pair = pair_of(TOKENIZER, teacher)
    given, own = pair.encoder.windows(STORIES)[:2], own_windows(pair)
    collate = pair.collator()
    framework = pair.framework({"lm": 1.0}).double()
    alone, expected = gradient_of(framework, collate(given))
    both, gradient = gradient_of(framework, collate([given[0], *own, given[1]]))
    assert both == pytest.approx(alone, rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)

    nothing = framework(collate(own), step=0)
    assert float(nothing.loss) == 0 and nothing.terms["lm"].count == 0 and float(nothing.terms["lm"].sum) == 0


def test_kd_and_spans_and_the_step_do_not_depend_on_how_windows_are_put_together():
    pair = pair_of(TOKENIZER, byte_bpe(400))
    given, own = pair.encoder.windows(STORIES)[:2], own_windows(pair)
    collate = pair.collator()
    framework = pair.framework({"kd": 0.7, "lm": 0.3, "span": 0.2}, divergence="reverse_kl").double()
    whole = collate([given[0], own[0], own[1], given[1], own[2]])
    loss, gradient = gradient_of(framework, whole)

    total, sums = 0.0, None
    for part in ([own[1]], [given[0], own[0]], [own[2], given[1]]):
        value, one = gradient_of(framework, collate(part), counts=whole.counts)
        total += value
        sums = one if sums is None else [a + b for a, b in zip(sums, one, strict=True)]
    assert total == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(sums, gradient, rtol=1e-5, atol=1e-8)


def test_on_average_the_gradient_is_that_of_reverse_kl_along_the_students_own_texts():
    """Over all texts that it can write, each as often as it writes it: sum over prefixes of P(prefix) grad KL(prefix).

    The reference is plain autograd over the tree of prefixes, with whole softmaxes.
    """
    longest = 3
    student = tiny_llama(len(LETTERS), seed=1).double()
    teacher = tiny_llama(len(LETTERS), seed=2).double()
    pair = pair_of(LETTERS, LETTERS, student=student, teacher=teacher)
    end = LETTERS.eos_token_id
    letters = [token for token in range(len(LETTERS)) if token != end]
    prompt = own_prompt(pair.encoder, pair.encoder.windows(["abbaabab"])[0], 4, 0.0)
    read = prompt.student_ids

    def log_probs(model, written) -> torch.Tensor:
        return model(torch.tensor([[*read, *written]])).logits[0, -1].log_softmax(-1)

    def probability(written) -> float:
        with torch.no_grad():
            parts = [log_probs(student, written[:n])[token] for n, token in enumerate(written)]
        return float(torch.stack(parts).sum().exp())

    prefixes = [written for n in range(longest) for written in itertools.product(letters, repeat=n)]
    student.zero_grad()
    for prefix in prefixes:
        own = log_probs(student, prefix)
        kl = (own.exp() * (own - log_probs(teacher, prefix).detach())).sum()
        (kl * (probability(prefix) if prefix else 1.0)).backward()
    expected = [p.grad.clone() for p in student.parameters()]

    texts = [(*written, end) for written in prefixes] + [*itertools.product(letters, repeat=longest)]
    assert sum(map(probability, texts)) == pytest.approx(1.0, rel=1e-9)
    framework = pair.framework({"kd": 1.0}, divergence="reverse_kl", top_k=len(LETTERS))
    mean = [torch.zeros_like(gradient) for gradient in expected]
    for text in texts:
        batch = pair.collator()([own_window(pair.encoder, prompt, text).window])
        _, gradient = gradient_of(framework, batch)
        for total, part in zip(mean, gradient, strict=True):
            total += probability(text) * batch.counts["kd"] * part
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-7)


def test_the_share_of_its_own_text_is_a_schedule():
    scheduler = CurriculumScheduler(CurriculumConfig(on_policy=Ramp([[0, 0], [0.5, 0], [1, 1]])), pair_loss(), 100)
    assert [scheduler.on_policy(step) for step in (0, 50, 75, 100)] == [0, 0, 0.5, 1]
    assert CurriculumConfig(on_policy=0.5).uses_own_text and not CurriculumConfig().uses_own_text
    assert "on_policy" not in scheduler.weights(0)
    with pytest.raises(ValueError, match="from 0 to 1"):
        CurriculumConfig(on_policy=Ramp([[0, 0], [1, 1.2]]))


def pair_loss():
    return pair_of(TOKENIZER, TOKENIZER).framework({"kd": 1.0}).loss_config
