"""Settings that change nothing in a run are named, each with its value and the reason, and no others are."""

from dataclasses import replace

import pytest
import torch

from models.config import CurriculumConfig, LossConfig, RouterConfig
from models.distillation import Distillation, Method
from tests.models.tiny import byte_bpe, tiny_llama
from utils.commands.settings import configure
from utils.config.schema import settings_of
from utils.config.unused_settings import READ_BY, unused_settings
from utils.config.yaml_files import CONFIG_FOLDER
from utils.logs.console import setup_logging

GIVEN = ["--teacher", "teacher", "--student", "student", "--train-data", "text.txt"]
NO_KD = ["--curriculum.kd", "0"]
RAMP = "{points: [[0, 0.2], [1, 1]]}"

OTHER_VALUES = {
    "curriculum.select": 0.25,
    "curriculum.sample_weights": 1.0,
    "loss.select_by": "excess_loss",
    "loss.temperature": 3.0,
    "loss.tail": "renormalise",
    "loss.interpolation": 0.5,
    "loss.correction": "none",
    "loss.min_prefix_mass": 0.9,
    "loss.divergence": "reverse_kl",
    "loss.skew": 0.7,
    "loss.span_temperature": 3.0,
    "router.positions": 8,
    "router.heads": 2,
    "router.gate": "position",
    "router.prior_width": 0.7,
    "router.prior_weight": 0.7,
    "router.span": 4,
    "router.contrastive_temperature": 0.7,
}
"""Key -> a value other than its default."""


def told(*words: str) -> list[str]:
    return unused_settings(configure([*GIVEN, *words])[0])


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ([], []),
        (NO_KD, []),
        (["--curriculum.select", RAMP, "--loss.select_by", "divergence", "--curriculum.sample_weights", "0.5"], []),
        (["--curriculum.balance", "loss", "--loss.divergence", "skew_kl", "--loss.skew", "0.5"], []),
        (["--loss.interpolation", "{points: [[0, 0], [1, 1]]}"], []),
        (["--curriculum.on_policy", "0.5", "--on_policy.every", "3"], []),
        (["--cache-teacher", "folder", "--cache-top-k", "8", "--set", "cache.storage=float32"], []),
        (["--curriculum.attn", "1", "--router.heads", "2"], []),
        (
            ["--loss.select_by", "divergence"],
            ["KD is learned at all positions (curriculum.select 1): loss.select_by divergence"],
        ),
        (["--loss.skew", "0.5"], ["loss.divergence forward_kl does not read it: loss.skew 0.5"]),
        (
            [*NO_KD, "--curriculum.select", RAMP, "--loss.select_by", "divergence", "--loss.divergence", "jsd"],
            [
                "kd weighs 0 in curriculum: loss.select_by divergence, curriculum.select 0.2 to 1",
                "kd, span weigh 0 in curriculum: loss.divergence jsd",
            ],
        ),
        ([*NO_KD, "--curriculum.span", "0.5", "--loss.divergence", "jsd"], []),
        (
            [*NO_KD, "--curriculum.sample_weights", "{points: [[0, 0], [1, 1]]}"],
            ["kd weighs 0 in curriculum: curriculum.sample_weights 0 to 1"],
        ),
        (
            [*NO_KD, "--curriculum.balance", "gradient"],
            ["there is no second term to balance (curriculum): curriculum.balance gradient"],
        ),
        ([*NO_KD, "--curriculum.balance", "gradient", "--curriculum.span", "0.5"], []),
        (["--curriculum.feat", "1", "--router.heads", "2"], ["rel, attn weigh 0 in curriculum: router.heads 2"]),
        (
            ["--router.heads", "2", "--router.layers", "2"],
            ["feat, rel, attn, layer, contr weigh 0 in curriculum: router.layers 2, router.heads 2"],
        ),
        (
            [*NO_KD, "--without-teacher"],
            [
                "all terms but lm weigh 0 (curriculum), so that the run beside it is the same: "
                "evaluation.without_teacher true"
            ],
        ),
        (["--without-teacher"], []),
        (
            ["--on_policy.every", "3"],
            ["the student writes no text to learn from (curriculum.on_policy 0): on_policy.every 3"],
        ),
        (["--cache-top-k", "8"], ["there is no teacher cache (cache.folder null): cache.top_k 8"]),
        (["--student.lora.rank", "8"], ["there is no adapter (student.lora.enabled false): student.lora.rank 8"]),
    ],
)
def test_settings_that_change_nothing_are_named(words, lines):
    assert told(*words) == [f"without effect, since {line}" for line in lines]


@pytest.mark.parametrize(
    ("kd", "share", "span"),
    [
        ("{points: [[0, 1], [0.4, 0]]}", "1", "40% to 100%"),
        ("{points: [[0.2, 0], [0.6, 1]]}", "{points: [[0, 0], [0.3, 0.5]]}", "0% to 20%"),
        ("{points: [[0, 1], [0.4, 0]]}", "{points: [[0, 1], [0.4, 0]]}", None),
        ("{points: [[0, 0], [1, 1]]}", "0.5", None),
        ("{points: [[0, 1], [0.4, 0]]}", "0", None),
        ("1", "1", None),
    ],
)
def test_own_text_that_no_term_learns_from_is_told_with_the_time(kd, share, span):
    lines = told("--curriculum.kd", kd, "--curriculum.on_policy", share)
    assert lines == [] if span is None else lines[0].startswith(f"from {span} of the training")


def test_an_interpolation_that_falls_to_0_is_told():
    [line] = told("--loss.interpolation", "{points: [[0, 1], [1, 0]]}")
    assert "loss.interpolation 1 to 0" in line and "let the ramp end at 1" in line


@pytest.mark.parametrize("recipe", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_says_nothing_in_vain(recipe):
    config, _ = configure(["--config", str(recipe)])
    assert unused_settings(config) == []


def test_every_key_of_the_table_is_a_setting():
    known = settings_of(type(configure(GIVEN)[0]))
    keys = {key for keys, _ in READ_BY for key in keys}
    assert all(any(name.startswith(key) for name in known) for key in keys)
    assert keys - {"router."} == {*OTHER_VALUES}


def loss_and_gradients(curriculum: CurriculumConfig, loss: LossConfig, router: RouterConfig) -> list[torch.Tensor]:
    """Return the loss of a batch, and its gradients, of models that are always the same."""
    tokenizers = {"student": byte_bpe(280), "teacher": byte_bpe(400)}
    student, teacher = tiny_llama(280), tiny_llama(400, seed=1)
    pair = Distillation.from_models(student, teacher, tokenizers, 64, method=Method(loss, curriculum, router))
    torch.manual_seed(0)
    framework = pair.framework(10)
    batch = pair.collate(pair.windows(["Once upon a time there was a little boat. It sailed to town. " * 4]))

    statistics = {"samples": 0.2} if curriculum.uses_statistics else None
    total = framework(batch, 3, statistics=statistics).loss
    total.backward()
    gradients = [weight.grad for weight in framework.parameters() if weight.grad is not None]
    return [total.detach(), *gradients]


@pytest.mark.parametrize("key", OTHER_VALUES)
@pytest.mark.filterwarnings("ignore:the router")
def test_what_the_table_says_is_read_by_no_other_term(key):
    readers = {term for keys, terms in READ_BY if key in keys for term in terms}
    weights = dict.fromkeys({"kd", "span", "lm", "feat", "rel", "attn", "layer", "contr"} - readers, 0.5)
    settings = {
        "curriculum": CurriculumConfig.of_weights(weights | dict.fromkeys(readers, 0.0)),
        "loss": LossConfig(divergence="skew_kl"),
        "router": RouterConfig(),
    }
    expected = loss_and_gradients(**settings)

    section, _, name = key.partition(".")
    settings[section] = replace(settings[section], **{name: OTHER_VALUES[key]})
    changed = loss_and_gradients(**settings)
    assert len(changed) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(changed, expected, strict=True))


def test_the_configuration_is_printed_with_what_has_no_effect(capsys):
    import train

    setup_logging(None, main_process=True)
    assert train.main([*GIVEN, "--loss.skew", "0.5", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# without effect, since loss.divergence forward_kl does not read it: loss.skew 0.5\n")
