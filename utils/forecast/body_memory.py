"""Memory of a model's body, measured without allocating it."""

import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PretrainedConfig

from ..pretrained import loading
from ..pretrained.families import auto_class, body, depth
from .model_size import shallow

MEASURED_LAYERS = (2, 3)
"""A body is run with so many layers; every further one takes what the third takes more than two."""


PROBED_LENGTHS = (16, 32)
"""Tokens of two short forwards, which take equally many operations unless a body goes from token to token."""


FAKE_TENSORS = "torch._subclasses.fake_tensor"
"""Logger that prints the traceback of whatever an architecture cannot do without content."""


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that exist, from when it is entered."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        found = func(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata)
        return found

    def _freed(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)


@dataclass(frozen=True)
class Body:
    """Bytes beside the weights in a forward, and backward, through a model without its head."""

    kept: int
    """For the backward pass, what enters the head included."""
    forward: int
    """At the peak of the forward."""
    backward: int
    """At the peak of the backward, the gradients of all parameters included."""

    def deeper(self, other: "Body", layers: int) -> "Body":
        """With more layers, given another one that has one layer more."""
        own, more = vars(self), vars(other)
        return Body(**{name: own[name] + layers * (more[name] - own[name]) for name in own})


def measure_body(
    config: PretrainedConfig,
    windows: int,
    length: int,
    dtype: torch.dtype,
    half: bool,
    trained: bool,
    on_gpu: bool,
    recomputes: bool = False,
) -> Body:
    """What a body takes for windows of `length` tokens, run without content; of encoder and decoder each.

    Args:
        dtype: of the weights.
        half: under autocast to half precision.
        trained: with gradients, and those of an earlier micro-batch in memory.
        on_gpu: attention never makes scores for dropout's sake.
        recomputes: with gradient checkpointing.

    Raises:
        RuntimeError: the architecture looks into its tensors, which have no content here.
    """
    layers = depth(config)
    settings = (windows, length, dtype, half, trained, on_gpu, recomputes)
    few, more = (_run(shallow(config, n), *settings) for n in MEASURED_LAYERS)
    return few if layers <= MEASURED_LAYERS[0] else few.deeper(more, layers - MEASURED_LAYERS[0])


def _run(
    config: Any,
    windows: int,
    length: int,
    dtype: torch.dtype,
    half: bool,
    trained: bool,
    on_gpu: bool,
    recomputes: bool,
) -> Body:
    for dropout in ("attention_dropout", "attn_pdrop") if on_gpu else ():
        if hasattr(config.get_text_config(), dropout):
            setattr(config.get_text_config(), dropout, 0.0)
    with FakeTensorMode(), _silenced(FAKE_TENSORS):
        model = auto_class(config).from_config(config, dtype=dtype).train(trained)
        if recomputes:
            loading.recompute_layers(model)
        parameters = list(model.parameters())
        ids = torch.zeros(windows, length, dtype=torch.long)
        with _Live([*parameters, *model.buffers(), ids]) as live, torch.set_grad_enabled(trained):
            for _ in range(1 + trained):  # twice: the second time with gradients there
                before, live.peak = live.now, live.now
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    states = _states(model, ids)
                    kept, forward = live.now - before, live.peak - before
                    logits = model.get_output_embeddings()(states.flatten(0, 1)[:1])
                if trained:
                    live.peak = live.now
                    logits.float().sum().backward()
                del states, logits
        return Body(kept, forward, live.peak)


def _require_parallel(config: PretrainedConfig) -> None:
    """Make sure that a body takes all tokens of a window at once.

    Raises:
        RuntimeError: it goes from one to the next, as Mamba's does without its kernels: without content too that
            takes minutes.
    """
    few = shallow(config, MEASURED_LAYERS[0])
    shorter, longer = (_operations(few, length) for length in PROBED_LENGTHS)
    if longer > 1.5 * shorter:
        raise RuntimeError(f"a body of {config.model_type} goes from token to token without its kernels")


def _operations(config: PretrainedConfig, length: int) -> int:
    """Operations of a forward through a body, without content."""
    with FakeTensorMode(), _silenced(FAKE_TENSORS), torch.no_grad():
        model = auto_class(config).from_config(config, dtype=torch.float32).eval()
        ids = torch.zeros(1, length, dtype=torch.long)
        with _Live([]) as live:
            _states(model, ids)
    return live.operations


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """A logger that says nothing for a while: what goes wrong is told by the exception."""
    logger = logging.getLogger(name)
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _states(model: nn.Module, ids: Tensor) -> Tensor:
    """What enters the head; an encoder, where there is one, reads as many tokens as its decoder."""
    if not model.config.is_encoder_decoder:
        return body(model)(input_ids=ids, use_cache=False).last_hidden_state
    mask = torch.ones_like(ids)
    read = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    encoder = {"encoder_hidden_states": read, "encoder_attention_mask": mask}
    return model.get_decoder()(input_ids=ids, use_cache=False, **encoder).last_hidden_state
