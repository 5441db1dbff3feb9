"""Memory of a model's body (all but its head), measured without allocating it.

The body runs on tensors without content (FakeTensorMode) while a dispatch mode counts the bytes that exist at a time:
no formula has to know the architecture.
"""

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
from transformers import PretrainedConfig, masking_utils

from ..pretrained.families import auto_class, body, depth
from ..pretrained.loading import recompute_layers
from .model_size import shallow

MEASURED_LAYERS = (2, 3)
"""A body is run with so many layers; every further one takes what the third takes more than two."""

PROBED_LENGTHS = (16, 32)
"""Tokens of two short forwards, which take equally many operations unless a body goes from token to token."""

FAKE_TENSORS = "torch._subclasses.fake_tensor"
"""Logger that prints the traceback of whatever an architecture cannot do without content."""

PACKED_CHECK = "find_packed_sequence_indices"
"""Private function of transformers: positions -> the text of each token in rows of several, or None."""

DROPOUTS = ("attention_dropout", "attn_pdrop")
"""Names of a config's dropout of attention scores."""


# ------------------------------------------------------------------------------------------- counting bytes


class _LiveBytes(TorchDispatchMode):
    """Count of the bytes of tensors that exist, from when the mode is entered."""

    def __init__(self, uncounted: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0  # bytes
        self.peak = 0
        self.operations = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in uncounted}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        result = func(*args, **(kwargs or {}))

        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        """Add a tensor's storage, unless it is a view of one that is counted already."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._sizes:
            return

        self._sizes[address] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

        # a storage without content is freed like any other: its finalizer is the only sign of it
        weakref.finalize(storage, self._freed, address)

    def _freed(self, address: int) -> None:
        self.now -= self._sizes.pop(address)


# ------------------------------------------------------------------------------------------ running a body


@dataclass(frozen=True)
class Body:
    """Bytes beside the weights in a forward, and backward, through a model without its head."""

    saved: int
    """For the backward pass, what enters the head included."""
    forward: int
    """At the peak of the forward."""
    backward: int
    """At the peak of the backward, the gradients of all parameters included."""

    def deeper(self, other: "Body", layers: int) -> "Body":
        """Return the same body with `layers` more layers.

        Args:
            other: the body with one layer more, which tells what a layer takes.
        """
        return Body(
            saved=self.saved + layers * (other.saved - self.saved),
            forward=self.forward + layers * (other.forward - self.forward),
            backward=self.backward + layers * (other.backward - self.backward),
        )


@dataclass(frozen=True)
class BodyRun:
    """A forward, and backward if it is trained, whose memory is measured."""

    windows: int
    """In the batch."""
    length: int
    """Tokens of a window; of encoder and decoder each."""
    dtype: torch.dtype
    """Of the weights."""
    half: bool
    """Under autocast to half precision."""
    trained: bool
    """With gradients, and those of an earlier micro-batch in memory."""
    on_gpu: bool
    """Attention never makes scores for dropout's sake."""
    recomputes: bool = False
    """With gradient checkpointing."""
    isolates: bool = False
    """Attention has a mask [B, 1, S, S] of documents."""


def measure_body(config: PretrainedConfig, run: BodyRun) -> Body:
    """Measure the bytes that a body takes in a run without content.

    Raises:
        RuntimeError: the architecture looks into its tensors, which have no content here.
    """
    few_layers, more_layers = MEASURED_LAYERS
    few = _measure_shallow(shallow(config, few_layers), run)
    more = _measure_shallow(shallow(config, more_layers), run)

    layers = depth(config)
    if layers <= few_layers:
        return few
    return few.deeper(more, layers - few_layers)


def _measure_shallow(config: PretrainedConfig, run: BodyRun) -> Body:
    """Measure a model that is shallow enough to be run layer by layer."""
    if run.on_gpu:
        _without_attention_dropout(config)

    with FakeTensorMode(), _silenced(FAKE_TENSORS):
        kind: Any = auto_class(config)
        model = kind.from_config(config, dtype=run.dtype).train(run.trained)
        if run.recomputes:
            recompute_layers(model)

        parameters = list(model.parameters())
        ids = torch.zeros(run.windows, run.length, dtype=torch.long)
        with _LiveBytes([*parameters, *model.buffers(), ids]) as live, torch.set_grad_enabled(run.trained):
            measured = _measure_micro_batch(model, ids, live, run)

            # a second micro-batch finds the gradients of the first in memory: that is the usual one
            if run.trained:
                measured = _measure_micro_batch(model, ids, live, run)
        return measured


def _measure_micro_batch(model: nn.Module, ids: Tensor, live: _LiveBytes, run: BodyRun) -> Body:
    """Run a micro-batch through body and backward; what it held is freed when this returns."""
    before = live.now
    live.peak = before
    with torch.autocast("cpu", torch.bfloat16, enabled=run.half):
        states = _states(model, ids, run.isolates)
        saved = live.now - before
        forward = live.peak - before

        # one row through the head is enough to start a backward pass
        logits = model.get_output_embeddings()(states.flatten(0, 1)[:1])

    if run.trained:
        live.peak = live.now
        logits.float().sum().backward()
    return Body(saved=saved, forward=forward, backward=live.peak)


def _states(model: nn.Module, ids: Tensor, isolates: bool = False) -> Tensor:
    """Return what enters the head; an encoder, where there is one, reads as many tokens as its decoder."""
    if not model.config.is_encoder_decoder:
        with _packed_texts(isolates):
            return body(model)(input_ids=ids, use_cache=False).last_hidden_state

    mask = torch.ones_like(ids)
    source_states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    outputs = model.get_decoder()(
        input_ids=ids,
        use_cache=False,
        encoder_hidden_states=source_states,
        encoder_attention_mask=mask,
    )
    return outputs.last_hidden_state


@contextmanager
def _packed_texts(are_packed: bool) -> Iterator[None]:
    """Tell transformers whether rows hold several texts: positions without content do not, and it builds a mask."""
    functions = vars(masking_utils)
    original = functions.get(PACKED_CHECK)
    if are_packed or original is None:
        yield
        return

    functions[PACKED_CHECK] = lambda positions: None
    try:
        yield
    finally:
        functions[PACKED_CHECK] = original


def _without_attention_dropout(config: PretrainedConfig) -> None:
    """Switch attention dropout off, in place: for its sake an implementation on the CPU writes the scores."""
    text_config = config.get_text_config()
    for name in DROPOUTS:
        if hasattr(text_config, name):
            setattr(text_config, name, 0.0)


# ------------------------------------------------------------------------------ bodies that cannot be measured


def require_parallel(config: PretrainedConfig) -> None:
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
    """Count the operations of a forward through a body, without content."""
    with FakeTensorMode(), _silenced(FAKE_TENSORS), torch.no_grad():
        kind: Any = auto_class(config)
        model = kind.from_config(config, dtype=torch.float32).eval()
        ids = torch.zeros(1, length, dtype=torch.long)
        with _LiveBytes([]) as live:
            _states(model, ids)
    return live.operations


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Disable a logger for a while: what goes wrong is told by the exception."""
    logger = logging.getLogger(name)
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was_disabled
