"""The two kinds of heads, one chunk at a time: logits, and the products that carry their gradient backward.

Shapes: n supervised positions, H student width, V student vocabulary, c rows of one chunk.

`LinearHead` is a plain linear layer: its products are written out here and share one buffer [c, V]. `ModuleHead` is
any other head, which is called and differentiated by autograd.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..language_model import HALF_BLOCK, has_float32_products, linear_into
from . import head_passes
from .head_softmax import ChunkGradient

HALF_SCALE = 16.0
"""Factor on a gradient that is rounded to half precision: 1 / 151,936 is then a normal number of float16. A power of
two, so that it rounds nothing itself."""
ALIGNED = 8
"""Numbers of half precision to whose multiple the rows of a matrix are lengthened: tensor cores take no others."""


class HeadPrecision(NamedTuple):
    """The dtypes in which a head computes."""

    weights: torch.dtype
    """Dtype of the head's weight, which states get before a module is called with them."""
    products: torch.dtype
    """Dtype of the products: autocast's where that is on, else that of the weight."""
    autocast: bool
    """Autocast is on, and the head is not float64."""

    @property
    def exact(self) -> torch.dtype:
        """Return the dtype of losses and of sums of gradients: float32, or float64 for a float64 head."""
        return torch.promote_types(self.products, torch.float32)

    @property
    def is_half(self) -> bool:
        """Return True where products are computed in half precision."""
        return self.products != self.exact

    @property
    def boost(self) -> float:
        """Return the factor that keeps a rounded gradient among the normal numbers of its dtype."""
        return HALF_SCALE if self.is_half else 1.0


def precision_of(head: nn.Module, states: Tensor) -> HeadPrecision:
    """Return the dtypes in which a head computes on some states, autocast included."""
    device_type = states.device.type
    weight = getattr(head, "weight", None)

    # The weight of a quantised head is made of integers, which say nothing about its products.
    dtype = states.dtype
    if weight is not None and weight.is_floating_point():
        dtype = weight.dtype

    autocast = torch.is_autocast_enabled(device_type) and dtype != torch.float64
    products = torch.get_autocast_dtype(device_type) if autocast else dtype
    return HeadPrecision(weights=dtype, products=products, autocast=autocast)


def _zeros_for(
    tensor: Tensor | None,
    dtype: torch.dtype,
    needed: bool,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor | None:
    """Return zeros to sum up the gradient of a tensor in; None where no gradient is needed."""
    if not needed:
        return None
    return torch.zeros_like(tensor, dtype=dtype, memory_format=memory_format)


class LinearHead:
    """A plain linear layer, one chunk at a time, in one buffer.

    Args:
        states: [n, H].
        params: (weight [V, H], bias [V] or None).
        needs: which of states, weight and bias get a gradient.
        rows: most rows of a chunk.
        compiled: the gradient is written by compiled passes.
    """

    def __init__(
        self,
        states: Tensor,
        params: Sequence[Tensor | None],
        needs: Sequence[bool],
        *,
        precision: HeadPrecision,
        rows: int,
        compiled: bool,
    ) -> None:
        weight, bias = params
        self.precision = precision
        self.states = states.detach().to(precision.products)
        self.weight = weight.detach().to(precision.products)
        self.bias = None if bias is None else bias.detach().to(precision.products)

        # One buffer serves the logits of every chunk, and then their gradient.
        rows = min(rows, len(states))
        vocabulary = len(weight)
        self.buffer = states.new_empty((rows, vocabulary), dtype=precision.exact)

        # Half-precision products read a rounded copy of the gradient. Step by step it exists for one block of tokens
        # at a time; compiled passes write all of it at once, for every block costs launches.
        width = 0
        if precision.is_half:
            width = -(-vocabulary // ALIGNED) * ALIGNED if compiled else min(HALF_BLOCK, vocabulary)
        self.rounded = states.new_empty((rows, width), dtype=precision.products)

        # Contiguous also beside a transposed weight, as the products are written into them.
        needs_states, needs_weight, needs_bias = needs
        self.states_grad = _zeros_for(states, precision.exact, needs_states, torch.contiguous_format)
        self.weight_grad = _zeros_for(weight, precision.exact, needs_weight, torch.contiguous_format)
        self.bias_grad = _zeros_for(bias, precision.exact, needs_bias, torch.contiguous_format)

    @property
    def gradients(self) -> list[Tensor | None]:
        """Return the sums so far of the gradients by states, weight and bias; None for one that is not needed."""
        return [self.states_grad, self.weight_grad, self.bias_grad]

    def logits(self, part: slice) -> Tensor:
        """Return the logits [c, V] of a chunk, in the buffer: those of the chunk before are gone."""
        states = self.states[part]
        memory = self.buffer[: len(states)]
        return linear_into(memory, states, weight=self.weight, bias=self.bias)

    def backward(self, part: slice, gradient: Tensor, slope: Tensor) -> None:
        """Add the products with a chunk's gradient by its logits.

        Args:
            gradient: [c, V] the gradient over the slope of its row.
            slope: [c, 1].
        """
        states = self.states[part]
        if self.bias_grad is not None:
            self.bias_grad.addmv_(gradient.t(), slope[:, 0])

        # The rows' slopes go into the narrow factors: a pass over [c, V] less.
        if not self.precision.is_half:
            if self.states_grad is not None:
                states_grad = self.states_grad[part]
                torch.mm(gradient, self.weight, out=states_grad)
                states_grad.mul_(slope)
            if self.weight_grad is not None:
                self.weight_grad.addmm_(gradient.t(), states * slope)
            return

        # A block of tokens at a time bounds the rounded gradient and the float32 products.
        for block in self._blocks():
            width = len(self.weight[block])
            rounded = self.rounded[: len(states), :width]
            torch.mul(gradient[:, block], slope, out=rounded)
            self._multiply_half(part, block, rounded)

    def backward_passes(
        self,
        part: slice,
        logits: Tensor,
        gradient: ChunkGradient,
        *,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Add the products with a gradient that a compiled pass writes over a chunk's raw logits [c, V].

        Args:
            gradient: the gradient as a factor on the exponentials, and the columns that differ from it.
        """
        rounded = None
        if self.precision.is_half:
            rounded = self.rounded[: len(logits), : logits.shape[1]]

        # Without rounding it is written in place. Then the columns that differ, over it.
        write = head_passes.compiled(head_passes.softmax_gradient)
        write(logits, peak=gradient.peak, slope=gradient.slope, out=rounded, scale=scale, softcap=softcap)
        written = logits if rounded is None else rounded
        written.scatter_(1, gradient.columns, gradient.values.to(written.dtype))

        if rounded is None:
            self._multiply(part, logits)
            return
        self._multiply_half(part, slice(None), rounded)
        if self.bias_grad is not None:
            self.bias_grad += rounded.sum(0, dtype=self.precision.exact)

    def _blocks(self) -> list[slice]:
        """Return slices of the vocabulary, each narrow enough for half precision."""
        starts = range(0, len(self.weight), HALF_BLOCK)
        return [slice(start, start + HALF_BLOCK) for start in starts]

    def _multiply(self, part: slice, gradient: Tensor) -> None:
        """Add the products with a gradient [c, V] in full precision."""
        if self.states_grad is not None:
            torch.mm(gradient, self.weight, out=self.states_grad[part])
        if self.weight_grad is not None:
            self.weight_grad.addmm_(gradient.t(), self.states[part])
        if self.bias_grad is not None:
            self.bias_grad += gradient.sum(0)

    def _multiply_half(self, part: slice, block: slice, rounded: Tensor) -> None:
        """Add the products with a half-precision gradient [c, block of V]."""
        if self.states_grad is not None:
            _add_product(self.states_grad[part], rounded, self.weight[block])
        if self.weight_grad is not None:
            _add_product(self.weight_grad[block], rounded.t(), self.states[part])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b, from half-precision factors, to a float32 sum.

    A product in fp16 could overflow, whatever the loss scale; one in bf16, which has the range of float32, is only
    rounded, as autograd rounds it. On a GPU the product itself reads and writes the sum: a product of its own and an
    addition would move it three times.
    """
    if has_float32_products(a):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.dtype == torch.bfloat16:
        total += a @ b
    else:
        total.addmm_(a.float(), b.float())


class ModuleHead:
    """Any other head: called on a chunk and differentiated by autograd, the chunk's graph then dropped.

    Args:
        module: the head.
        states: [n, H].
        params: the parameters of the head that are learned.
        needs: which of states and parameters get a gradient.
    """

    def __init__(
        self,
        module: nn.Module,
        states: Tensor,
        params: Sequence[Tensor],
        needs: Sequence[bool],
        *,
        precision: HeadPrecision,
    ) -> None:
        self.module = module
        self.precision = precision
        self.states = states.detach()
        self.needs_states, *needs_params = needs
        self.needs_any = any(needs)

        self.states_grad = _zeros_for(states, precision.exact, self.needs_states)
        self.learned: list[Tensor] = []
        self.param_grads: list[Tensor | None] = []
        for parameter, needed in zip(params, needs_params, strict=True):
            self.param_grads.append(_zeros_for(parameter, precision.exact, needed))
            if needed:
                self.learned.append(parameter)

    @property
    def gradients(self) -> list[Tensor | None]:
        """Return the sums so far of the gradients by states and parameters; None for one that is not needed."""
        return [self.states_grad, *self.param_grads]

    def logits(self, part: slice) -> Tensor:
        """Return the logits [c, V] of a chunk; their graph is kept until `backward`."""
        precision = self.precision
        device_type = self.states.device.type
        autocast = torch.autocast(device_type, precision.products, enabled=precision.autocast)
        with torch.set_grad_enabled(self.needs_any), autocast:
            # A part of detached states is a leaf, at which the chunk's graph ends.
            self.chunk_states = self.states[part].requires_grad_(self.needs_states)
            states = self.chunk_states.to(precision.weights)
            self.chunk_logits = self.module(states)

        # A copy, as the caller writes the gradient over it.
        return self.chunk_logits.detach().to(precision.exact, copy=True)

    def backward(self, part: slice, gradient: Tensor, slope: Tensor) -> None:
        """Add the gradients by states and parameters, and drop the chunk's graph.

        Args:
            gradient: [c, V] the gradient by the chunk's logits, over the slope of its row; overwritten.
            slope: [c, 1].
        """
        gradient *= slope

        inputs = list(self.learned)
        totals = [total for total in self.param_grads if total is not None]
        if self.states_grad is not None:
            inputs.insert(0, self.chunk_states)
            totals.insert(0, self.states_grad[part])

        # A parameter may have no part in the logits, such as that of an expert which no token chose.
        gradient = gradient.to(self.chunk_logits.dtype)
        new_gradients = torch.autograd.grad(self.chunk_logits, inputs, gradient, allow_unused=True)
        for total, new in zip(totals, new_gradients, strict=True):
            if new is not None:
                total += new

        # The graph is as large as the chunk: it must be gone before that of the next one is made.
        del self.chunk_states, self.chunk_logits
