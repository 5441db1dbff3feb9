"""A process and what launched it: its number in the run, and its end. Nothing here loads torch."""

import logging
import os
import sys
from pathlib import Path

log = logging.getLogger(__name__)

RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Variables in which launchers (torchrun, Intel MPI, Open MPI, MVAPICH) tell a process its number."""


def rank() -> int:
    """Return this process's number in the run; 0 where there is no launcher."""
    for name in RANK_VARIABLES:
        if name in os.environ:
            return int(os.environ[name])
    return 0


def program() -> str:
    """Return how this program was started, for commands that are shown: from a checkout, or installed."""
    is_checkout = Path(sys.argv[0]).name == "train.py"
    return "python train.py" if is_checkout else "curriculum-distill"


def leave() -> None:
    """Close the connections to the other processes, when nothing is left to tell them.

    Left open, the threads that serve them still run while the interpreter is taken down, and may take the process with
    them: a run that is done would end as one that failed. After a failure they stay open: others may still wait.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return

    try:
        distributed.destroy_process_group()
    except RuntimeError as error:  # the run has ended as it has ended
        log.warning("the connections to the other processes did not close: %s", error)


def tell_launcher(error: BaseException) -> None:
    """Leave the reason where torchrun looks for it, which then names it as the cause when it ends the other processes.

    Call it while the exception is handled. Without torchrun it does nothing.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return

    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
