"""A dry run finds what would fail in a later mode before anything is measured, and leaves no trace."""

import copy

import pytest
import torch
from torch import nn

from tests.models.tiny import byte_bpe, pair_of, tiny_llama
from utils.errors import UserError
from utils.parallel.accelerator import build_accelerator
from utils.seeding import rng_state
from utils.training.dry_run import try_modes

STUDENT, TEACHER = byte_bpe(290), byte_bpe(320, 1)


class Counter(nn.Module):
    """A student's part with state: it counts its forwards, as batch norms and routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, *args, **options):
        self.seen = self.seen + 1


@pytest.fixture
def module():
    student = tiny_llama(len(STUDENT), attention_dropout=0.1)
    pair = pair_of(STUDENT, TEACHER, student=student)
    framework = pair.framework({"lm": 1.0, "kd": 1.0})
    counter = Counter()
    student.counter = counter
    student.model.register_forward_hook(lambda *_: counter())
    framework.batch = pair.batch(["Once upon a time there was a cat. It sat on a mat.", "And then?"])
    return framework


def run(module, compares: bool = True) -> None:
    try_modes(module, module.student, module.batch, build_accelerator("no", cpu=True), compares=compares)


def test_nothing_is_left_of_it(module):
    module.train()
    module.student.model.eval()
    before, generators = copy.deepcopy(module.state_dict()), rng_state()
    run(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(rng_state()["torch"], generators["torch"]) and rng_state()["python"] == generators["python"]
    assert module.training and not module.student.model.training
    assert module.student.counter.seen.item() == 0


def test_a_forward_that_only_training_refuses_names_class_and_version(module):
    def refuse(part, args, options):
        if part.training:
            raise ValueError("token_type_ids is required when training")

    module.student.model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(UserError, match=r"(?s)LlamaForCausalLM, transformers \d.*training mode.*token_type_ids"):
        run(module)


def test_a_backward_that_fails_is_found(module):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError("no backward")

    def hook(part, args, output):
        output.last_hidden_state = Fails.apply(output.last_hidden_state)
        return output

    module.student.model.register_forward_hook(hook)
    with pytest.raises(UserError, match=r"(?s)cannot be trained.*no backward"):
        run(module)


def test_a_comparison_that_fails_is_found(module, monkeypatch):
    monkeypatch.setattr(module, "compare", lambda batch: 1 / 0)
    with pytest.raises(UserError, match=r"(?s)cannot be evaluated.*ZeroDivisionError"):
        run(module)
    run(module, compares=False)


def test_a_student_that_changes_its_weights_in_evaluation_mode_is_refused(module):
    def halve(part, args, options):
        if not part.training:
            with torch.no_grad():
                module.student.model.layers[0].mlp.up_proj.weight.mul_(0.5)

    module.student.model.register_forward_pre_hook(halve, with_kwargs=True)
    with pytest.raises(UserError, match="changes its own weights in evaluation mode"):
        run(module)


def test_what_does_not_fit_into_memory_is_left_to_training(module, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    module.student.model.register_forward_pre_hook(full)
    run(module)
