"""Training: the loop over optimizer steps, what guards it, and checkpoints.

loop               `fit`: take steps, evaluate, save, stop
options            `LoopOptions`: what `fit` does beside training
plan               `Plan`: how windows become optimizer steps
gradient           the gradient of one optimizer step
step_statistics    sizes of terms and of sample weights in the steps before
optimizer          optimizer, parameter groups, schedule
state              the state of a run, for checkpoints
checkpoints        `CheckpointStore`: save, choose, load
checkpoint_files   files of a checkpoint, their hashes
early_stopping     end a run that no longer becomes better
step_guard         leave out steps that are not finite, count loss spikes
red_flags          `RedFlags`: signs that something is wrong, with the likely cause
out_of_memory      go on in smaller micro-batches, or explain
measurements       numbers of a logged step, seconds
dry_run            try training and evaluation once in small, before a run
distillation_trainer   `DistillationTrainer`: the same steps in a `transformers.Trainer`
"""

from .checkpoints import CheckpointStore
from .loop import FitResult, fit
from .options import LoopOptions
from .plan import Plan
from .red_flags import RedFlags

__all__ = ["CheckpointStore", "FitResult", "LoopOptions", "Plan", "RedFlags", "fit"]
