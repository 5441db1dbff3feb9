"""Teachers on more than one device. What sharded ones compute: tests/equivalence/test_sharded_teacher.py."""

from types import SimpleNamespace

import pytest
import torch

from tests.models.tiny import byte_bpe, pair_of, tiny_llama
from utils.commands.settings import configure
from utils.config.settings import CacheConfig, ModelConfig
from utils.errors import UserError
from utils.machine import hardware
from utils.pretrained import loading
from utils.pretrained import teacher as teachers

CPU = torch.device("cpu")


def asked(device: str, dtype: str = "auto", folder: str | None = None) -> SimpleNamespace:
    model = ModelConfig("t", device=device, dtype=dtype)
    return SimpleNamespace(teacher=model, several_teachers=[], cache=CacheConfig(folder=folder))


def accelerator(processes: int) -> SimpleNamespace:
    return SimpleNamespace(device=CPU, num_processes=processes)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "cuda:1"),
        (("--teacher-device", "cuda:0"), "cuda:0"),
        (("--teacher-device", "spread"), "spread"),
        (("--set", "teacher.name=null", "curriculum.kd.weight=0"), "auto"),
        (("--cache-teacher", "c", "--set", "cache.build_only=true"), "auto"),  # no student takes its GPU
    ],
)
def test_a_teacher_that_nobody_placed_gets_a_gpu_that_is_there_to_spare(monkeypatch, flags, expected):
    monkeypatch.setattr(hardware, "_gpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**34, 2**34))
    config, _ = configure(["--config", "kaggle_p100", *flags])
    placed, reason = teachers.with_spare_gpu(config, torch.device("cuda", 0), 1)
    assert placed.teacher.device == expected
    assert (reason is not None) == (placed != config)

    # It is asked ahead there, and the forecast of the student's GPU leaves it out, as where it is named.
    named, _ = configure(["--config", "kaggle_p100", "--teacher-device", "cuda:1"])
    assert expected != "cuda:1" or placed == named


@pytest.mark.parametrize(
    ("config", "processes", "gpus", "said"),
    [
        (asked("spread"), 1, 1, "processes: 1, GPUs: 1; expected one process, two GPUs or more.*sharded"),
        (asked("spread"), 2, 2, "processes: 2, GPUs: 2; expected one process"),
        (asked("sharded"), 1, 2, "got one process, expected two or more.*spread"),
        (asked("sharded", dtype="4bit"), 2, 2, "teacher.dtype=4bit.*spread"),
        (asked("sharded", folder="there"), 2, 2, "cache.folder=there.*spread"),
        (asked("cuda:7"), 1, 2, "Expected auto, spread, sharded, cpu, cuda:0, cuda:1"),
    ],
)
def test_what_cannot_be_had_is_refused(monkeypatch, config, processes, gpus, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=said):
        teachers.choose_teacher_device(config, accelerator(processes))


def test_what_can_be_had_computes_with_the_student_or_beside_it(monkeypatch):
    monkeypatch.setattr(teachers, "_gpus", lambda: 4)
    assert (
        teachers.choose_teacher_device(asked("spread"), accelerator(1))
        == teachers.choose_teacher_device(asked("sharded"), accelerator(2))
        == CPU
    )

    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert [teachers.gpus_used(asked("spread"), first, {first}), teachers.gpus_used(asked("auto"), first, {first})] == [
        4,
        1,
    ]
    assert [teachers.gpus_used(asked("cuda:1"), first, {second}), teachers.gpus_used(asked("auto"), CPU, {CPU})] == [
        2,
        0,
    ]

    ahead = [
        device for device in ("auto", "cpu", "cuda:1", "spread", "sharded") if teachers.is_asked_ahead(asked(device))
    ]
    assert ahead == ["cpu", "cuda:1", "spread"]

    alone = [teachers.on_one_process(asked(device).teacher).device for device in ("spread", "sharded", "cpu")]
    assert alone == ["auto", "auto", "cpu"]


def test_the_students_gpu_keeps_room_for_its_training(monkeypatch):
    free = {0: 16_000, 1: 10_000, "cpu": 100_000}
    monkeypatch.setattr(teachers, "get_max_memory", lambda: dict(free))
    student = torch.device("cuda", 0)
    assert teachers.room(student, 4_000) == {0: 9_400, 1: 9_000, "cpu": 90_000}  # 0.9 x 16,000 - 1.25 x 4,000
    assert teachers.room(student, 20_000)[0] == 0
    assert teachers.room(student, 0)[0] == 0  # not known what it needs
    assert teachers.room(CPU, 4_000)["cpu"] == 90_000


def test_a_spread_teacher_that_one_device_holds_whole_is_told_of_like_any(tmp_path):
    """transformers puts a map on a model only where its layers went to several devices."""
    tiny_llama(400, 2).save_pretrained(tmp_path)
    whole = loading.load_model(str(tmp_path), "teacher", torch.float32, {"cpu": 2**30})
    assert teachers.places(whole) == "cpu, whole"
    whole.hf_device_map = {"embed": 0, "layers.0": 0, "layers.1": 1, "layers.2": "cpu"}
    assert teachers.places(whole) == "cuda:0 (2 modules), cuda:1 (1 modules), cpu (1 modules)"


@pytest.mark.parametrize("tied", [False, True])
def test_a_teacher_in_several_places_says_the_same_bit_for_bit(tmp_path, tied):
    """Its embedding stays, and layers and, where it is not the embedding, the head come from the disk in every call."""
    model = tiny_llama(400, 2, num_hidden_layers=3, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    pair = pair_of(byte_bpe(300), byte_bpe(400), teacher=model)
    plain, batch, layers = pair.frozen(), pair.batch(), (1, 3)
    embedding = model.get_input_embeddings().weight.nbytes
    small = embedding + 26_000 if tied else 2 * embedding + 16_000  # room for the largest part is kept free

    spread = loading.load_model(str(tmp_path), "teacher", torch.float32, {"cpu": small})
    places = {name: str(parameter.device) for name, parameter in spread.named_parameters()}
    assert places["model.embed_tokens.weight"] == "cpu" and places["model.layers.2.mlp.up_proj.weight"] == "meta"
    assert places.get("lm_head.weight") == (None if tied else "meta")

    pair.teacher = spread
    teacher = pair.frozen()
    assert teacher.device == CPU

    found, expected = teacher.signal(batch, 8, layers), plain.signal(batch, 8, layers)
    for name in ("ids", "log_probs", "log_tail", "log_mass", "realised"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert all(torch.equal(one, other) for one, other in zip(found.hidden, expected.hidden, strict=True))
    assert loading.fingerprint(spread) == loading.fingerprint(model)
