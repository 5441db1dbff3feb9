"""Whole runs of train.py on the cards that it is made for: no mixed devices, and no waiting in an unlogged step."""

from dataclasses import dataclass

import pytest

from tests.gpu.attention_kernels import MATH

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]

ALL_TERMS = [f"curriculum.{term}.weight=0.5" for term in ("span", "feat", "rel", "attn", "layer", "contr")]
FP16, BF16, FLOAT32 = (f"training.mixed_precision={name}" for name in ("fp16", "bf16", "no"))


@dataclass(frozen=True)
class Variant:
    """A run on some GPUs."""

    card: str
    settings: tuple[str, ...]
    flags: tuple[str, ...] = ()
    count: int = 1

    @property
    def is_fp16(self) -> bool:
        return FP16 in self.settings


VARIANTS = {
    "P100, fp16": Variant("P100", (FP16,)),
    "T4, fp16, all terms": Variant("T4", (FP16, *ALL_TERMS)),
    "T4, chosen positions": Variant("T4", (FP16, "curriculum.select=0.5", "loss.select_by=excess_loss")),
    "3090, bf16, on the way to the teacher": Variant(
        "3090", (BF16, "loss.interpolation=0.5", "loss.divergence=generalised_jsd", "loss.skew=0.3")
    ),
    "T4, own text": Variant(
        "T4",
        (FP16, "curriculum.on_policy=0.5", "on_policy.every=2", "on_policy.prompt_tokens=8", "on_policy.new_tokens=8"),
    ),
    "T4, float32, channel": Variant("T4", (FLOAT32, "teacher.dtype=float32", "loss.correction=channel")),
    "3090, bf16, LoRA, layers computed twice": Variant(
        "3090", (BF16, "student.init=pretrained"), ("--student", "TEACHER", "--lora", "--gradient-checkpointing")
    ),
    "T4, fp16, some layers of a bigger model": Variant(
        "T4", (FP16,), ("--student", "TEACHER", "--student-init", "layers:1")
    ),
    "H100, bf16, gradients of terms, comparison": Variant(
        "H100", (BF16, "logging.term_gradients=true", "evaluation.without_teacher=true")
    ),
    "T4, cache filled": Variant("T4", (FP16,), ("--cache-teacher", "CACHE")),
    "T4, cache read": Variant("T4", (FP16,), ("--cache-teacher", "CACHE")),
    "T4, batch size auto": Variant("T4", (FP16,), ("--batch-size", "auto")),
    "T4, teacher on the host": Variant("T4", (FP16, "teacher.dtype=float32"), ("--teacher-device", "cpu")),
    "T4 x2, teacher on the second": Variant("T4", (FP16,), ("--teacher-device", "cuda:1"), 2),
    "T4 x2, teacher by itself": Variant("T4", (FP16,), count=2),
    "T4 x2, teacher on the first, by name": Variant("T4", (FP16,), ("--teacher-device", "cuda:0"), 2),
    "T4 x2, teacher spread": Variant("T4", (FP16,), ("--teacher-device", "spread"), 2),
}
MICRO_BATCHES = 4
"""Of a step, in the recipe of the place."""
OTHER_WAITS = {"T4, cache filled": MICRO_BATCHES}
"""Beside the scaler's: for the answers to a micro-batch, which go to the disk, all of them at once."""


@pytest.fixture(scope="module")
def results(scenario, gpu_place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    variants = []
    for name, variant in VARIANTS.items():
        output = folder / "".join(c for c in name if c.isalnum())
        named = {"CACHE": str(folder / "cache"), "TEACHER": str(gpu_place.teacher)}
        flags = [named.get(flag, flag) for flag in variant.flags]
        short = ["--max-steps", "4", "--eval-every", "2", "--save-every", "2"]
        settings = ["--set", "logging.every=3", "teacher.dtype=auto", *variant.settings]
        arguments = gpu_place.arguments(output, *short, *flags, *settings)
        variants.append(
            {"name": name, "card": variant.card, "count": variant.count, "arguments": arguments, "output": str(output)}
        )
    return scenario("runs", variants=variants)


@pytest.fixture(params=VARIANTS)
def run(request, results):
    result = {"name": request.param, **results[request.param]}
    if "skipped" in result:
        pytest.skip(result["skipped"])
    return result


def test_a_run_ends_well(run):
    assert run["code"] == 0, run["errors"]
    assert run["steps"] >= 4


def test_every_model_writes_text(run):
    """In batches, so that shorter prompts are padded."""
    assert not any("no written text" in line for line in run["warnings"]), run["warnings"]


def test_a_step_that_is_not_logged_waits_for_nothing_but_the_scaler_of_fp16(run):
    allowed = OTHER_WAITS.get(run["name"], 0) + VARIANTS[run["name"]].is_fp16
    assert max(run["waits"]) <= allowed, run["where"]


def test_weights_are_updated_by_one_kernel_or_with_the_scaler_of_fp16_by_a_few(run):
    """Never one parameter after the other."""
    is_fp16 = VARIANTS[run["name"]].is_fp16
    assert run["update"] == {"fused": not is_fp16, "foreach": is_fp16}


def test_what_torch_has_reserved_is_logged_beside_what_is_allocated(run):
    assert run["memory"] and all(0 < allocated <= reserved for allocated, reserved in run["memory"])


def test_attention_writes_no_scores_to_memory(run, gpu_kind):
    """Grouped heads included, on every card."""
    if gpu_kind == "real":
        pytest.skip("torch does not tell which kernel it takes")
    assert run["kernels"] and MATH not in run["kernels"]


def test_the_teacher_is_where_it_was_asked_for(results):
    on_second = results["T4 x2, teacher on the second"]
    by_itself = results["T4 x2, teacher by itself"]
    spread = results["T4 x2, teacher spread"]
    if "skipped" in on_second:
        pytest.skip(on_second["skipped"])
    assert "teacher on cuda:1" in on_second["teacher"][0] and on_second["peak"][1] > 0
    assert "teacher on cuda:1: a GPU of its own" in by_itself["teacher"][0] and by_itself["peak"][1] > 0
    assert "teacher on cuda:1, whole" in spread["teacher"][0]
    assert results["T4 x2, teacher on the first, by name"]["peak"][1] == 0


def test_a_teacher_on_the_students_gpu_by_name_leaves_the_other_gpu_unused_and_says_so(results):
    named = results["T4 x2, teacher on the first, by name"]
    if "skipped" in named:
        pytest.skip(named["skipped"])
    assert any("GPUs stay unused" in line for line in named["warnings"])
