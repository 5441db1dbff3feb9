"""A student that learns from its own text: what it computes depends on nothing but seed, steps and slots."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from models.config import CurriculumConfig, Ramp, Term
from models.distillation import Distillation, Method
from models.text.collate import PairCollator
from tests.gloo import launch
from tests.models.tiny import byte_bpe, tiny_llama
from tests.toy import StopAfter, digest, toy_config
from utils.config.settings import OnPolicyConfig
from utils.errors import UserError
from utils.logs.progress import Progress
from utils.logs.records import is_own_text, read_metrics
from utils.logs.step_logger import StepLogger
from utils.machine.stop_signals import Interrupted
from utils.on_policy.round_files import RoundFiles
from utils.on_policy.rounds import RoundMaterial, Rounds, Slot
from utils.parallel.accelerator import build_accelerator
from utils.parallel.processes import on_main_process
from utils.training.checkpoints import CheckpointStore
from utils.training.distillation_trainer import DistillationTrainer
from utils.training.loop import FitResult, fit
from utils.training.options import LoopOptions
from utils.training.plan import Plan

STEPS = 7
TEXTS = [
    f"Once there was a {animal} who {deed}."
    for animal in ("cat", "dog")
    for deed in ("sat", "ran", "sang", "ate", "slept", "swam")
]
LENGTHS = {"every": 3, "prompt_tokens": 6, "new_tokens": 8}


def pair_for(share, dropout: float = 0.2) -> Distillation:
    tokenizers = {"student": byte_bpe(300), "teacher": byte_bpe(400)}
    curriculum = CurriculumConfig(kd=Term(0.7), lm=Term(0.3), on_policy=share)
    student, teacher = tiny_llama(300, 1, attention_dropout=dropout), tiny_llama(400, 2)
    return Distillation.from_models(student, teacher, tokenizers, 16, method=Method(curriculum=curriculum))


def run(
    folder: Path | None,
    share=0.5,
    *,
    stop: StopAfter | None = None,
    accumulation: int = 2,
    accelerator=None,
    progress: Progress | None = None,
    save_every: int = 2,
    **changed,
) -> tuple[str, FitResult, Rounds]:
    """One session of a run, which goes on with what the folder holds; the hash of the student, and what it did."""
    accelerator = accelerator or build_accelerator("no", cpu=True)
    pair = pair_for(share, changed.pop("dropout", 0.2))
    windows = pair.windows(TEXTS)

    config = toy_config(
        batch_size=4 // accumulation // accelerator.num_processes,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=1e-2,
        save_every=save_every,
    )

    framework = pair.framework(STEPS)
    material = RoundMaterial(
        pair=pair,
        windows=windows,
        collate=pair.collate,
        module=framework,
        share=framework.curriculum.on_policy,
        seed=config.seed,
        accelerator=accelerator,
    )

    store = None if folder is None else CheckpointStore(folder / "checkpoints")
    lengths = OnPolicyConfig(**LENGTHS | changed.pop("lengths", {}))
    rounds = Rounds(
        lengths,
        material,
        files=None if folder is None else RoundFiles(folder / "rounds", lengths.of_texts),
        kept_steps=tuple if store is None else store.steps,
        progress=progress,
        **changed,
    )

    logger = StepLogger(folder, STEPS, 1, main_process=accelerator.is_main_process)
    options = LoopOptions(
        logger=logger,
        checkpoints=store,
        resume_from=None if store is None else on_main_process(accelerator, store.resume_point),
        rounds=rounds if share else None,
        stop=stop,
    )

    result = fit(framework, windows, pair.collate, config, accelerator=accelerator, options=options)
    logger.close()
    return digest(framework), result, rounds


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "rounds").iterdir())


def own_records(folder: Path) -> list[dict]:
    """Records of rounds, without what depends on the clock."""
    records = [record for record in read_metrics(folder / "metrics.jsonl") if is_own_text(record)]
    return [{name: value for name, value in record.items() if "second" not in name} for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    weights, result, _ = run(folder)
    assert result.stopped_by == "finished"
    return weights, folder


def test_every_round_is_logged_once_with_its_figures(whole):
    records = own_records(whole[1])
    assert [record["step"] for record in records] == [0, 3, 6]
    # the fifth step has the two windows that are left of the epoch
    assert sum(record["texts"] for record in records) == 13
    for record in records:
        assert abs(record["share"] - 0.5) < 0.1 and 0 < record["tokens"] <= 8
        assert record["teacher_bits_per_byte"] > 0 and record["kl_nats_per_token"] > 0
    steps = [record for record in read_metrics(whole[1] / "metrics.jsonl") if "terms" in record]
    assert all(record["own_tokens"] > 0 for record in steps)


def test_the_student_learns_from_other_text_than_without_it(whole):
    assert run(None, share=0.0)[0] != whole[0]


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_that_goes_on_learns_from_the_same_text(step, whole, tmp_path):
    """Stopped in the middle of a round, and where one begins."""
    _, result, _ = run(tmp_path, stop=StopAfter(step))
    assert (result.steps, result.stopped_by) == (step, "SIGTERM")
    weights, result, _ = run(tmp_path)
    assert result.resumed_from == step and weights == whole[0]
    assert own_records(tmp_path) == own_records(whole[1])
    assert files_of(tmp_path) == files_of(whole[1])


def test_a_kill_while_the_student_writes_loses_nothing(whole, tmp_path):
    """The second round is ended in its writing; the texts of the round after the newest checkpoint are written anew."""
    written = []

    def check():
        written.append(1)
        if len(written) == 2:
            raise Interrupted("SIGKILL")

    # the process has gone where nothing is saved any more
    _, result, _ = run(tmp_path, progress=Progress(shown=False, check=check), save_every=2)
    assert (result.steps, result.stopped_by) == (3, "SIGKILL")
    CheckpointStore(tmp_path / "checkpoints").steps()
    for path in (tmp_path / "checkpoints").glob("step-00000003"):
        path.rename(tmp_path / "gone")
    assert files_of(tmp_path) == ["step-00000000.json.gz"]

    weights, result, _ = run(tmp_path)
    assert result.resumed_from == 2 and weights == whole[0]


def test_texts_that_are_lost_are_written_anew_which_is_said(whole, tmp_path, caplog):
    run(tmp_path, stop=StopAfter(4))
    file = tmp_path / "rounds" / "step-00000003.json.gz"
    file.write_bytes(file.read_bytes()[:-9])
    _, result, _ = run(tmp_path)
    assert result.stopped_by == "finished"
    assert "are not used (EOFError)" in caplog.text and "writes them anew" in caplog.text


def test_texts_of_other_settings_are_written_anew_behind_their_own_prompts(tmp_path, caplog):
    run(tmp_path, stop=StopAfter(4))
    _, result, rounds = run(tmp_path, lengths={"prompt_tokens": 2}, stop=StopAfter(1))
    assert result.steps == 5 and "other settings" in caplog.text and "writes them anew" in caplog.text
    text = rounds._shown[1][-1]
    slot = Slot(text["step"], text["number"], text["window"])
    assert len(rounds._prompt(slot).student_ids) <= 2 and rounds._shown[0] == 3


def test_only_texts_that_a_checkpoint_may_need_are_kept(whole):
    """The last two checkpoints are of steps 6 and 7."""
    assert files_of(whole[1]) == ["step-00000003.json.gz", "step-00000006.json.gz"]


def test_a_fresh_run_does_not_learn_from_texts_of_an_earlier_one(whole, tmp_path):
    files = RoundFiles(tmp_path / "rounds")
    files.write(0, [], [])
    files.write(99, [], [])
    assert run(tmp_path, save_every=100)[0] == whole[0]
    assert "step-00000099.json.gz" not in files_of(tmp_path)


def test_micro_batches_change_nothing_but_rounding():
    """Four micro-batches of one window against one of four."""
    parts, together = (run(None, accumulation=count, dropout=0.0)[2] for count in (4, 1))
    texts = [[text["text"] for text in rounds._shown[1]] for rounds in (parts, together)]
    assert texts[0] == texts[1]
    for one, other in zip(*(rounds.material.module.parameters() for rounds in (parts, together)), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def as_prompted(student, prompts, rule, note):
    """An engine that repeats the last token of a prompt, which is whole text, up to the limit."""
    return [[int(prompt.ids[-1])] * len(prompt.uniforms) for prompt in prompts]


def test_a_share_of_one_takes_no_given_text(monkeypatch):
    learned = []
    sound = PairCollator.__call__

    def spy(collator, windows):
        learned.extend(bool(window.get("own")) for window in windows)
        return sound(collator, windows)

    monkeypatch.setattr(PairCollator, "__call__", spy)
    _, result, _ = run(None, share=1.0, engine=as_prompted)
    # one given window tells which terms there are, and the teacher's opinion is asked for as well
    assert result.stopped_by == "finished" and learned.count(False) == 1 and learned.count(True) > 4 * STEPS - 2


def test_a_ramp_from_zero_begins_like_a_run_without(tmp_path):
    """Its first round has no place for a text, and later ones have ever more."""
    _, result, _ = run(tmp_path, share=Ramp(points=[(0, 0), (0.5, 0), (1, 1)]))
    assert result.stopped_by == "finished"
    shares = [(record["step"], record["share"]) for record in own_records(tmp_path)]
    assert [step for step, _ in shares] == [3, 6] and shares[0][1] < shares[1][1]


def test_another_engine_writes_and_learns_what_it_is_asked(tmp_path):
    asked = []

    def engine(student, prompts, rule, note):
        asked.append(prompts)
        assert isinstance(student, torch.nn.Module) and len(rule.stop_ids) == 1
        note(len(prompts))
        return [list(prompt.ids[-1:]) * len(prompt.uniforms) for prompt in prompts]

    _, result, rounds = run(tmp_path, engine=engine)
    assert result.stopped_by == "finished" and sum(map(len, asked)) == 13
    assert all(len(prompt.ids) <= 1 + LENGTHS["prompt_tokens"] for prompts in asked for prompt in prompts)
    assert all(np.all((prompt.uniforms >= 0) & (prompt.uniforms < 1)) for prompt in asked[0])
    examples = rounds.examples(rounds.material.pair.teacher.model)
    assert examples["step"] == 6 and all(text["student"] and text["teacher"] for text in examples["texts"])


def test_a_collapse_ends_the_run_before_it_is_learned_where_that_is_asked_for(tmp_path, caplog):
    lengths = {"every": 8, "stop_on_collapse": True}
    _, result, rounds = run(tmp_path, share=1.0, lengths=lengths, engine=as_prompted)
    assert (result.steps, result.stopped_by) == (0, "collapse")
    assert CheckpointStore(tmp_path / "checkpoints").newest_whole() is not None
    assert caplog.text.count("[RED FLAG]") == len(rounds.signs.warned) >= 1

    # the same command stops again, and one without the setting goes on
    assert run(tmp_path, share=1.0, lengths=lengths, engine=as_prompted)[1].stopped_by == "collapse"
    lengths["stop_on_collapse"] = False
    assert run(tmp_path, share=1.0, lengths=lengths, engine=as_prompted)[1].stopped_by == "finished"


def test_sharded_weights_are_refused(monkeypatch):
    from utils.parallel.engine import FullySharded
    from utils.training import loop

    monkeypatch.setattr(loop, "engine_kind", lambda accelerator: FullySharded)
    with pytest.raises(UserError, match="whole weights to write with"):
        run(None)


def test_a_share_without_anything_that_writes_is_refused(tmp_path):
    """Neither loop learns from given text alone without a word."""
    pair = pair_for(0.5)
    framework, windows = pair.framework(STEPS), pair.windows(TEXTS)
    with pytest.raises(UserError, match=r"LoopOptions\(rounds"):
        fit(framework, windows, pair.collate, toy_config(), accelerator=build_accelerator("no", cpu=True))
    with pytest.raises(UserError, match=r"curriculum.on_policy above 0"):
        DistillationTrainer(
            model=framework,
            args=TrainingArguments(output_dir=str(tmp_path)),
            train_dataset=windows,
            data_collator=pair.collate,
        )


def test_slots_are_those_of_the_plan_whatever_its_micro_batches():
    rounds = run(None, share=0.4)[2]
    config = toy_config(batch_size=1, gradient_accumulation_steps=4, max_steps=STEPS)
    windows = len(rounds.material.windows)
    whole, halves = Plan.of(config, windows), Plan(windows, 2, 4, 2, STEPS)
    assert rounds.slots(whole, 0, STEPS) == rounds.slots(halves, 0, STEPS)
    assert {slot.number for slot in rounds.slots(whole, 0, STEPS)} <= set(range(4))


# ------------------------------------------------------------------------------------------- several processes


def shared(folder: Path) -> dict:
    """Texts, figures and weights of a run without dropout, in however many processes."""
    _, _, rounds = run(folder, dropout=0.0, accumulation=1)
    return {
        "texts": [text["text"] for text in rounds._shown[1]],
        "weights": [parameter.detach().numpy() for parameter in rounds.material.module.parameters()],
    }


def test_two_processes_write_and_learn_what_one_does(tmp_path):
    alone = shared(tmp_path / "alone")
    for process in launch(2, shared, tmp_path / "two"):
        assert process["texts"] == alone["texts"]
        for one, other in zip(process["weights"], alone["weights"], strict=True):
            assert np.allclose(one, other, atol=1e-4)

    for one, other in zip(own_records(tmp_path / "two"), own_records(tmp_path / "alone"), strict=True):
        numbers = {name: value for name, value in other.items() if name != "split"}
        assert {name: one[name] for name in numbers} == pytest.approx(numbers, rel=1e-3)
