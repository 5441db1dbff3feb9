"""The elementwise work on a chunk of logits, in two passes over its memory.

Shapes: c rows of one chunk, V vocabulary.

Step by step, PyTorch reads and writes a chunk many times: maximum, difference, exponential, sum, product, rounding are
about 36 bytes of traffic for each logit beside its products in bfloat16. On a GPU that computes the products in half
precision the traffic takes longer than they do. `torch.compile` makes one kernel of maximum and sum, which only reads,
and one of the gradient, which reads once and writes once, rounded already; about 18 bytes. The exponentials are
computed twice and never stored.

The kernels need Triton and a GPU of the Volta generation or newer. Anywhere else `fused_head` goes its own way, step
by step, which stays the reference.
"""

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

VOLTA = (7, 0)
"""Compute capability of the oldest GPUs that Triton compiles for."""
MESSAGE_LENGTH = 160
"""Most characters of a compiler's message that are passed on."""


class RowSums(NamedTuple):
    """The softmax of each row in two numbers: log-sum-exp = peak + log(total)."""

    peak: Tensor
    """[c, 1] largest logit; -inf where every logit of the row is."""
    total: Tensor
    """[c, 1] sum of exp(logit - peak)."""


def adjusted(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return logits of any shape, scaled and soft-capped; -inf stays, as the mark of a logit that does not count."""
    if softcap:
        # tanh alone would make a finite number of the mark.
        capped = softcap * torch.tanh(logits * (scale / softcap))
        return torch.where(logits == -torch.inf, logits, capped)
    return logits if scale == 1 else logits * scale


def softcap_slope(logits: Tensor, scale: float, softcap: float | None) -> Tensor | None:
    """Return the derivative of the soft-cap by the scaled logits, 1 - tanh ** 2; None without a cap."""
    if not softcap:
        return None
    return 1 - torch.tanh(logits * (scale / softcap)).square()


def row_sums(logits: Tensor, scale: float, softcap: float | None) -> RowSums:
    """Return peak and sum of exponentials of raw logits [c, V], which are only read."""
    values = adjusted(logits, scale, softcap)
    peak = values.amax(1, keepdim=True)
    total = (values - peak).exp().sum(1, keepdim=True)
    return RowSums(peak, total)


def softmax_gradient(
    logits: Tensor,
    peak: Tensor,
    slope: Tensor,
    out: Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    """Write slope * exp(logit - peak), the chain rule through the soft-cap included, in the dtype of its memory.

    Args:
        logits: [c, V] raw; -inf gives 0.
        peak: [c, 1].
        slope: [c, 1] gradient of the loss by each exponential.
        out: [c, V] memory for it; None: that of the logits.
        scale: factor on the logits.
        softcap: bound of the scaled logits; None: no bound.
    """
    # One expression to the compiler: a single kernel, which reads and writes each logit once.
    values = adjusted(logits, scale, softcap)
    gradient = (values - peak).exp() * slope
    if softcap:
        gradient = gradient * softcap_slope(logits, scale, softcap)

    memory = logits if out is None else out
    memory.copy_(gradient)


@functools.cache
def compiled(function: Callable, for_any_shape: bool = False) -> Callable:
    """Return a function behind `torch.compile`, which compiles at its first call.

    Where the compiler fails the function itself is taken from then on, with a warning: the values are the same.

    Args:
        function: its first argument is a tensor whose number of rows changes from call to call.
        for_any_shape: every dimension of every argument changes, not only the rows of the first.
    """
    # Here, as this module of torch takes long to import.
    from torch._dynamo.exc import TorchDynamoException

    kernel = torch.compile(function, dynamic=True if for_any_shape else None)
    serves = True

    @functools.wraps(function)
    def call(first: Tensor, *rest: Any, **arguments: Any) -> Any:
        nonlocal serves
        if not serves:
            return function(first, *rest, **arguments)

        # Else the shorter last chunk would be compiled for as well.
        if not for_any_shape:
            torch._dynamo.maybe_mark_dynamic(first, 0)
        try:
            return kernel(first, *rest, **arguments)
        except TorchDynamoException as error:
            serves = False
            message = f"torch.compile failed, {function.__name__} goes on without it: {_first_line(error)}"
            warnings.warn(message, stacklevel=2)
            return function(first, *rest, **arguments)

    return call


def choose(setting: Literal["auto", "compiled", "eager"], device: torch.device) -> tuple[bool, str]:
    """Return the choice whether a head's passes are compiled on a device, and the reason in words.

    Args:
        setting: `LossConfig.head_passes`.

    Raises:
        ValueError: they are to be compiled, and cannot.
    """
    if setting == "eager":
        return False, "step by step, as asked for (loss.head_passes: eager)"
    if setting == "auto":
        return can_compile(device)

    # Only here a failure ends the run; "auto" falls back to the reference.
    if error := try_passes(device):
        raise ValueError(
            f"got loss.head_passes compiled, but torch.compile does not work on this {device.type} device ({error}); "
            "expected auto or eager"
        )
    return True, "compiled, as asked for (loss.head_passes: compiled)"


def can_compile(device: torch.device) -> tuple[bool, str]:
    """Return True if compiling the passes is worth it and works on a device, and the reason in words.

    They are tried on a few numbers, since a compiler, its headers or its cache folder can be missing.
    """
    if device.type != "cuda":
        return False, f"step by step on {device.type}, where the products take most of the time"

    capability = torch.cuda.get_device_capability(device)
    if capability < VOLTA:
        return False, f"step by step: Triton needs compute capability 7.0, this GPU has {capability[0]}.{capability[1]}"

    if error := try_passes(device):
        return False, f"step by step: torch.compile does not work here ({error})"
    return True, "compiled: a chunk's logits are read twice and written once"


@functools.cache
def try_passes(device: torch.device) -> str:
    """Compile the passes and compare them with PyTorch's softmax on a few numbers.

    Returns:
        the error in one line; empty where there is none.
    """
    # Said at once: the compiler would load for seconds before it found out.
    if device.type == "cuda" and find_spec("triton") is None:
        return "Triton is not installed"

    logits = torch.linspace(-3, 3, 48, device=device).reshape(3, 16)
    expected = logits.softmax(1)

    # A compiler's own errors are of many kinds; whatever it is, the reference works.
    try:
        sums = torch.compile(row_sums)(logits, scale=1.0, softcap=None)
        slope = 1 / sums.total
        write = torch.compile(softmax_gradient)
        write(logits, peak=sums.peak, slope=slope, out=None, scale=1.0, softcap=None)
        is_right = torch.allclose(logits, expected, atol=1e-5)
    except Exception as error:
        return _first_line(error)
    return "" if is_right else "its values are wrong"


def _first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message, if it has one."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__}: {lines[0][:MESSAGE_LENGTH]}"
