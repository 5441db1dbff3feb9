"""The Trainer for those who use transformers' one: the same steps as the own loop, checkpoints, evaluation."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from transformers import get_scheduler

from models.config import CurriculumConfig, LossConfig, RouterConfig, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.teacher.frozen import FrozenTeacher
from models.text.collate import PairCollator
from tests.models.tiny import STORIES, byte_bpe, pair_of, tiny_llama
from tests.toy import toy_config
from utils.data.batch_order import permutation
from utils.errors import UserError
from utils.logs.records import read_metrics
from utils.logs.step_logger import StepLogger
from utils.parallel.accelerator import build_accelerator
from utils.training.distillation_trainer import DistillationTrainer
from utils.training.loop import fit
from utils.training.options import LoopOptions


@pytest.fixture(scope="module")
def pair():
    return pair_of(byte_bpe(280), byte_bpe(330), max_length=40)


@pytest.fixture(scope="module")
def windows(pair):
    """Windows of different lengths."""
    texts = [story[start : start + 7 * start + 12] for start in (2, 4, 6) for story in STORIES]
    cut = [pair.encoder.windows([text])[0] for text in texts][:11]
    assert len({len(window["student_ids"]) for window in cut}) > 3
    return cut


def fresh_framework(pair, steps: int, **terms: Term) -> DistillationFramework:
    """A new student, of which embedding and head are one tensor."""
    loss = LossConfig(temperature=2.0, top_k=32)
    scheduler = CurriculumScheduler(CurriculumConfig(**terms), loss, steps)
    student = tiny_llama(280, seed=3, num_hidden_layers=2, tie_word_embeddings=True)
    teacher = FrozenTeacher(pair.teacher, pair.vocabulary)
    return DistillationFramework(student, teacher, pair.vocabulary, loss, scheduler, RouterConfig())


def arguments(folder: Path, **options) -> transformers.TrainingArguments:
    """Arguments of a short run on the CPU."""
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "learning_rate": 0.01,
        "weight_decay": 0.01,
        "adam_beta2": 0.95,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **(defaults | options))


def weights(framework: DistillationFramework) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in framework.state_dict().items()}


def test_it_does_what_the_own_loop_does(pair, windows, tmp_path):
    """Any cut of the steps gives the same, the short last one too; micro-batches hold different numbers of tokens."""
    in_order = [windows[i] for i in permutation(len(windows), 0, 0)]
    config = toy_config(
        batch_size=2,
        gradient_accumulation_steps=2,
        epochs=1,
        learning_rate=0.01,
        scheduler="linear",
        warmup_ratio=0,
        seed=0,
    )
    by_loop = fresh_framework(pair, 3)
    logger = StepLogger(tmp_path / "loop", 3, 1)
    accelerator = build_accelerator("no", cpu=True)
    fit(by_loop, windows, pair.collator(), config, accelerator=accelerator, options=LoopOptions(logger=logger))
    logger.close()
    losses = [record["loss"] for record in read_metrics(tmp_path / "loop" / "metrics.jsonl")]
    assert len(losses) == 3

    for micro_batch, accumulation in ((1, 4), (2, 2), (4, 1)):
        framework = fresh_framework(pair, 3)
        optimizer = torch.optim.AdamW(framework.parameter_groups(0.01, weight_decay=0.01), betas=(0.9, 0.95))
        trainer = DistillationTrainer(
            model=framework,
            args=arguments(
                tmp_path / str(micro_batch),
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=accumulation,
                train_sampling_strategy="sequential",
            ),
            train_dataset=in_order,
            data_collator=pair.collator(),
            optimizers=(optimizer, get_scheduler("linear", optimizer, 0, 3)),
        )
        trainer.train()

        logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        assert logged == pytest.approx(losses, rel=1e-4)
        for name, value in by_loop.state_dict().items():
            torch.testing.assert_close(framework.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("terms", [{}, {"feat": Term(0.3), "attn": Term(0.2)}], ids=["head", "hidden states"])
def test_a_resumed_run_ends_as_one_in_one_piece(pair, windows, tmp_path, terms):
    """Weights, tied ones and the router's too, optimizer, schedule and the order of the windows."""
    collate = PairCollator(pair.vocabulary, pair.encoder.end_of_text, 16, RouterConfig() if terms else None)

    def run(folder: Path, **options) -> DistillationFramework:
        framework = fresh_framework(pair, 6, **terms)
        trainer = DistillationTrainer(
            model=framework,
            args=arguments(folder, num_train_epochs=2, save_strategy="steps", save_steps=4),
            train_dataset=windows,
            data_collator=collate,
        )
        trainer.train(**options)
        assert trainer.state.global_step == 6
        return framework

    whole = weights(run(tmp_path / "run"))
    resumed = weights(run(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4")))

    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


def test_a_checkpoint_is_a_student_that_transformers_loads(pair, windows, tmp_path):
    framework = fresh_framework(pair, 3)
    trainer = DistillationTrainer(
        model=framework,
        args=arguments(tmp_path, save_strategy="steps", save_steps=3),
        train_dataset=windows,
        data_collator=pair.collator(),
    )
    trainer.train()

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    for name, value in framework.student.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_the_best_checkpoint_is_loaded_at_the_end(pair, windows, tmp_path):
    framework = fresh_framework(pair, 3)
    trainer = DistillationTrainer(
        model=framework,
        args=arguments(
            tmp_path,
            learning_rate=0.3,  # which makes the student worse
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=1,
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="bits_per_byte",
            greater_is_better=False,
        ),
        train_dataset=windows,
        eval_dataset=windows[:4],
        data_collator=pair.collator(),
    )
    trainer.train()

    evaluated = [record["eval_bits_per_byte"] for record in trainer.state.log_history if "eval_loss" in record]
    assert len(evaluated) == 3 and trainer.state.best_metric == min(evaluated)
    assert trainer.evaluate()["eval_bits_per_byte"] == pytest.approx(min(evaluated), rel=1e-6)


def test_the_student_is_evaluated_over_the_whole_text(pair, windows, tmp_path):
    """Not as a mean of the batches' means, which hold different numbers of tokens."""
    framework = fresh_framework(pair, 3)
    options = {"train_dataset": windows, "eval_dataset": windows, "data_collator": pair.collator()}
    trainer = DistillationTrainer(model=framework, args=arguments(tmp_path, per_device_eval_batch_size=3), **options)
    measured = trainer.evaluate()

    nats, tokens, size = 0.0, 0, 0
    for window in windows:
        batch = pair.collator()([window])
        inputs, labels = batch.scored("student")
        with torch.no_grad():
            logits = framework.student(**inputs).logits.double()
        is_scored = labels != -100
        chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        nats -= float(chosen[is_scored].sum())
        tokens += int(is_scored.sum())
        size += int(batch.bytes.sum())

    assert measured["eval_tokens"] == tokens
    assert measured["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert measured["eval_bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)


def test_mistakes_are_refused(pair, windows, tmp_path):
    with pytest.raises(UserError, match="got a LlamaForCausalLM as model, expected a DistillationFramework"):
        DistillationTrainer(model=pair.student, args=arguments(tmp_path), data_collator=pair.collator())
    with pytest.raises(UserError, match="no data_collator, expected a PairCollator"):
        DistillationTrainer(model=fresh_framework(pair, 3), args=arguments(tmp_path), train_dataset=windows)

    trainer = DistillationTrainer(
        model=fresh_framework(pair, 3), args=arguments(tmp_path), train_dataset=windows, data_collator=pair.collator()
    )
    with pytest.raises(UserError, match="expected an eval_dataset"):
        trainer.evaluate()
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(UserError, match=r"got no model\.safetensors, expected a checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("name", ["gradient_checkpointing", "neftune_noise_alpha", "label_smoothing_factor"])
def test_arguments_that_reach_into_a_model_are_refused(pair, windows, tmp_path, name):
    options = {"args": arguments(tmp_path, **{name: 1}), "train_dataset": windows, "data_collator": pair.collator()}
    with pytest.raises(UserError, match=f"got {name}=.*, which a framework does not have"):
        DistillationTrainer(model=fresh_framework(pair, 3), **options)


def test_several_texts_are_evaluated_by_name_and_a_chosen_optimizer_is_taken(pair, windows, tmp_path):
    trainer = DistillationTrainer(
        model=fresh_framework(pair, 3),
        args=arguments(tmp_path),
        train_dataset=windows,
        eval_dataset={"first": windows[:2], "rest": windows[2:]},
        data_collator=pair.collator(),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.01}),
    )
    assert {"eval_first_loss", "eval_rest_bits_per_byte"} <= trainer.evaluate().keys()
    assert isinstance(trainer.create_optimizer(), torch.optim.SGD)
