"""Several processes of one run: who goes first, and how a failure in one of them ends them all."""

import pickle
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


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


def _portable(error: Exception | None) -> Exception | None:
    """Return the exception, or one that says the same if it cannot be sent."""
    try:
        # both ways: an exception whose constructor takes other arguments than its message fails at the second
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
