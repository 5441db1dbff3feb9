"""A teacher with a memory says what the teacher says, and is asked once."""

import copy
from dataclasses import fields

import pytest
import torch

from models.config import CurriculumConfig, LossConfig, RouterConfig, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.teacher.cached import CachedTeacher, RememberingCollator
from models.teacher.kept_rows import RowsByEntropy
from models.teacher.projection import Projection
from models.types import TeacherSignal
from tests.models.tiny import STORIES, Pair, byte_bpe, metaspace, pair_of
from utils.teacher_cache.codec import Codec, Said, join

NUMBERS = [field.name for field in fields(TeacherSignal) if field.name != "hidden"]


class Memory:
    """Keeps windows as the codec of the disk cache would."""

    def __init__(self, vocabulary: int, top_k: int, storage: str = "float32") -> None:
        self.codec, self.windows, self.kept = Codec(vocabulary, top_k, storage), {}, 0
        self.top_k = self.codec.most

    def keys(self, windows):
        return [window["student_ids"].tobytes() + window["teacher_ids"].tobytes() for window in windows]

    def read(self, keys):
        if not all(key in self.windows for key in keys):
            return None
        return join([self.codec.decode(self.windows[key]) for key in keys])

    def keep(self, keys, windows, tokens, seconds):
        assert tokens > 0 and seconds > 0
        self.kept += len(keys)
        self.windows |= {key: self.codec.encode(Said(*w)) for key, w in zip(keys, windows, strict=True)}
        return self.read(keys)


@pytest.fixture
def pair() -> Pair:
    return pair_of(metaspace(size=90), byte_bpe(350), max_length=24)


def cached(pair: Pair, top_k: int = 12, storage: str = "float32", loaded: bool = True):
    memory = Memory(len(pair.vocabulary.segments), top_k, storage)
    return CachedTeacher(pair.frozen() if loaded else None, memory), RememberingCollator(pair.collator(), memory)


def equal(a: TeacherSignal, b: TeacherSignal) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in NUMBERS)


def test_asked_once_it_says_the_same_for_ever(pair):
    teacher, collate = cached(pair)
    windows = pair.encoder.windows(STORIES)
    assert len(windows) > 3
    first = collate(windows)
    assert first.signal is None and int((first.depth > 0).sum()) > 0
    said = teacher.signal(first)
    assert equal(said, pair.frozen().signal(pair.collator()(windows), 12))
    alone = CachedTeacher(None, teacher.memory)
    assert equal(alone.signal(collate(windows)), said) and equal(alone.signal(first), said)
    assert teacher.memory.kept == len(windows)
    with pytest.raises(AssertionError, match="not loaded"):
        alone.signal(collate(pair.encoder.windows(["other text"])))


def chosen_by_teacher(pair: Pair, teacher: CachedTeacher, share: float) -> DistillationFramework:
    """A framework that learns KD at a share of the positions; its student is the same every time."""
    config = LossConfig(select_by="teacher_entropy", top_k=12)
    curriculum = CurriculumConfig(kd=Term(0.7), lm=Term(0.3), select=share)
    scheduler = CurriculumScheduler(curriculum, config, 10)
    return DistillationFramework(copy.deepcopy(pair.student), teacher, pair.vocabulary, config, scheduler)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_rows_that_the_teachers_entropy_does_not_choose_are_not_stored(pair, share):
    """KD and its gradient at a share of the positions are those of the running teacher, in a fraction of the bytes."""
    windows = pair.encoder.windows(STORIES)
    projection = Projection(pair.vocabulary, "span", 1e-3)
    stores = [Memory(len(pair.vocabulary.segments), 12) for _ in range(2)]
    losses, gradients, skipped = [], [], []
    for memory, rows in zip(stores, (None, RowsByEntropy(projection, share)), strict=True):
        for teacher in (CachedTeacher(pair.frozen(), memory, rows), CachedTeacher(None, memory, rows)):
            framework = chosen_by_teacher(pair, teacher, share)
            output = framework(RememberingCollator(pair.collator(), memory, is_learned=True)(windows), 3)
            output.loss.backward()
            losses.append(output.loss.detach())
            skipped.append(output.terms["kd"].skipped)
            gradients.append(torch.cat([p.grad.flatten() for p in framework.student.parameters()]))

    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    assert all(count == skipped[0] for count in skipped)
    whole, thin = (sum(map(len, memory.windows.values())) for memory in stores)
    assert thin < (share + 0.25) * whole


def test_of_windows_that_are_measured_on_all_rows_are_stored(pair):
    memory = Memory(len(pair.vocabulary.segments), 12)
    rows = RowsByEntropy(Projection(pair.vocabulary, "span", 1e-3), 0.1)
    windows = pair.encoder.windows(STORIES)
    said = CachedTeacher(pair.frozen(), memory, rows).signal(RememberingCollator(pair.collator(), memory)(windows))
    assert equal(said, pair.frozen().signal(pair.collator()(windows), 12))


def test_windows_may_come_back_in_other_batches(pair):
    teacher, collate = cached(pair)
    windows = pair.encoder.windows(STORIES)
    teacher.signal(collate(windows))
    chosen = [windows[2], windows[0]]
    batch = collate(chosen)
    exact = pair.frozen().signal(pair.collator()(chosen), 12)
    assert batch.signal is not None and torch.equal(batch.signal.ids, exact.ids)
    inside = torch.cat([torch.arange(len(w["teacher_ids"])) < len(w["teacher_ids"]) - 1 for w in chosen])
    for name in ("log_probs", "log_tail", "log_mass"):
        assert torch.allclose(getattr(batch.signal, name), getattr(exact, name), atol=1e-5)
    # what follows the last token of a window is another window's, and nothing reads it
    assert torch.allclose(batch.signal.realised[inside], exact.realised[inside], atol=1e-5)


@pytest.mark.parametrize("storage", ["float32", "compact"])
def test_the_loss_is_that_of_the_running_teacher_and_the_same_read_or_computed(pair, storage):
    teacher, collate = cached(pair, storage=storage)
    online = pair.framework({"kd": 0.7, "span": 0.2, "lm": 0.3}, top_k=12)
    offline = DistillationFramework(pair.student, teacher, pair.vocabulary, online.loss_config, online.curriculum)
    windows = pair.encoder.windows(STORIES)
    losses = [framework(collate(windows), 3).loss for framework in (online, offline, offline)]
    assert losses[1] == losses[2] and teacher.memory.kept == len(windows)
    if storage == "float32":
        assert losses[0] == losses[1]
    assert torch.allclose(losses[0], losses[1], rtol=1e-2)
    compared = [framework.compare(collate(windows)) for framework in (online, offline)]
    assert compared[0]["count"] == compared[1]["count"] and compared[0]["agree"] == compared[1]["agree"]


def test_hidden_states_come_from_the_running_teacher_beside_a_remembered_signal():
    pair = pair_of(byte_bpe(300), byte_bpe(350), max_length=24, router=RouterConfig())
    teacher, collate = cached(pair)
    windows = pair.encoder.windows(STORIES)
    exact = pair.frozen().signal(pair.collator()(windows), 12, [1])
    for _ in range(2):
        said = teacher.signal(collate(windows), layers=[1])
        assert equal(said, exact) and torch.equal(said.hidden[0], exact.hidden[0])
    assert teacher.memory.kept == len(windows)
    assert teacher.signal(collate(windows)).hidden is None


def test_reading_can_wait_until_it_is_asked_for(pair):
    teacher, collate = cached(pair)
    late = RememberingCollator(pair.collator(), teacher.memory, ahead=False)
    windows = pair.encoder.windows(STORIES)
    said = teacher.signal(collate(windows))
    assert late(windows).signal is None
    assert equal(CachedTeacher(None, teacher.memory).signal(late(windows)), said)
