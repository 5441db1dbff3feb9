"""A run's surroundings: device, processes, folder, log and the signal to stop, from its first check to its end."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

from ..config.plain import to_plain
from ..config.protocols import RunConfig
from ..config.unused_settings import unused_settings
from ..errors import UserError
from ..logs.console import setup_logging
from ..logs.progress import Progress
from ..machine import hardware, kernels
from ..machine.launcher import rank
from ..machine.stop_signals import Interrupted, StopSignal
from ..on_policy.sampling import Engine
from ..parallel.accelerator import build_accelerator
from ..parallel.processes import main_process_first, on_main_process
from ..run_layout import CHECKPOINTS, STUDENT
from ..training.checkpoints import CheckpointStore
from . import folder as run_folder
from . import requirements, upload
from .exit_codes import EXIT_CODES

log = logging.getLogger("train")

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """Surroundings that every stage of a run needs."""

    asked: RunConfig
    """The settings as the user gave them, with names that stand for models, and `auto`: what config.yaml holds."""
    accelerator: Accelerator
    stop: StopSignal
    notes: dict[str, str]
    """What was decided for this run, and why; written into config.yaml."""
    progress: Progress
    """The display, and the time that the whole command still takes."""
    engine: Engine | None = None
    """Writes the student's own text; None: transformers does."""

    @classmethod
    def start(cls, config: RunConfig, recipe: str, stop: StopSignal) -> "Session":
        """Choose device, precision and processes; check machine and folder; begin the log.

        Args:
            recipe: where the settings come from, for the log: a line on the recipe, and one on the curriculum if any.

        Raises:
            UserError: this machine cannot do what was asked for, or the folder is not one to write to.
        """
        # before the device is used for the first time
        allocator = hardware.configure_allocator()
        device = hardware.choose_device()

        # One process starts a Python on each GPU, not each process; where it fails, its launcher ends the others.
        if rank() == 0 and (remedy := kernels.check_kernels()):
            raise UserError(remedy)
        requirements.check(config, device.value)

        # Precision and processes follow from the device, and everything after them from the processes.
        output = Path(config.output_dir)
        precision = hardware.choose_precision(config.training.mixed_precision, device.value)
        accelerator = build_accelerator(
            precision.value,
            cpu=device.value.type == "cpu",
            track=config.logging.track,
            folder=output,
        )

        # One process writes, so one process looks; a refusal is raised in all of them.
        def check_folders() -> None:
            run_folder.check(output, to_plain(config), config.resume)
            CheckpointStore(output / CHECKPOINTS).check_path(config.resume)
            upload.check(config.hub, output / STUDENT, config.student)

        on_main_process(accelerator, check_folders)

        # The folder is this run's now, and the log goes there.
        setup_logging(output, main_process=accelerator.is_main_process)
        for line in recipe.splitlines():
            log.info("%s", line)
        for line in unused_settings(config):
            log.warning("%s", line)
        backend = hardware.configure_backends(device.value)
        if allocator is not None and device.value.type == "cuda":
            backend.append(allocator)
        log.info(
            "device %s: %s; mixed precision %s: %s", device.value, device.reason, precision.value, precision.reason
        )
        notes = {
            "recipe": recipe.partition("\n")[0],
            "device": f"{device.value}: {device.reason}",
            "mixed precision": f"{precision.value}: {precision.reason}",
            "backend": "; ".join(backend) or "defaults",
        }
        if choice := recipe.partition("\n")[2]:
            notes["curriculum"] = choice.removeprefix("curriculum ")
        progress = Progress(deadline=stop.deadline, check=stop.check, shown=accelerator.is_main_process)
        return cls(config, accelerator, stop, notes, progress)

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.asked.output_dir)

    @property
    def is_main(self) -> bool:
        """True in the process that writes files."""
        return self.accelerator.is_main_process

    def continue_log(self) -> None:
        """Write to this run's log again, after another run of the same process had it."""
        setup_logging(self.output, main_process=self.is_main)

    def on_main(self, action: Callable[[], T]) -> T:
        """Return in every process what `action` returns in the main one."""
        return on_main_process(self.accelerator, action)

    def main_first(self, action: Callable[[], T]) -> T:
        """Return what `action` returns in each process; the main one goes first and leaves caches behind."""
        return main_process_first(self.accelerator, action)

    def reason_to_stop(self) -> str | None:
        """Return why the run was asked to end, the same in every process; None: it was not."""
        return self.on_main(self.stop.requested)

    def raise_if_interrupted(self) -> None:
        """End here if a signal has come.

        Raises:
            Interrupted: a signal has come.
        """
        if (reason := self.reason_to_stop()) in EXIT_CODES:
            raise Interrupted(reason)

    def write_config(self) -> None:
        """Write config.yaml: what was asked for, and the notes."""
        if self.is_main:
            run_folder.write_config(self.output, to_plain(self.asked), self.notes)
