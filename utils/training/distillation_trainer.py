"""A `transformers.Trainer` for a `DistillationFramework`, for those who have a script around `Trainer` already."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from ..errors import UserError
from ..evaluation import scores

ROUTER_WEIGHTS = "router.safetensors"
"""File in a checkpoint, beside the student's, if the framework has a router."""

WHOLE_FILE = "1TB"
"""Shards of this size: the student's weights are one file, which can be read into a model that is there."""


class DistillationTrainer(Trainer):
    """A Trainer whose steps are those of the project's own loop, however a step is cut into micro-batches.

    `model` is a `DistillationFramework`, `train_dataset` (and `eval_dataset`) are windows of a `PairEncoder` and
    `data_collator` is a `PairCollator`. Weight decay and learning rates of the router come from the framework, unless
    `optimizers` are given. A checkpoint holds the student as transformers saves it, so that each can be loaded by
    `from_pretrained`; a run that is resumed from one goes on as if it had never stopped. `evaluate` measures loss,
    perplexity and bits per byte of the student.

    Raises:
        UserError: the model is no framework, or a launcher shards it (FSDP, DeepSpeed), which `train.py` can do.
    """

    def __init__(self, *args: Any, data_collator: Callable[[Sequence[Mapping]], Any] | None = None, **kwargs: Any):
        if data_collator is None:
            raise UserError("DistillationTrainer: got no data_collator, expected a PairCollator")
        _refuse_arguments(kwargs.get("args"))

        super().__init__(*args, data_collator=_OneInput(data_collator), **kwargs)
        # of the framework's forward Trainer knows no column, and would drop them all
        self.args.remove_unused_columns = False
        # the loss is divided by the counts of the whole step already
        self.model_accepts_loss_kwargs = True

        if not hasattr(self.model, "parameter_groups"):
            raise UserError(
                f"DistillationTrainer: got a {type(self.model).__name__} as model, expected a DistillationFramework"
            )
        if self.model.curriculum.uses_own_text:
            raise UserError(
                "DistillationTrainer: got a curriculum.on_policy above 0, and Trainer has no place to write between "
                "two steps: leave it at 0, or train with `fit` and LoopOptions(rounds=...)"
            )
        if self.model.curriculum.opens_text:
            raise UserError(
                "DistillationTrainer: got a curriculum.open_text below 1, and Trainer draws from all windows: leave it "
                "at 1, or train with `fit` and LoopOptions(pacing=...)"
            )
        if self.model.curriculum.uses_statistics:
            raise UserError(
                "DistillationTrainer: got curriculum.balance or sample_weights, which need sums over the steps before, "
                "and Trainer keeps none: leave them out, or train with `fit`"
            )
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise UserError(
                f"DistillationTrainer: got {self.accelerator.distributed_type.value}, expected one process or DDP. "
                "train.py shards a student."
            )

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a framework has a loss, and no predictions.

        Raises:
            UserError: always.
        """
        raise UserError("predict: got a DistillationFramework, which predicts nothing. Call trainer.model.student.")

    # ------------------------------------------------------------------------------------ a step

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Return the micro-batches of an optimizer step, and the items of every term in all of them.

        The items are summed over processes too: every term of the loss is a sum that is divided once.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        terms = sorted(batches[0]["batch"].counts) if batches else []
        items = [sum(inputs["batch"].counts[term] for inputs in batches) for term in terms]

        counts = torch.tensor(items, device=device)
        total = self.accelerator.reduce(counts).tolist()
        return batches, dict(zip(terms, total, strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: dict[str, int] | None = None,
    ) -> Any:
        """Return a micro-batch's share of the step's loss."""
        batch = inputs["batch"].to(self.args.device)
        output = model(batch, self.state.global_step, counts=num_items_in_batch)
        # DDP averages over processes, and the sum is wanted
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer that `args.optim` names, on the framework's parameter groups."""
        if self.optimizer is None:
            chosen = self.optimizer_cls_and_kwargs
            kind, options = chosen or self.get_optimizer_cls_and_kwargs(self.args, self._framework)
            groups = self._framework.parameter_groups(self.args.learning_rate, self.args.weight_decay)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    # --------------------------------------------------------------------------------- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the student on held-out windows, in float32: nats per token, perplexity, bits per byte.

        Trainer's own evaluation would average means of batches.
        """
        windows = self.eval_dataset if eval_dataset is None else eval_dataset
        if windows is None:
            raise UserError("evaluate: got no windows, expected an eval_dataset here or when the trainer was made")

        # Several texts by name, as Trainer takes them.
        if isinstance(windows, dict):
            of_all: dict[str, float] = {}
            for name, part in windows.items():
                of_all |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return of_all

        student = self._framework.student
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        size = self.args.per_device_eval_batch_size
        mine = range(rank, len(windows), processes)

        def batches() -> Iterator[tuple[dict[str, Tensor], Tensor, int]]:
            for start in range(0, len(mine), size):
                inputs = self.data_collator([windows[i] for i in mine[start : start + size]])
                model_inputs, labels = inputs["batch"].scored("student")
                yield model_inputs, labels, int(inputs["batch"].bytes.sum())

        measured = scores.evaluate(student, batches(), self.args.device, self.accelerator)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -------------------------------------------------------------------------------- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the student as `save_pretrained` does, which knows tied weights, and the router beside it."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)

        framework = self._framework
        framework.student.save_pretrained(folder, max_shard_size=WHOLE_FILE)
        if framework.router is not None:
            save_file(framework.router.state_dict(), folder / ROUTER_WEIGHTS)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read student and router into the framework that is there."""
        folder = Path(resume_from_checkpoint)
        framework = self._framework
        if hasattr(framework.student, "peft_config"):
            _load_adapter(framework.student, folder)
        else:
            _require(folder / SAFE_WEIGHTS_NAME)
            load_model(framework.student, folder / SAFE_WEIGHTS_NAME)

        if framework.router is not None:
            _require(folder / ROUTER_WEIGHTS)
            framework.router.load_state_dict(load_file(folder / ROUTER_WEIGHTS))

    def _load_best_model(self) -> None:
        """Go back to the checkpoint with the best metric (`load_best_model_at_end`)."""
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    @property
    def _framework(self) -> Any:
        """The framework without what accelerate has wrapped around it."""
        return self.accelerator.unwrap_model(self.model)


class _OneInput:
    """A collator whose batches are one input by name, as Trainer needs them."""

    def __init__(self, collate: Callable[[Sequence[Mapping]], Any]) -> None:
        self.collate = collate

    def __call__(self, windows: Sequence[Mapping]) -> dict[str, Any]:
        return {"batch": self.collate(windows)}


def _refuse_arguments(arguments: TrainingArguments | None) -> None:
    """Refuse arguments that Trainer carries out on a model's own embeddings, config or loss.

    Raises:
        UserError: with what to do in their place.
    """
    remedies = {
        "gradient_checkpointing": "call student.gradient_checkpointing_enable() before the framework is made",
        "neftune_noise_alpha": "leave it out",
        "label_smoothing_factor": "leave it out: the teacher's distributions smooth the labels",
    }
    for name, remedy in remedies.items():
        value = getattr(arguments, name, None)
        if value:
            raise UserError(f"DistillationTrainer: got {name}={value}, which a framework does not have; {remedy}.")


def _load_adapter(student: nn.Module, folder: Path) -> None:
    """Read the weights of an adapter into a student that has one."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(student, load_peft_weights(str(folder)))


def _require(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file.parent}: got no {file.name}, expected a checkpoint of a DistillationTrainer")
