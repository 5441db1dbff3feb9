"""Several processes of one run: who goes first, and how a failure in one of them ends them all with its reason."""

import logging
import pickle
from collections.abc import Callable
from typing import Any

import torch.distributed
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.environment import get_int_from_env
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

log = logging.getLogger(__name__)

RANK_VARIABLES = ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"]
"""Variables in which launchers (torchrun, Intel MPI, Open MPI, MVAPICH) tell a process its number."""


def rank() -> int:
    """Return this process's number in the run; from the launcher's variables, so also before accelerate is set up."""
    return get_int_from_env(RANK_VARIABLES, 0)


def on_main_process(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Run `action` in the main process alone, and return its result in every process.

    An exception is raised in every process too: the others must not wait for one that is gone.
    """
    if accelerator.num_processes == 1:
        return action()

    value = None
    error = None
    if accelerator.is_main_process:
        try:
            value = action()
        except Exception as raised:
            error = raised

    # Also after a failure: the others wait in this broadcast, and learn from it that there was one.
    value, sent_error = broadcast_object_list([(value, _portable(error))])[0]

    # the main process raises its own exception, with its traceback
    if error is not None:
        raise error
    if sent_error is not None:
        raise sent_error
    return value


def main_process_first(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Run `action` in every process and return each one's result.

    The main process goes first: the others find what it wrote to caches.
    """
    results: list[Any] = []

    # returns nothing: the result, a data set for example, is not to be sent to the others
    def remember_result() -> None:
        results.append(action())

    on_main_process(accelerator, remember_result)
    return results[0] if results else action()


def leave() -> None:
    """Close the connections to the other processes, when nothing is left to tell them.

    Left open, the threads that serve them still run while the interpreter is taken down, and may take the process with
    them: a run that is done would end as one that failed. After a failure they stay open: others may still wait.
    """
    if not torch.distributed.is_initialized():
        return

    try:
        torch.distributed.destroy_process_group()
    except RuntimeError as error:  # the run has ended as it has ended
        log.warning("the connections to the other processes did not close: %s", error)


def tell_launcher(error: BaseException) -> None:
    """Leave the reason where torchrun looks for it, which then names it as the cause when it ends the other processes.

    Call it while the exception is handled. Without torchrun it does nothing.
    """
    get_error_handler().record_exception(error)


def _portable(error: Exception | None) -> Exception | None:
    """Return the exception, or one that says the same if it cannot be sent."""
    try:
        # both ways: an exception whose constructor takes other arguments than its message fails at the second
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
