"""The forecast of memory against the peak of real optimizer steps, byte by byte as torch's allocator counts them.

On the CPU alone: beside models of so little CUDA's libraries take more for themselves (32 MiB for products on an H100).
Large ones are counted on a pretended GPU (`tests/gpu`), and on a real one by `python -m benchmarks.gpu`.
"""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

import train
from models.config import CurriculumConfig, RouterConfig
from models.losses.chunk_size import chunk_rows
from models.text.encoder_decoder import SourceEncoder
from models.text.vocabulary import VocabularyMap
from tests.models.tiny import STORIES, Pair, bart_like, byte_bpe, pair_of, tiny_bart, tiny_llama, tiny_t5
from tests.toy import toy_config
from utils.config.settings import LoraConfig
from utils.errors import UserError
from utils.forecast import batch_size, step_memory
from utils.forecast.step_memory import RUNTIME, Demand, StepSetting
from utils.logs.step_logger import StepLogger
from utils.machine import device_memory
from utils.parallel.accelerator import build_accelerator, temporary_accelerator
from utils.pretrained.loading import recompute_layers
from utils.training.loop import fit
from utils.training.options import LoopOptions

WITHIN = 0.2
EVERYTHING = ("feat", "rel", "attn", "layer", "contr")

CASES = {
    "plain": {},
    "large vocabulary": {"vocabulary": 16_000},
    "deep": {"num_hidden_layers": 12},
    "long": {"length": 512, "windows": 1},
    "router": {"terms": EVERYTHING, "num_hidden_layers": 4},
    "half precision": {"precision": "bf16", "vocabulary": 4_000, "num_hidden_layers": 4},
    "dropout": {"student": "gpt2"},
    "layers computed twice": {"recomputes": True, "num_hidden_layers": 8},
    "alone": {"teacher": False, "windows": 8},
    "isolated documents": {"length": 256, "num_hidden_layers": 6, "isolates": True},
}


def student_of(case: dict, vocabulary: int):
    if case.get("student") == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=96, n_layer=3, n_head=4, vocab_size=vocabulary, n_positions=512))
    shape = {
        "num_hidden_layers": case.get("num_hidden_layers", 2),
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    return tiny_llama(vocabulary, 1, width=96, num_attention_heads=4, **shape).train()


def rows_on_cpu(vocabulary: int, bytes_per_logit: int, *, is_half: bool = False) -> int:
    return chunk_rows(vocabulary, torch.device("cpu"), bytes_per_logit, is_half=is_half)[0]


def demand_of(**case) -> Demand:
    """Return the demand for memory of a step in float32 weights, with 64 outcomes of the teacher's, on a CPU."""
    return Demand(
        teacher_dtype=torch.float32,
        student_dtype=torch.float32,
        rows=rows_on_cpu,
        top_k=64,
        on_gpu=False,
        **case,
    )


def demand_of_run(config, teacher, device="cpu", precision="no", rows=chunk_rows, processes=1) -> Demand:
    """Return the demand for memory of a run with such a student and such a teacher, in windows of 64 tokens."""
    setting = StepSetting(
        teacher, (teacher,), 64, precision=precision, device=torch.device(device), chunk_rows=rows, processes=processes
    )
    return step_memory.demand_of(config, setting)


def set_up(case: dict):
    """(framework, windows, collate, what the forecast says of them)."""
    tokenizer = byte_bpe(600)
    vocabulary, length, has_teacher = case.get("vocabulary", 600), case.get("length", 128), case.get("teacher", True)
    terms = case.get("terms", ())
    router = RouterConfig(layers=3, teacher_layers=3) if terms else None

    teacher = tiny_llama(vocabulary, 2, width=128, num_hidden_layers=3)
    pair = pair_of(
        tokenizer, tokenizer, max_length=length, student=student_of(case, vocabulary), teacher=teacher, router=router
    )

    weights = {"lm": 0.5, **dict.fromkeys(("kd", "span") if has_teacher else (), 0.5), **dict.fromkeys(terms, 0.1)}
    framework = pair.framework(weights, top_k=64)
    if not has_teacher:
        framework._frozen = (None,)
    if case.get("recomputes"):
        recompute_layers(pair.student)

    collate = pair.collator()
    if case.get("isolates"):
        pair.encoder = pair.encoder.isolated()
    texts = STORIES[:3] * 60 if case.get("isolates") else ["\n".join(STORIES[:3]) * 60]
    windows = [w for w in pair.encoder.windows(texts) if len(w["student_ids"]) > 0.9 * length]

    demand = demand_of(
        student=pair.student.config,
        teacher=teacher.config if has_teacher else None,
        length=length,
        precision=case.get("precision", "no"),
        recomputes=case.get("recomputes", False),
        routed_layers=3 if terms else 0,
        routed_teacher_layers=3 if terms else 0,
        isolates=case.get("isolates", False),
    )

    return framework, windows, collate, demand


@pytest.mark.parametrize(("family", "recomputes"), [("t5", False), ("t5", True), ("bart", False)])
def test_the_forecast_of_an_encoder_decoder_pair_is_within_a_fifth_of_the_peak(family, recomputes):
    """With as many tokens for the encoder as for the decoder, which is what is forecast."""
    tokenizer, build, start = bart_like(600), *((tiny_t5, 0) if family == "t5" else (tiny_bart, 2))
    stacks = {"num_layers": 4} if family == "t5" else {"encoder_layers": 4, "decoder_layers": 4}
    inner = {"d_ff": 192, "d_kv": 48} if family == "t5" else {"encoder_ffn_dim": 192, "decoder_ffn_dim": 192}
    student, teacher = (build(len(tokenizer), seed, d_model=96, **stacks, **inner) for seed in (1, 2))
    encoder = SourceEncoder(tokenizer, tokenizer, 128, (start, start))
    pair = Pair(student.train(), teacher, encoder, VocabularyMap.build(tokenizer, tokenizer))

    ids = tokenizer("\n".join(STORIES) * 2, add_special_tokens=False).input_ids
    texts = [tokenizer.decode(ids[n : n + 118]) for n in range(16)]
    roles = ("user", "assistant")
    rows = [[{"role": r, "content": t} for r, t in zip(roles, texts[n : n + 2], strict=True)] for n in range(0, 16, 2)]
    windows = encoder.windows([json.dumps(row) for row in rows])
    assert len(windows) == 8 and all(len(w[f"student_{of}"]) > 110 for w in windows for of in ("source", "ids"))

    if recomputes:
        recompute_layers(pair.student)

    sides = {"student": student.config, "teacher": teacher.config}
    demand = demand_of(**sides, length=128, precision="no", recomputes=recomputes)
    config = toy_config(batch_size=4, gradient_accumulation_steps=2, max_steps=2)
    measured = peak_of(pair.framework({"lm": 0.5, "kd": 0.5}, top_k=64), windows, pair.collator(), config, "no")
    assert sum(demand.memory(4).values()) - RUNTIME == pytest.approx(measured, rel=WITHIN)


def peak_of(framework, windows, collate, config, precision: str) -> int:
    """Bytes at the peak of some optimizer steps, weights included."""
    kept = [framework] if framework.teacher is None else [framework, framework.teacher.model]
    logger = StepLogger(None, 10**6, 1, main_process=False)
    with temporary_accelerator(precision, cpu=True) as accelerator:
        weights = sum(p.nbytes for module in kept for p in module.parameters())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            fit(framework, windows, collate, config, accelerator=accelerator, options=LoopOptions(logger=logger))
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return weights + peak


@pytest.mark.parametrize("name", CASES)
def test_the_forecast_is_within_a_fifth_of_the_peak(name):
    case = CASES[name]
    framework, windows, collate, demand = set_up(case)
    size = case.get("windows", 4)
    assert len(windows) >= 2 * size
    config = toy_config(batch_size=size, gradient_accumulation_steps=2, max_steps=2)
    measured = peak_of(framework, windows[: 2 * size], collate, config, demand.precision)
    forecast = sum(demand.memory(size).values()) - RUNTIME
    assert forecast == pytest.approx(measured, rel=WITHIN)


# --------------------------------------------------------------------------------------------------- what fits


@pytest.fixture
def config():
    names = ("--student", "quickstart", "--teacher", "quickstart", "--train-data", "quickstart")
    return train.configure([*names, "--batch-size", "auto", "--max-length", "64"])[0]


def settled(monkeypatch, config, free: float):
    shapes = {"student": tiny_llama(600).config, "teacher": tiny_llama(600).config}
    monkeypatch.setattr(batch_size.loading, "load_each", lambda load, names: shapes)
    monkeypatch.setattr(batch_size, "free_memory", lambda device: int(free))
    found, forecast = batch_size.choose_batch_size(config, build_accelerator("no", cpu=True), chunk_rows)
    return found, forecast.told


def test_of_a_sharded_teacher_a_process_holds_a_part_of_the_layers_and_two_whole_ones(config):
    model = tiny_llama(600, num_hidden_layers=10)
    sharded = replace(config, teacher=replace(config.teacher, device="sharded"))
    demands = [demand_of_run(c, model.config, processes=4) for c in (config, sharded)]
    whole, part = (demand.memory(1)["teacher weights"] for demand in demands)
    layers = sum(p.nbytes for p in model.model.layers.parameters())
    assert whole == sum(p.nbytes for p in model.parameters())
    assert part == pytest.approx(whole - layers + layers * (1 / 4 + 2 / 10), rel=0.01)


def test_a_teacher_on_the_students_gpu_is_counted_also_where_it_is_named(config):
    model = tiny_llama(600).config

    def has_teacher(device: str) -> bool:
        asked = replace(config, teacher=replace(config.teacher, device=device, dtype="float16"))
        demand = demand_of_run(asked, model, device="cuda:0", precision="fp16", rows=lambda *_, is_half: (128, ""))
        return "teacher weights" in demand.memory(1)

    assert has_teacher("cuda:0") and has_teacher("auto") and not has_teacher("cuda:1")


def test_auto_keeps_the_windows_of_the_recipe_in_an_optimizer_step(monkeypatch, config):
    assert (config.training.batch_size, config.training.gradient_accumulation_steps) == ("auto", 16)  # 2 x 8
    found, told = settled(monkeypatch, config, 2**40)
    assert (found.training.batch_size, found.training.gradient_accumulation_steps) == (16, 1)
    assert "micro-batches of 16" in told
    demand = demand_of_run(config, tiny_llama(600).config)
    least, more = (demand.memory(windows) for windows in (1, 4))
    assert settled(monkeypatch, config, 2 * sum(more.values()))[0].training.batch_size == 4
    tight = settled(monkeypatch, config, sum(least.values()) + 1)[0].training
    assert (tight.batch_size, tight.gradient_accumulation_steps) == (1, 16)


def test_a_run_that_cannot_fit_is_refused_and_one_that_may_not_is_warned_of(monkeypatch, config, caplog):
    with pytest.raises(UserError, match=r"even in micro-batches of one window.*--batch-size.*--max-length"):
        settled(monkeypatch, config, 2**28)
    small = replace(config, training=replace(config.training, batch_size=4))
    assert settled(monkeypatch, small, 2**40)[0] == small and "WARNING" not in caplog.text
    settled(monkeypatch, small, RUNTIME)
    assert "micro-batches are halved" in caplog.text


def test_a_run_that_fits_without_the_teacher_is_not_refused_once_its_cache_is_there(monkeypatch, config, tmp_path):
    monkeypatch.setattr(step_memory, "RUNTIME", 0)
    # Hidden states are in no cache.
    config = replace(config, curriculum=CurriculumConfig())
    least = sum(demand_of_run(config, tiny_llama(600).config).memory(1).values())
    free = 0.99 * least / device_memory.MARGIN
    cached = replace(config, cache=replace(config.cache, folder=str(tmp_path)))
    assert "which a complete cache spares" in settled(monkeypatch, cached, free)[1]
    for folder, build_only, refused in ((tmp_path / "new", False, True), (tmp_path / "new", True, False)):
        other = replace(config, cache=replace(config.cache, folder=str(folder), build_only=build_only))
        with pytest.raises(UserError) if refused else nullcontext():
            settled(monkeypatch, other, free)


def test_the_float32_copy_of_a_half_precision_base_is_forecast():
    """An adapter's training takes little, and its evaluation copies the weights below it."""
    config = tiny_llama(600, width=256, num_hidden_layers=12).config
    size = sum(p.numel() for p in tiny_llama(600, width=256, num_hidden_layers=12).parameters())
    options = {"student": config, "teacher": None, "length": 8, "precision": "bf16", "lora": LoraConfig(enabled=True)}
    options["scored_logits"] = 1
    demands = [replace(demand_of(**options), student_dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    half, whole = (demand.memory(1) for demand in demands)
    assert half["student in float32 for evaluation"] == 4 * size
    assert "student in float32 for evaluation" not in whole
