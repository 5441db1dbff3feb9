"""A transformers language model as body and head: hidden states first, logits only where they are needed.

Its body is that of a causal language model, or an encoder and a decoder, whose states are then those meant below.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.modeling_outputs import ModelOutput

from .attention import repeat_grouped_heads_where_needed
from .types import Source
from .validation import expect

repeat_grouped_heads_where_needed()

CPU_BLOCK = 512
"""Tokens for each thread whose logits a CPU computes at once: their weights then stay in its cache. 224 rows, 288
to 1,536 wide, take 0.90 to 1.01 of the time of one product for many more rows; all tokens at once take 1.04 to 1.15."""

HALF_BLOCK = 16_384
"""Tokens for which something is computed at once in half precision: bounds the temporary beside float32 logits."""


def _without_adapter(model: nn.Module) -> nn.Module:
    """The model in the wrapper that peft puts around one with adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _below_head(model: PreTrainedModel) -> PreTrainedModel:
    """The body of a causal language model.

    Raises:
        ValueError: the model does not keep it apart from its head.
    """
    if model.base_model is not model:
        return model.base_model

    # Llama 4 calls its body otherwise than its class promises
    candidates = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(candidates) == 1:
        return candidates[0]
    raise ValueError(
        f"{type(model).__name__} does not keep its body apart from its head: expected a causal language model of "
        "transformers whose logits are head(body(x))"
    )


@contextmanager
def _nothing_asked() -> Iterator[None]:
    """While transformers makes masks it does not ask the device, for which the host would wait, what is known here:
    texts are not packed into rows (it looks whether positions jump), what is causal is only padded behind the text
    (BART makes itself a mask of ones), and where an encoder is given a mask there is padding."""

    def causal(mask: Tensor | None, *args: Any, **options: Any) -> bool:
        return asked["_ignore_causal_mask_sdpa"](None, *args, **options)

    def of_encoder(mask: Tensor | None, *args: Any, **options: Any) -> bool:
        return mask is None and asked["_ignore_bidirectional_mask_sdpa"](None, *args, **options)

    there = vars(masking_utils)
    known = {"find_packed_sequence_indices": lambda positions: None}
    known |= {"_ignore_causal_mask_sdpa": causal, "_ignore_bidirectional_mask_sdpa": of_encoder}
    asked = {name: there[name] for name in known if name in there}  # private: another version may not have them
    try:
        there.update({name: known[name] for name in asked})
        yield
    finally:
        there.update(asked)


@_nothing_asked()
def _body(model: nn.Module, ids: Tensor, source: Source | None, **options: bool) -> ModelOutput:
    """What the part below the head says of ids that are padded on the right, if at all.

    No attention mask for what is causal: it never sees the padding behind it. With a mask transformers would give
    attention an S x S mask, which rules its fastest kernels out.
    """
    inner = _without_adapter(model)
    if source is None:
        return _below_head(inner)(input_ids=ids, use_cache=False, **options)
    read = inner.get_encoder()(input_ids=source.ids, attention_mask=source.mask).last_hidden_state
    encoder = {"encoder_hidden_states": read, "encoder_attention_mask": source.mask}
    return inner.get_decoder()(input_ids=ids, use_cache=False, **encoder, **options)


def body_states(model: nn.Module, ids: Tensor, source: Source | None = None) -> Tensor:
    """[B, S, H] the states that enter the head, for ids that are padded on the right, if at all.

    Args:
        source: what the encoder reads, where there is one; ids are then the decoder's.
    """
    return _body(model, ids, source).last_hidden_state


def body_layers(
    model: nn.Module, ids: Tensor, layers: Sequence[int], source: Source | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(states that enter the head, states after some layers): [B, S, H] each; layers are counted from 1.

    Nothing but these is kept: without layers the model is not asked for its hidden states.
    """
    if not layers:
        return body_states(model, ids, source), ()
    out = _body(model, ids, source, output_hidden_states=True)
    return out.last_hidden_state, tuple(out.hidden_states[layer] for layer in layers)


def depth_and_width(model: nn.Module) -> tuple[int, int]:
    """Number of layers (a decoder's, where there is an encoder besides) and width of their states."""
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in ("num_decoder_layers", "decoder_layers", "num_hidden_layers"))
    return next(filter(None, found)), config.hidden_size


def logit_options(model: nn.Module) -> dict[str, float | None]:
    """What a model does to its logits, from its config: `scale`, then `softcap` (None: no cap)."""
    config = model.config.get_text_config()
    # Cohere multiplies, Granite divides, Gemma 2 caps
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    if getattr(config, "scale_decoder_outputs", False):  # T5 of 2019, not its successors
        scale *= config.hidden_size**-0.5
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


def is_plain_linear(head: nn.Module) -> bool:
    """Whether calling it is the product with its weight and no more: no subclass, hooks or forward of its own
    (accelerate's offloading, for one). Those of ZeRO-3 do not count: they fetch the weight, which reading it does too,
    and all processes would have to call the head equally often."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if hasattr(head, "ds_id"):  # DeepSpeed's mark
        hooks = ()
    return type(head) is nn.Linear and not any(hooks) and "forward" not in vars(head)


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [r, H] @ weight [V, H].T + bias, written into [r, V] memory that is there, which is returned.

    Factors in half precision may have a float32 `out`: on CUDA its sums are then not rounded to half precision.
    """
    if out.dtype != x.dtype:
        return _half_linear_into(out, x, weight, bias)

    on_cpu = x.device.type == "cpu" and x.dtype.itemsize >= 4
    size = CPU_BLOCK * torch.get_num_threads() if on_cpu else len(weight)
    for first in range(0, len(weight), size):
        block = slice(first, first + size)
        if bias is None:
            torch.mm(x, weight[block].t(), out=out[:, block])
        else:
            torch.addmm(bias[block], x, weight[block].t(), out=out[:, block])
    return out


def _half_linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_into` from half precision to float32, without a second tensor of the size of `out`."""
    if has_float32_products(x):
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
        return out if bias is None else out.add_(bias)

    rounded = x.new_empty(len(x), min(HALF_BLOCK, len(weight)))
    for first in range(0, len(weight), HALF_BLOCK):
        block = slice(first, first + HALF_BLOCK)
        width = len(weight[block])
        out[:, block] = linear_into(rounded[:, :width], x, weight[block], None if bias is None else bias[block])
    return out


def has_float32_products(x: Tensor) -> bool:
    """Return whether torch can multiply half-precision matrices on the device of `x` into float32 (from 2.8 on)."""
    return x.is_cuda and x.dtype.itemsize == 2 and "dtype_out" in torch.ops.aten.mm.overloads()


def head_logits(model: nn.Module, states: Tensor, out: Tensor | None = None) -> Tensor:
    """[..., V] float32 logits for states [..., H], scaled and soft-capped as the model's config says.

    The head computes in its own dtype (or autocast's), whatever the dtype of the states; the sums of a plain linear
    head in half precision are float32 where the device allows it.

    Args:
        out: [r, V] float32 memory to use again for states [up to r, H], where the head allows it: pages that are new
            to a process cost it more time than reading its logits.
    """
    head, options = model.get_output_embeddings(), logit_options(model)
    states = states.to(head.weight.dtype)

    if out is not None and is_plain_linear(head):
        logits = linear_into(out[: len(states)], states, head.weight, head.bias)
    else:
        logits = head(states).float()

    if out is not None:
        # in place, as nobody needs a gradient of what is written into memory of ours
        return _adjust_in_place(logits, **options)
    if options["scale"] != 1:  # 1 would be a copy of the largest tensor there is
        logits = logits * options["scale"]
    if cap := options["softcap"]:
        logits = cap * torch.tanh(logits / cap)
    return logits


def _adjust_in_place(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    if scale != 1:
        logits *= scale
    if softcap:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every submodule has its own mode again."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def check_head(model: nn.Module, name: str) -> torch.device:
    """Make sure that body and head give the model's own logits, and that none depends on what follows.

    Returns:
        the device on which logits come out; of a model that is spread over several not that on which ids enter.

    Raises:
        TypeError: for something that is no module.
        ValueError: for an architecture that does something else between its body and its logits, or is not causal.
    """
    expect(name, model, nn.Module, "a transformers language model")
    described = f"the {name} ({type(model).__name__})"
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise ValueError(f"{described} has no output embeddings: expected a causal language model")

    bias = getattr(_without_adapter(model), "final_logits_bias", None)
    if bias is not None and bias.any():
        raise ValueError(
            f"{described} adds a bias to its logits (final_logits_bias), which is not "
            "supported: expected one whose bias is 0, such as BART's"
        )

    ids = _probe_ids(model)
    source, inputs = None, {"input_ids": ids}
    if model.config.is_encoder_decoder:
        source = Source(ids.flip(1), torch.ones_like(ids))
        inputs = {"input_ids": source.ids, "attention_mask": source.mask, "decoder_input_ids": ids}

    with evaluating(model):
        own = model(**inputs, use_cache=False).logits.float()
        ours = head_logits(model, body_states(model, ids, source))
        own = own.to(ours.device)
        if not own.isfinite().all():
            raise ValueError(
                f"the logits of the {name} ({type(model).__name__}, {model.dtype}) are not finite: its weights are "
                f"damaged, or it overflows in half precision; load it in float32 (--set {name}.dtype=float32)"
            )
        if _reads_ahead(model, ids, source, ours):
            raise ValueError(f"{described} reads the text that follows: expected a causal language model")

    error = (own - ours).abs().max().item()
    if not error <= _coarse_limit(own):
        raise ValueError(
            f"{described} computes its logits in a way this library does not know "
            f"(largest difference {error:.3g}); expected head(body(x)) with logit_scale, logits_scaling or "
            "final_logit_softcapping"
        )
    return ours.device


PROBE_LENGTH, PROBE_PREFIX = 8, 5
"""Tokens of the text on which a model is checked, and those of them that stay as they are while the others change. The
prefix is odd, so that it also ends within a block of models that read whole blocks ahead."""

COARSE_SHARE = 0.02
"""Share of the largest logit by which logits may differ that were computed in half precision in two ways."""

ROUNDING_STEPS = 64
"""Roundings that may add up between equal tokens in two texts: only experts, which get other numbers of rows then,
need any (measured: 5)."""


def _probe_ids(model: nn.Module, shift: int = 0) -> Tensor:
    """[1, PROBE_LENGTH] ids that differ from those of another shift everywhere; never 0, which often is padding."""
    positions = torch.arange(PROBE_LENGTH, device=input_device(model)) + shift
    return (1 + positions % max(vocabulary_size(model) - 1, 1))[None]


def _reads_ahead(model: nn.Module, ids: Tensor, source: Source | None, logits: Tensor) -> bool:
    """Return whether logits depend on tokens behind theirs: on which ones, or on whether there are any.

    Args:
        logits: [1, PROBE_LENGTH, V] those of `ids`.
    """
    changed_ids = torch.cat([ids[:, :PROBE_PREFIX], _probe_ids(model, shift=1)[:, PROBE_PREFIX:]], dim=1)
    changed_logits = head_logits(model, body_states(model, changed_ids, source))
    changes = (changed_logits - logits).abs()
    size = max(logits.abs().max().item(), changes[:, PROBE_PREFIX:].max().item())

    # texts of equal shape go through the same kernels: a causal model repeats the earlier logits to rounding, while
    # one that reads ahead, however little it has learned, changes them by 0.1 % and more of what the later ones change
    if changes[:, :PROBE_PREFIX].max().item() > _rounding_share(model) * size:
        return True

    prefix_logits = head_logits(model, body_states(model, ids[:, :PROBE_PREFIX], source))
    difference = (prefix_logits - logits[:, :PROBE_PREFIX]).abs().max().item()
    return difference > _coarse_limit(logits)


def _rounding_share(model: nn.Module) -> float:
    """Share of the largest logit by which the logits of one text may differ between two calls of equal shape."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    is_quantised = not all(dtype.is_floating_point for dtype in dtypes)
    rounds_products = torch.get_float32_matmul_precision() != "highest"
    if is_quantised or rounds_products:
        return COARSE_SHARE

    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return min(ROUNDING_STEPS * coarsest, COARSE_SHARE)


def _coarse_limit(logits: Tensor) -> float:
    """Largest difference between logits of one text that were computed in calls of different shapes or ways."""
    return COARSE_SHARE * logits.abs().max().item() + 1e-3


def input_device(model: nn.Module) -> torch.device:
    """Where ids enter a model."""
    return model.get_input_embeddings().weight.device


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the head."""
    return model.get_output_embeddings().weight.shape[0]
