"""Several teachers, each with its own tokenizer, mixed on the student's vocabulary."""

import itertools
from collections import defaultdict
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.config import CurriculumConfig, LossConfig, Ramp
from models.distillation import Distillation, Method, TeacherShare
from models.teacher.cached import CachedTeacher
from models.text.mixed_batches import as_pair
from models.types import IGNORE, PairedBatch, SparseTarget
from tests.models.tiny import STORIES, byte_bpe, characters, metaspace, tiny_llama

PLAIN_LOSS = LossConfig(correction="none", top_k=1000, min_prefix_mass=0.0)
"""Loss settings under which a target is a plain sum over all of the teacher's tokens."""

EQUAL = (TeacherShare(), TeacherShare())


@dataclass(frozen=True)
class Text:
    """The settings of a text that `Method.join` needs."""

    rows: tuple[int, ...]
    max_length: int = 48
    conversations: bool = False
    learn_from: str = "completions"
    decoder_starts: None = None
    today: date | None = None
    cache_dir: Path | None = None
    isolate_documents: bool = False

    @property
    def text_starts(self) -> tuple[None, ...]:
        return (None,) * len(self.rows)


@dataclass(frozen=True)
class Several:
    """A student and several teachers."""

    pair: Distillation
    student: torch.nn.Module
    models: list[torch.nn.Module]

    def frozen(self):
        return [member.frozen(model) for member, model in zip(self.pair.members, self.models, strict=True)]

    def framework(self, total_steps: int = 10):
        return self.pair.framework(total_steps, student=self.student, teacher=self.pair.mixture(self.frozen()))

    def batch(self, texts: list[str] = STORIES, routes: tuple[str, ...] = ("a",)) -> PairedBatch:
        """Return all windows of some texts, whose routes take turns."""
        windows = self.pair.encoder.windows(texts)
        for window, route in zip(windows, itertools.cycle(routes), strict=False):
            window["route"] = route
        return self.pair.collate(windows)


def several(shares=EQUAL, mix="weights", loss=PLAIN_LOSS, isolates=False, **curriculum) -> Several:
    """Make a student with two or three tiny teachers of other tokenizers."""
    tokenizers = {"student": byte_bpe(300), "teacher": byte_bpe(400, 1), "teacher_2": metaspace()}
    if len(shares) > 2:
        tokenizers["teacher_3"] = characters()
    models = [tiny_llama(len(tokenizer), seed) for seed, tokenizer in enumerate(tokenizers.values())]
    weights = CurriculumConfig.of_weights({"kd": 1.0, "lm": 0.0, **curriculum})
    method = Method(loss, weights, teachers=tuple(shares), mix=mix)
    pair = method.join(tokenizers, Text(tuple(map(len, tokenizers.values())), isolate_documents=isolates))
    return Several(pair, models[0], models[1:])


def target(setting: Several, batch: PairedBatch, step: int | None = None) -> SparseTarget:
    """Return the mixed target of a batch."""
    module = setting.framework()
    signal = module.ask(batch, step)
    return module.projection(signal, batch)


def dense(target: SparseTarget, vocabulary: int) -> torch.Tensor:
    """Return [N, V + 1] masses in float64; the last one is the bucket."""
    table = torch.zeros(len(target.ids), vocabulary + 1, dtype=torch.float64)
    ids = torch.where(target.ids < 0, vocabulary, target.ids)
    table.scatter_add_(1, ids, target.probs.double())
    table[:, -1] += target.tail
    return table


def reference(member: Distillation, model: torch.nn.Module, windows: list[dict]) -> list[dict]:
    """Return for each window: student position -> masses by student token (None: bucket), token by token in float64."""
    segments = member.vocabulary.segments.tolist()
    batch = member.collate(windows)
    logits = model.double()(batch.teacher_ids, attention_mask=batch.teacher_mask).logits
    model.float()
    student_width, teacher_width = batch.student_ids.shape[1], batch.teacher_ids.shape[1]

    masses: list[dict] = [{} for _ in windows]
    rows = zip(batch.row_student.tolist(), batch.row_teacher.tolist(), batch.depth.tolist(), strict=True)
    for student, teacher, depth in rows:
        window, position = divmod(student, student_width)
        read = batch.student_ids[window, position - depth + 1 : position + 1].tolist()
        probs = logits[window, teacher % teacher_width].softmax(0)

        fitting = [token for token in range(len(probs)) if segments[token][:depth] == read[:depth]]
        total = sum(float(probs[token]) for token in fitting)
        row: dict = defaultdict(float)
        for token in fitting:
            spelt = segments[token][depth] if depth < len(segments[token]) else -1
            row[spelt if spelt >= 0 else None] += float(probs[token]) / total
        masses[window][position] = row

    return masses


def check_against_reference(setting: Several, windows: list[dict], weights: list[float]) -> None:
    """Compare the mixed target of some windows with the plain sum over teachers."""
    batch = setting.pair.collate(windows)
    vocabulary = len(setting.student.get_output_embeddings().weight)
    mixed = dense(target(setting, batch), vocabulary)
    of_teachers = [
        reference(member, model, [as_pair(window, number) for window in windows])
        for number, (member, model) in enumerate(zip(setting.pair.members, setting.models, strict=True))
    ]

    width = batch.student_ids.shape[1]
    places = batch.row_student.tolist()
    both = 0
    for row, place in enumerate(places):
        window, position = divmod(place, width)
        speaking = [
            (w, said[window][position])
            for w, said in zip(weights, of_teachers, strict=True)
            if position in said[window]
        ]
        speaking = [(weight, masses) for weight, masses in speaking if any(token is not None for token in masses)]
        if not speaking:
            continue
        both += len(speaking) == len(weights)
        total = sum(weight for weight, _ in speaking)
        expected = torch.zeros(vocabulary + 1, dtype=torch.float64)
        for weight, masses in speaking:
            for token, mass in masses.items():
                expected[-1 if token is None else token] += weight / total * mass
        assert torch.allclose(mixed[row], expected, atol=2e-6), (row, position)
    assert both > len(places) / 4
    assert len(places) == sum(len({*first, *second}) for first, second in zip(*of_teachers, strict=True))


def test_a_mixture_is_the_weighted_sum_over_the_teachers():
    setting = several([TeacherShare(2.0), TeacherShare(0.5)])
    windows = setting.pair.encoder.windows(STORIES)
    assert len(windows) > 2
    check_against_reference(setting, windows, [2.0, 0.5])


def test_real_teachers_of_different_tokenizers_mix_to_the_weighted_sum(real_models_dir):
    folder = real_models_dir / "models"
    roles = {
        "student": folder / "stories260k-llama",
        "teacher": folder / "tinystories-neo-chat-3m",
        "teacher_2": folder / "babyllama-char-0.9m",
    }
    tokenizers = {role: AutoTokenizer.from_pretrained(path) for role, path in roles.items()}
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in roles.values()]
    rows = tuple(model.get_output_embeddings().weight.shape[0] for model in models)
    loss = replace(PLAIN_LOSS, top_k=max(rows))
    method = Method(loss, CurriculumConfig.of_weights({"kd": 1.0}), teachers=(TeacherShare(), TeacherShare(3.0)))
    pair = method.join(tokenizers, Text(rows, max_length=40))
    setting = Several(pair, models[0], models[1:])
    check_against_reference(setting, pair.encoder.windows(STORIES[:1]), [1.0, 3.0])


def test_every_target_adds_up_to_one():
    setting = several([TeacherShare()] * 3, loss=LossConfig(top_k=8), mix="likelihood")
    mixed = target(setting, setting.batch())
    total = mixed.probs.sum(1) + mixed.tail
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    assert int(mixed.valid.sum()) > 20
    # each token once a row
    for ids in mixed.ids:
        tokens = ids[ids >= 0]
        assert len(tokens) == len(tokens.unique())


@pytest.mark.parametrize("number", [0, 1])
def test_the_only_teacher_with_a_weight_is_passed_on_bit_for_bit(number):
    shares = [TeacherShare(0.0), TeacherShare(0.0)]
    shares[number] = TeacherShare(1.0)
    setting = several(shares, loss=LossConfig(top_k=16))
    batch = setting.batch()
    mixed = target(setting, batch)

    alone = setting.pair.members[number]
    part = batch.mixed.batches[number]
    module = alone.framework(10, student=setting.student, teacher=setting.frozen()[number])
    single = module.projection(module.ask(part), part)
    place = batch.mixed.places[number]
    for name in ("ids", "probs", "tail", "valid"):
        assert torch.equal(getattr(mixed, name)[place], getattr(single, name))
    assert int(mixed.valid.sum()) == int(single.valid.sum()) > 0


def test_a_teacher_without_a_weight_is_not_asked():
    setting = several([TeacherShare(Ramp(((0.0, 1.0), (0.5, 0.0)))), TeacherShare(Ramp(((0.49, 0.0), (0.5, 1.0))))])
    batch = setting.batch()
    module = setting.framework(total_steps=10)
    assert module.ask(batch, 0).teachers == (0,)
    assert module.ask(batch, 9).teachers == (1,)
    assert module.ask(batch, None).teachers == (1,)


class ListsOf:
    """Lists of a model, as a server tells them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.begun = 0
        self.asked = 0

    def begin(self, windows, top_k) -> None:
        self.begun += len(windows)

    @torch.no_grad()
    def lists(self, windows, top_k) -> list[tuple]:
        self.asked += len(windows)
        listed = []
        for window in windows:
            log_probs = self.model(torch.tensor([window])).logits[0, :-1].log_softmax(-1)
            top = log_probs.topk(top_k)
            realised = log_probs.gather(1, torch.tensor(window[1:])[:, None])[:, 0]
            listed.append((top.indices.numpy(), top.values.numpy(), realised.numpy()))
        return listed

    def identity(self) -> dict:
        return {"served": "tiny"}


def with_second_elsewhere(setting: Several, total_steps: int = 10):
    """Return the framework of a setting whose second teacher answers with lists, and where these come from."""
    source = ListsOf(setting.models[1])
    first, second = setting.pair.members
    teacher = setting.pair.mixture([first.frozen(setting.models[0]), second.listed(source)])
    return setting.pair.framework(total_steps, student=setting.student, teacher=teacher), source


@pytest.mark.parametrize("mix", ["weights", "likelihood"])
def test_a_teacher_elsewhere_mixes_as_one_in_this_process(mix):
    setting = several([TeacherShare(2.0), TeacherShare(1.0, ("b",))], mix=mix)
    batch = setting.batch(routes=("a", "b"))
    local, (served, source) = setting.framework(), with_second_elsewhere(setting)
    assert served.ask(batch) is None and source.begun == len(batch.mixed.batches[1].bytes) and source.asked == 0
    assert served(batch).loss.item() == pytest.approx(local(batch).loss.item(), rel=1e-5)
    assert source.asked == source.begun

    vocabulary = len(setting.student.get_output_embeddings().weight)
    signal = served.teacher.signal(batch, 1000)
    ours, theirs = dense(served.projection(signal, batch), vocabulary), dense(target(setting, batch), vocabulary)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_teacher_elsewhere_is_asked_ahead_at_steps_at_which_it_weighs():
    fading = Ramp(((0.0, 1.0), (0.5, 0.0)))
    setting = several([TeacherShare(), TeacherShare(fading)])
    batch = setting.batch()
    module, source = with_second_elsewhere(setting)
    assert module.ask(batch, 9).teachers == (0,) and source.begun == source.asked == 0
    assert module.ask(batch, 0) is None and source.begun == len(batch.bytes)


def test_scheduled_weights_go_from_one_teacher_to_the_other():
    fading = [TeacherShare(Ramp(((0.0, 1.0), (1.0, 0.0)))), TeacherShare(Ramp(((0.0, 0.0), (1.0, 1.0))))]
    setting = several(fading)
    batch = setting.batch()
    vocabulary = len(setting.student.get_output_embeddings().weight)
    first, middle, last = (dense(target(setting, batch, step), vocabulary) for step in (0, 5, 10))
    both = torch.isin(batch.mixed.places[0], batch.mixed.places[1])
    rows = batch.mixed.places[0][both]
    valid = target(setting, batch, 0).valid & target(setting, batch, 10).valid
    rows = rows[valid[rows]]
    assert len(rows) > 10
    assert torch.allclose(middle[rows], (first[rows] + last[rows]) / 2, atol=1e-6)
    assert not torch.allclose(first[rows], last[rows], atol=1e-2)


def test_the_likelier_a_teacher_finds_the_text_so_far_the_more_it_weighs():
    setting = several(mix="likelihood")
    batch = setting.batch()
    vocabulary = len(setting.student.get_output_embeddings().weight)
    mixed = dense(target(setting, batch), vocabulary)
    width = batch.student_ids.shape[1]

    # The plain way: nats of the text before the anchor over the student's tokens before it, for every row.
    log_weights, masses = [], []
    for number, teacher in enumerate(setting.frozen()):
        part, place = batch.mixed.batches[number], batch.mixed.places[number]
        logits = teacher.model(part.teacher_ids, attention_mask=part.teacher_mask).logits.double().log_softmax(-1)
        log_weight = torch.full((len(batch.row_student),), -torch.inf, dtype=torch.float64)
        rows = zip(part.row_student.tolist(), part.row_teacher.tolist(), part.depth.tolist(), place, strict=True)
        for student, anchor, depth, row in rows:
            window, position = divmod(student, width)
            nats = 0.0
            for k in range(anchor % part.teacher_ids.shape[1]):
                label = int(part.teacher_labels[window, k])
                if label != IGNORE:
                    nats -= float(logits[window, k, label])
            read = int((part.labels[window, :position] != IGNORE).sum()) - depth
            log_weight[row] = -nats / read if read else 0.0
        single = several([TeacherShare(float(n == number)) for n in range(2)])
        one = target(single, batch)
        log_weight[~one.valid] = -torch.inf
        log_weights.append(log_weight)
        masses.append(dense(one, vocabulary))

    shares = torch.stack(log_weights).softmax(0)
    expected = sum(share[:, None] * mass for share, mass in zip(shares, masses, strict=True))
    valid = target(setting, batch).valid
    assert torch.allclose(mixed[valid], expected[valid], atol=1e-5)
    # at the beginning of a window nothing is known of anybody
    speaks = torch.stack(log_weights).isfinite().all(0)
    starts = speaks & (batch.row_student % width == 0)
    assert int(starts.sum()) > 0 and torch.allclose(shares[0, starts], torch.tensor(0.5).double(), atol=1e-6)
    assert float(shares[0, speaks].std()) > 0.01


def test_a_teacher_is_asked_about_its_routes_alone():
    setting = several([TeacherShare(), TeacherShare(only_for=("b",))])
    batch = setting.batch(routes=("a", "b"))
    windows = len(batch.student_ids)
    assert windows > 2
    assert batch.mixed.batches[0].student_ids.shape[0] == windows
    assert batch.mixed.batches[1].student_ids.shape[0] == windows // 2

    width = batch.student_ids.shape[1]
    asked = set((batch.row_student[batch.mixed.places[1]] // width).tolist())
    assert asked == {*range(1, windows, 2)}
    setting.framework()(batch, 0).loss.backward()


def test_text_that_is_for_no_teacher_is_learned_by_lm_alone():
    setting = several([TeacherShare(only_for=("b",)), TeacherShare(only_for=("c",))], lm=1.0)
    batch = setting.batch(routes=("a",))
    assert batch.counts["kd"] == 0 and batch.counts["lm"] > 0
    output = setting.framework()(batch, 0)
    assert torch.isfinite(output.loss) and float(output.terms["kd"].sum) == 0
    output.loss.backward()


def test_micro_batches_add_up_to_the_batch():
    setting = several([TeacherShare(2.0), TeacherShare()], lm=0.5, loss=LossConfig(top_k=16))
    windows = setting.pair.encoder.windows(STORIES)
    module = setting.framework()
    whole = setting.pair.collate(windows)
    parts = [setting.pair.collate(windows[:1]), setting.pair.collate(windows[1:])]
    together = module(whole, 0).loss.item()
    apart = sum(module(part, 0, counts=whole.counts).loss.item() for part in parts)
    assert together == pytest.approx(apart, rel=1e-5)


def test_hidden_states_are_those_of_the_first_teacher():
    setting = several([TeacherShare(0.0), TeacherShare()], feat=1.0)
    module = setting.framework()
    batch = setting.batch()
    module.calibrate([batch])
    signal = module.ask(batch, 0)
    assert signal.teachers == (0, 1) and signal.signals[1].hidden is None
    states, expected = signal.hidden, setting.frozen()[0].states(batch.teacher_ids, module.router.teacher_layers)[1]
    assert all(torch.equal(*pair) for pair in zip(states, expected, strict=True))
    output = module(batch, 0, measure=True)
    output.loss.backward()
    assert "span" not in output.terms and output.terms["feat"].sum.item() > 0


def test_agreement_with_a_mixture_is_complete_for_the_mixture_of_the_student_with_itself():
    tokenizers = {"student": byte_bpe(300), "teacher": byte_bpe(300), "teacher_2": byte_bpe(300)}
    student = tiny_llama(300)
    loss = LossConfig(top_k=300)
    method = Method(
        loss, CurriculumConfig.of_weights({"kd": 1.0, "lm": 0.0}), teachers=(TeacherShare(), TeacherShare())
    )
    pair = method.join(tokenizers, Text((300, 300, 300)))
    setting = Several(pair, student, [tiny_llama(300), tiny_llama(300)])
    batch = setting.batch()
    module = setting.framework()
    compared = module.compare(batch)
    assert compared["agree"] == compared["count"] > 0
    assert compared["kl_sum"] == pytest.approx(0, abs=1e-3)
    assert module(batch, 0).loss.item() == pytest.approx(0, abs=1e-5)


def test_windows_are_cut_where_all_tokenizers_agree():
    setting = several([TeacherShare()] * 3)
    text = " ".join(STORIES[:2]) * 3
    windows = setting.pair.encoder.windows([text])
    assert len(windows) > 3
    for window in windows:
        ends = {int(window[f"{side}_ends"][-1]) for side in setting.pair.encoder.side_names}
        assert len(ends) == 1
    assert sum(window["bytes"] + window["left_out"] for window in windows) == len(text.encode())


def test_what_does_not_go_with_several_teachers_is_refused():
    with pytest.raises(ValueError, match="span and several teachers, whose spans"):
        several(span=1.0).framework()
    setting = several()
    single = setting.pair.members[0].collate([as_pair(setting.pair.encoder.windows(STORIES)[0], 0)])
    with pytest.raises(ValueError, match="expected one that a MixedCollator made"):
        setting.framework().ask(single)
    tokenizers = setting.pair.tokenizers
    with pytest.raises(ValueError, match="2 teachers and conversations, expected plain text"):
        setting.pair.method.join(tokenizers, Text((1, 1, 1), conversations=True))
    with pytest.raises(ValueError, match="got none, expected at least one teacher"):
        type(setting.pair.mixture(setting.frozen()))([])


def test_a_batch_and_its_signals_move_together():
    setting = several()
    batch = setting.batch().to("meta")
    assert all(part.student_ids.is_meta for part in batch.mixed.batches)
    assert all(place.is_meta for place in batch.mixed.places)
    signal = setting.framework().ask(setting.batch()).to("meta")
    assert all(part.ids.is_meta for part in signal.signals)


def test_the_members_of_a_mixture_may_be_stores():
    setting = several()
    mixture = setting.pair.mixture(setting.frozen())
    assert mixture.teacher is mixture.members[0].teacher

    class Nothing:
        top_k = 1
        keys = read = keep = None

    stored = setting.pair.mixture([CachedTeacher(None, Nothing()), setting.frozen()[1]])
    assert stored.teacher is None
