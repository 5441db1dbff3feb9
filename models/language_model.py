"""A transformers language model as body and head: hidden states first, logits only where they are needed.

Its body is that of a causal language model, or an encoder and a decoder, whose states are then those meant below.

Shapes: B rows, S tokens of a row, H width, V vocabulary, r states at once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .attention import fill_empty_rows_of_masks, repeat_grouped_heads_where_needed
from .mask_checks import without_mask_checks
from .types import Source
from .validation import expect

repeat_grouped_heads_where_needed()
fill_empty_rows_of_masks()

CPU_BLOCK = 512
"""Tokens for each thread whose logits a CPU computes at once: their weights then stay in its cache. 224 rows, 288
to 1,536 wide, take 0.90 to 1.01 of the time of one product for many more rows; all tokens at once take 1.04 to 1.15."""

HALF_BLOCK = 16_384
"""Tokens for which something is computed at once in half precision: bounds the temporary beside float32 logits."""

DEPTH_SETTINGS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
"""Names of the number of layers in configs, those of a decoder (T5, BART) before those of the only stack."""

PROBE_LENGTH = 8
"""Tokens of the text on which a model is checked."""

PROBE_PREFIX = 5
"""Tokens of that text which stay as they are while the others change. Odd, so that the prefix also ends within a block
of models that read whole blocks ahead."""

COARSE_SHARE = 0.02
"""Share of the largest logit by which logits may differ that were computed in half precision in two ways."""

QUANTISED_SHARE = 0.2
"""Share of the largest logit by which logits of a quantised model may depend on other tokens: bitsandbytes chooses the
columns that stay in half precision by all tokens of a call (over 0.02 was measured, on random weights in 8 bits)."""

COARSE_FLOOR = 1e-3
"""Difference of logits that is allowed besides, for a model whose logits are all about 0."""

ROUNDING_STEPS = 64
"""Roundings that may add up between equal tokens in two texts: only experts, which get other numbers of rows then,
need any (measured: 5)."""


# ------------------------------------------------------------------------------------------------------------- body


def body_states(
    model: nn.Module,
    ids: Tensor,
    source: Source | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Return [B, S, H] the states that enter the head, for ids that are padded on the right, if at all.

    Args:
        model: a language model, with adapters or without.
        ids: [B, S].
        source: the text for the encoder, where there is one; ids are then the decoder's.
        positions: [B, S] from 0 on in every document, where documents do not see each other; see `check_isolation`.
    """
    return _run_body(model, ids, source=source, positions=positions).last_hidden_state


def body_layers(
    model: nn.Module,
    ids: Tensor,
    layers: Sequence[int],
    source: Source | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the states that enter the head, and the states after some layers: [B, S, H] each.

    Nothing but these is kept: without layers the model is not asked for its hidden states.

    Args:
        model: a language model, with adapters or without.
        ids: [B, S].
        layers: numbers of layers, counted from 1.
        source: the text for the encoder, where there is one; ids are then the decoder's.
        positions: as in `body_states`.
    """
    if not layers:
        return body_states(model, ids, source, positions), ()

    output = _run_body(model, ids, source=source, positions=positions, output_hidden_states=True)
    return output.last_hidden_state, tuple(_main_stream(model, output.hidden_states[layer]) for layer in layers)


def _main_stream(model: nn.Module, states: Tensor) -> Tensor:
    """Return the states after a layer [B, S, H]; of a model with N streams, [N, B, S, H], the one that layers read."""
    if states.dim() == 3:
        return states
    # Gemma 3n names it
    return states[getattr(model.config.get_text_config(), "altup_active_idx", 0)]


def _run_body(
    model: nn.Module,
    ids: Tensor,
    *,
    source: Source | None,
    positions: Tensor | None,
    output_hidden_states: bool = False,
) -> ModelOutput:
    """Run the part below the head on ids that are padded on the right, if at all.

    No attention mask for what is causal: it never sees the padding behind it. With a mask transformers would give
    attention an S x S mask, which rules its fastest kernels out. Documents that do not see each other need that mask:
    transformers builds it from their positions.
    """
    model = _without_adapter(model)
    # Where they are not needed the model's config decides.
    options: dict[str, Any] = {"output_hidden_states": True} if output_hidden_states else {}

    if positions is not None:
        options["position_ids"] = positions

    with without_mask_checks(positions is not None):
        if source is None:
            return _below_head(model)(input_ids=ids, use_cache=False, **options)

        encoded = model.get_encoder()(input_ids=source.ids, attention_mask=source.mask)
        return model.get_decoder()(
            input_ids=ids,
            use_cache=False,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=source.mask,
            **options,
        )


def _without_adapter(model: nn.Module) -> nn.Module:
    """Return the model in the wrapper that peft puts around one with adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _below_head(model: PreTrainedModel) -> PreTrainedModel:
    """Return the body of a causal language model.

    Raises:
        ValueError: the model does not keep it apart from its head.
    """
    if model.base_model is not model:
        return model.base_model

    # Llama 4 calls its body otherwise than its class promises.
    candidates = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(candidates) == 1:
        return candidates[0]
    raise ValueError(
        f"{type(model).__name__} does not keep its body apart from its head: expected a causal language model of "
        "transformers whose logits are head(body(x))"
    )


# ------------------------------------------------------------------------------------------------------------- sizes


def depth_and_width(model: nn.Module) -> tuple[int, int]:
    """Return the number of layers (a decoder's, where there is an encoder besides) and the width of their states."""
    config = model.config.get_text_config()
    depths = (getattr(config, name, None) for name in DEPTH_SETTINGS)
    depth = next(filter(None, depths))
    return depth, config.hidden_size


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of rows of the head, which may be more than the tokenizer's tokens."""
    return model.get_output_embeddings().weight.shape[0]


def context_length(model: nn.Module) -> float:
    """Return how many tokens a model can read at once; infinite where its config names no limit."""
    config = model.config.get_text_config()

    # Without absolute positions there is none of these, or it is -1 (XLNet).
    limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=math.inf)


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which ids enter a model."""
    return model.get_input_embeddings().weight.device


# ------------------------------------------------------------------------------------------------------------- head


def logit_options(model: nn.Module) -> dict[str, float | None]:
    """Return the treatment of a model's logits, from its config: `scale`, then `softcap` (None: no cap)."""
    config = model.config.get_text_config()

    # Cohere multiplies, Granite divides; a missing setting and None mean 1.
    multiplier = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale = multiplier / divisor
    if getattr(config, "scale_decoder_outputs", False):  # T5 of 2019, not its successors
        scale *= config.hidden_size**-0.5

    # Gemma 2 caps.
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


def is_plain_linear(head: nn.Module) -> bool:
    """Return True if calling a head is the product with its weight and no more.

    A subclass, hooks and a replaced `forward` (accelerate's offloading, for one) do more. The hooks of ZeRO-3 do not
    count: they fetch the weight, which reading it does too, and all processes would have to call the head equally
    often.
    """
    if type(head) is not nn.Linear:
        return False
    if "forward" in vars(head):
        return False

    is_zero_3 = hasattr(head, "ds_id")  # DeepSpeed's mark
    if is_zero_3:
        return True
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return not any(hooks)


def linear_into(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Write x @ weight.T + bias into existing memory, and return that.

    Factors in half precision may have a float32 `out`: on CUDA its sums are then not rounded to half precision.

    Args:
        out: [r, V].
        x: [r, H].
        weight: [V, H] in the dtype of x.
        bias: [V] or None.
    """
    if out.dtype != x.dtype:
        return _half_linear_into(out, x, weight=weight, bias=bias)

    # A block of tokens at a time keeps its weights in a CPU's cache; other devices take all tokens at once.
    block_size = len(weight)
    if x.device.type == "cpu" and x.dtype.itemsize >= 4:
        block_size = CPU_BLOCK * torch.get_num_threads()

    for first in range(0, len(weight), block_size):
        block = slice(first, first + block_size)
        block_weight = weight[block].t()
        block_out = out[:, block]
        if bias is None:
            torch.mm(x, block_weight, out=block_out)
        else:
            torch.addmm(bias[block], x, block_weight, out=block_out)
    return out


def _half_linear_into(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Do `linear_into` from half precision to float32, without a second tensor of the size of `out`."""
    if has_float32_products(x):
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
        return out if bias is None else out.add_(bias)

    # Rounded products of a block of tokens at a time, each block copied into `out`.
    rounded = x.new_empty(len(x), min(HALF_BLOCK, len(weight)))
    for first in range(0, len(weight), HALF_BLOCK):
        block = slice(first, first + HALF_BLOCK)
        block_weight = weight[block]
        block_bias = None if bias is None else bias[block]
        block_out = rounded[:, : len(block_weight)]
        out[:, block] = linear_into(block_out, x, weight=block_weight, bias=block_bias)
    return out


def has_float32_products(x: Tensor) -> bool:
    """Return whether torch can multiply half-precision matrices on the device of `x` into float32 (from 2.8 on)."""
    is_half = x.dtype.itemsize == 2
    return x.is_cuda and is_half and "dtype_out" in torch.ops.aten.mm.overloads()


def head_logits(model: nn.Module, states: Tensor, out: Tensor | None = None) -> Tensor:
    """Return [..., V] float32 logits for states [..., H], scaled and soft-capped as the model's config says.

    The head computes in its own dtype (or autocast's), whatever the dtype of the states; the sums of a plain linear
    head in half precision are float32 where the device allows it.

    Args:
        model: a language model.
        states: [..., H] states that enter its head.
        out: [r, V] float32 memory to use again for states [up to r, H], where the head allows it: pages that are new
            to a process cost it more time than reading its logits.
    """
    head = model.get_output_embeddings()
    options = logit_options(model)
    scale = options["scale"]
    softcap = options["softcap"]

    states = states.to(head.weight.dtype)
    if out is not None and is_plain_linear(head):
        memory = out[: len(states)]
        logits = linear_into(memory, states, weight=head.weight, bias=head.bias)
    else:
        logits = head(states).float()

    # In place, as nobody needs a gradient of what is written into memory of ours.
    if out is not None:
        return _adjust_in_place(logits, scale, softcap)

    if scale != 1:  # 1 would be a copy of the largest tensor there is
        logits = logits * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def _adjust_in_place(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scale and soft-cap logits without a second tensor of their size."""
    if scale != 1:
        logits *= scale
    if softcap:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


# ------------------------------------------------------------------------------------------------------------- check


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode for a while; afterwards every submodule has its previous mode again."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class _Probe(NamedTuple):
    """A short text, as this library and as the model itself take it."""

    ids: Tensor
    """[1, PROBE_LENGTH]."""
    source: Source | None
    """Text for the encoder, where there is one."""
    inputs: dict[str, Tensor]
    """The same as keyword arguments of the model."""


@torch.no_grad()
def check_head(model: nn.Module, name: str) -> torch.device:
    """Check that body and head give the model's own logits, and that none depends on the text that follows.

    Args:
        model: the model to check.
        name: "student" or "teacher", for messages.

    Returns:
        the device on which logits come out; of a model that is spread over several not that on which ids enter.

    Raises:
        TypeError: for something that is no module.
        ValueError: for an architecture that does something else between its body and its logits, or is not causal.
    """
    expect(name, model, nn.Module, "a transformers language model")
    description = f"the {name} ({type(model).__name__})"
    _check_layers(model, description)

    probe = _probe(model)
    with evaluating(model):
        model_logits = model(**probe.inputs, use_cache=False).logits.float()
        logits = head_logits(model, body_states(model, probe.ids, probe.source))
        model_logits = model_logits.to(logits.device)

        if not model_logits.isfinite().all():
            raise ValueError(
                f"the logits of the {name} ({type(model).__name__}, {model.dtype}) are not finite: its weights are "
                f"damaged, or it overflows in half precision; load it in float32 (--set {name}.dtype=float32)"
            )
        if _reads_ahead(model, probe, logits):
            raise ValueError(f"{description} reads the text that follows: expected a causal language model")

    # `not <=`, so that a NaN is refused too.
    error = (model_logits - logits).abs().max().item()
    if not error <= _coarse_limit(model_logits):
        raise ValueError(
            f"{description} computes its logits in a way this library does not know "
            f"(largest difference {error:.3g}); expected head(body(x)) with logit_scale, logits_scaling or "
            "final_logit_softcapping"
        )
    return logits.device


@torch.no_grad()
def check_isolation(
    model: nn.Module,
    name: str,
    states_of: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Check, by a measurement, that a document's logits do not depend on another one in its row.

    Args:
        model: a causal language model.
        name: "student" or "teacher", for messages.
        states_of: (ids, positions) -> [B, S, H] the states that enter its head, where `body_states` is not to be asked.

    Raises:
        ValueError: they do, or the model takes no positions.
    """
    # Two rows of two documents, of which only the first ones differ; behind them the second document by itself.
    document = _probe_ids(model)
    others = torch.cat([_probe_ids(model, shift=1), _probe_ids(model, shift=PROBE_PREFIX)])
    ids = torch.cat([others, document.expand(2, -1)], dim=1)
    positions = torch.arange(PROBE_LENGTH, device=ids.device).repeat(2, 2)

    remedy = "give another model, or leave data.isolate_documents at false"
    description = f"data.isolate_documents: the {name} ({type(model).__name__}, {model.config.model_type})"
    with evaluating(model):
        alone = head_logits(model, body_states(model, document))[0]
        try:
            states = states_of(ids, positions) if states_of else body_states(model, ids, positions=positions)
        except TypeError as error:
            raise ValueError(f"{description} takes no position ids ({error}): {remedy}") from error
        packed = head_logits(model, states)[:, PROBE_LENGTH:]

    # Rows of one call go through the same kernels; a text alone does not. `not <=`, so that a NaN is refused too.
    neighbours = (packed[0] - packed[1]).abs().max().item()
    places = (packed[0] - alone).abs().max().item()
    size = alone.abs().max().item()
    share = QUANTISED_SHARE if _is_quantised(model) else COARSE_SHARE
    if not neighbours <= _rounding_share(model) * size:
        raise ValueError(
            f"{description} predicts a document differently behind another one, by {neighbours:.3g} in its logits: "
            f"its attention ({model.config._attn_implementation}), or what it has instead, reads across documents; "
            f"{remedy}"
        )
    if not places <= _coarse_limit(alone, share):
        raise ValueError(
            f"{description} predicts a document differently by itself, by {places:.3g} in its logits: its positions "
            f"do not start anew; {remedy}"
        )


def _check_layers(model: nn.Module, description: str) -> None:
    """Raise a ValueError for a model without a head, or with a bias behind its head."""
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise ValueError(f"{description} has no output embeddings: expected a causal language model")

    bias = getattr(_without_adapter(model), "final_logits_bias", None)
    if bias is not None and bias.any():
        raise ValueError(
            f"{description} adds a bias to its logits (final_logits_bias), which is not "
            "supported: expected one whose bias is 0, such as BART's"
        )


def _probe(model: nn.Module) -> _Probe:
    """Return the text on which a model is checked."""
    ids = _probe_ids(model)
    if not model.config.is_encoder_decoder:
        return _Probe(ids, source=None, inputs={"input_ids": ids})

    source = Source(ids.flip(1), torch.ones_like(ids))
    inputs = {"input_ids": source.ids, "attention_mask": source.mask, "decoder_input_ids": ids}
    return _Probe(ids, source=source, inputs=inputs)


def _probe_ids(model: nn.Module, shift: int = 0) -> Tensor:
    """Return [1, PROBE_LENGTH] ids that differ from those of another shift everywhere; never 0, often padding."""
    positions = torch.arange(PROBE_LENGTH, device=input_device(model)) + shift
    ids = 1 + positions % max(vocabulary_size(model) - 1, 1)
    return ids[None]


def _reads_ahead(model: nn.Module, probe: _Probe, logits: Tensor) -> bool:
    """Return whether logits depend on tokens behind theirs: on which ones, or on whether there are any.

    Args:
        logits: [1, PROBE_LENGTH, V] those of the probe.
    """
    prefix = probe.ids[:, :PROBE_PREFIX]
    other_end = _probe_ids(model, shift=1)[:, PROBE_PREFIX:]
    changed_ids = torch.cat([prefix, other_end], dim=1)
    changed_logits = head_logits(model, body_states(model, changed_ids, probe.source))
    changes = (changed_logits - logits).abs()

    # Texts of equal shape go through the same kernels: a causal model repeats the earlier logits to rounding, while
    # one that reads ahead, however little it has learned, changes them by 0.1 % and more of what the later ones change.
    earlier_change = changes[:, :PROBE_PREFIX].max().item()
    later_change = changes[:, PROBE_PREFIX:].max().item()
    size = max(logits.abs().max().item(), later_change)
    if earlier_change > _rounding_share(model) * size:
        return True

    # A shorter text takes other kernels, so that only a coarse difference counts.
    prefix_logits = head_logits(model, body_states(model, prefix, probe.source))
    differences = (prefix_logits - logits[:, :PROBE_PREFIX]).abs()
    share = QUANTISED_SHARE if _is_quantised(model) else COARSE_SHARE
    return differences.max().item() > _coarse_limit(logits, share)


def _is_quantised(model: nn.Module) -> bool:
    """Return True if some weights are whole numbers, which stand for a quantised model's."""
    return not all(parameter.dtype.is_floating_point for parameter in model.parameters())


def _rounding_share(model: nn.Module) -> float:
    """Return the share of the largest logit by which logits of a text may differ between calls of equal shape."""
    if _is_quantised(model):
        return QUANTISED_SHARE
    if torch.get_float32_matmul_precision() != "highest":
        return COARSE_SHARE

    dtypes = {parameter.dtype for parameter in model.parameters()}
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return min(ROUNDING_STEPS * coarsest, COARSE_SHARE)


def _coarse_limit(logits: Tensor, share: float = COARSE_SHARE) -> float:
    """Return the largest difference of logits of one text that come from calls of different shapes or ways."""
    return share * logits.abs().max().item() + COARSE_FLOOR
