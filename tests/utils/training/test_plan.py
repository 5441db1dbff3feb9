"""The plan of the optimizer: what it trains, at which rates, and that a checkpoint brings it back."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.toy import ToyModule, digest, toy_config, toy_windows, train
from utils.errors import UserError
from utils.parallel import accelerator as accelerator_module
from utils.parallel.accelerator import temporary_accelerator
from utils.training.checkpoints import CheckpointStore
from utils.training.optimizer import build_optimizer, build_scheduler, taught_parameters


class Routed(ToyModule):
    """A student with something trained beside it, which has a learning rate of its own."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.router = nn.Linear(1, 1)

    def forward(self, batch, step, **options):
        output = super().forward(batch, step, **options)
        kd = output.terms["kd"]
        kd.sum = kd.sum * self.router(kd.sum.new_ones(1)).exp()[0]
        output.loss = output.loss + 0.1 * kd.sum / max(options["counts"]["kd"], 1)
        return output

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict]:
        beside = {id(p) for p in self.router.parameters()}
        student = [p for p in self.parameters() if id(p) not in beside]
        router = {"lr": learning_rate / 5, "weight_decay": 0.0}
        return [
            {"name": "student", "params": student, "lr": learning_rate, "weight_decay": weight_decay},
            {"name": "router", "params": [self.router.weight], **router},
            {"name": "gates", "params": [self.router.bias], **router},
        ]


def test_groups_of_the_module_keep_their_names_rates_and_decay():
    optimizer = build_optimizer(Routed(), toy_config(learning_rate=0.5, weight_decay=0.3))
    found = [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [("student", 0.5, 0.3), ("router", 0.1, 0.0), ("gates", 0.1, 0.0)]


def test_what_is_frozen_is_left_out_and_so_is_a_group_without_anything_else():
    module = Routed()
    module.router.weight.requires_grad = module.norm.bias.requires_grad = False
    groups = build_optimizer(module, toy_config()).param_groups
    assert [group["name"] for group in groups] == ["student", "gates"]
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in module.parameters() if p.requires_grad)


def test_a_router_without_a_student_to_teach_is_a_mistake():
    module = Routed().requires_grad_(False)
    module.router.requires_grad_(True)
    with pytest.raises(UserError, match="no parameter of the student"):
        build_optimizer(module, toy_config())


def test_a_trained_parameter_in_no_group_is_noticed(monkeypatch):
    whole = Routed.parameter_groups
    monkeypatch.setattr(Routed, "parameter_groups", lambda *arguments: whole(*arguments)[:-1])
    with pytest.raises(AssertionError, match="parameter_groups"):
        build_optimizer(Routed(), toy_config())


def test_taught_is_what_is_named_student_or_everything():
    module = Routed()
    taught = taught_parameters(build_optimizer(module, toy_config()).param_groups)
    assert {id(p) for p in taught} == {id(p) for p in module.parameters()} - {id(p) for p in module.router.parameters()}
    plain = ToyModule()
    assert len(taught_parameters(build_optimizer(plain, toy_config()).param_groups)) == len([*plain.parameters()])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_schedule_multiplies_the_rate_of_every_group(kind):
    config = toy_config(learning_rate=0.5, warmup_ratio=0.2, scheduler=kind)
    optimizer = build_optimizer(Routed(), config)
    scheduler = build_scheduler(optimizer, config, 10)
    factors = []
    for _ in range(11):
        student, router, gates = (group["lr"] for group in optimizer.param_groups)
        assert router == gates == pytest.approx(student / 5)
        factors.append(student / 0.5)
        optimizer.step()
        scheduler.step()
    assert factors[:3] == pytest.approx([0, 0.5, 1]) and 0 < factors[6] < 1 and factors[10] == pytest.approx(0)


def test_a_checkpoint_brings_back_moments_rates_and_names_of_all_groups(tmp_path):
    config = toy_config(save_every=1, weight_decay=0.3)
    whole, store = Routed(dropout=0.3), CheckpointStore(tmp_path, keep=100)
    train(whole, config, checkpoints=store)
    again = Routed(dropout=0.3, seed=5)
    result = train(again, config, checkpoints=CheckpointStore(tmp_path, keep=100), resume_from=store.steps()[3])
    assert (result.resumed_from, result.steps) == (3, 6)
    assert digest(again) == digest(whole)
    saved = store.load(store.steps()[6]).objects["optimizer"]["param_groups"]
    assert [group["name"] for group in saved] == ["student", "router", "gates"]
    assert saved[1]["lr"] == pytest.approx(saved[0]["lr"] / 5)


def test_the_router_is_trained_beside_the_student():
    module, before = Routed(), Routed()
    train(module, toy_config(), windows=toy_windows(4))
    assert not torch.equal(module.router.weight, before.router.weight)


@pytest.mark.parametrize("fused", [True, False])
def test_all_parameters_are_updated_together_with_the_scaler_of_fp16_too(fused):
    """Told fused=False alone, torch would update one parameter after the other."""
    optimizer = build_optimizer(ToyModule(), toy_config(), fused=fused)
    assert (optimizer.defaults["fused"], optimizer.defaults["foreach"]) == (fused, not fused)


def test_the_multi_tensor_update_is_that_of_the_fused_one():
    weights = []
    for fused in (True, False):
        module = ToyModule()
        optimizer = build_optimizer(module, toy_config(), fused=fused)
        for _ in range(3):
            for number, parameter in enumerate(module.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(*weights)


def test_the_gpu_of_a_lone_process_has_a_number(monkeypatch):
    """So that it equals the device that a user names."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    accelerator = SimpleNamespace(device=torch.device("cuda"), state=SimpleNamespace(device=torch.device("cuda")))
    accelerator_module._number_device(accelerator)
    assert accelerator.state.device == torch.device("cuda:0")


def test_no_buffer_is_sent_around_before_a_forward():
    with temporary_accelerator("no", cpu=True) as accelerator:
        assert accelerator.ddp_handler.broadcast_buffers is False
