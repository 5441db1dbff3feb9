"""Scores of a model on text it has not seen, in units that compare across tokenizers.

Perplexity is exp(sum of nll / number of tokens), both summed over everything, never a mean of means; and
perplexities of different tokenizers do not compare. Bits per byte do: the same text has the same bytes
for every model, and `nll / (bytes * ln 2)` is what the model needs to write down one of them.

Shapes: B windows, S positions, V vocabulary. Labels are already shifted: `labels[b, j]` is predicted at j.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import UserError
from ..machine.device_memory import FittingParts, scored_logits
from .comparability import unspelt_text

log = logging.getLogger(__name__)

Scored = tuple[dict[str, Tensor], Tensor]
"""(what the model is called with, each [B, ...], labels [B, S])"""
Counted = tuple[dict[str, Tensor], Tensor, int]
"""The same, and the bytes of text that the batch scores."""

IGNORE = -100
HALF = (torch.float16, torch.bfloat16)
LARGEST_EXPONENT = 700
"""Nats per token from which a perplexity is infinite: exp(710) is more than a float64 can hold."""


@contextmanager
def float32_evaluation(model: nn.Module) -> Iterator[nn.Module]:
    """Keep a model in float32 and evaluation mode, without autocast and gradients; afterwards it is exactly as it was.

    Half-precision parameters and buffers are replaced by float32 copies in the modules' tables, and the
    originals are put back. They are not touched, so bits, gradients, hooks and an optimizer's references are
    what they were, also after an exception; a tensor shared by several modules has one copy shared likewise.
    Costs 4 bytes per half-precision parameter while it lasts; a float32 model is not copied.
    """
    copies: dict[int, Tensor] = {}
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    try:
        for table, name, tensor in _half_precision_tensors(model):
            # tied weights are found once for each module that shares them
            if id(tensor) not in copies:
                copies[id(tensor)] = _float32_copy(tensor)

            # noted before it is replaced, so that an exception between the two loses nothing
            replaced.append((table, name, tensor))
            table[name] = copies[id(tensor)]

        with evaluation_mode(model), torch.autocast(device.type, enabled=False):
            yield model
    finally:
        for table, name, tensor in replaced:
            table[name] = tensor


def _half_precision_tensors(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield (table of its module, name in it, tensor) of half-precision parameters and buffers."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.dtype in HALF:
                    yield table, name, tensor


def _float32_copy(tensor: Tensor) -> Tensor:
    """Return a copy that is a parameter, without gradients, where the tensor is one."""
    copy = tensor.detach().float()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copy, requires_grad=False)
    return copy


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Keep a model in evaluation mode without gradients; afterwards every module's training flag is what it was."""
    # not one flag for all: a module below a trained one may have been frozen in evaluation mode
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield model
    finally:
        for module, was_training in training.items():
            module.training = was_training


def token_nll(
    model: nn.Module,
    batches: Iterable[Scored],
    device: torch.device,
    accelerator: Accelerator | None = None,
    *,
    survives: bool = True,
) -> tuple[float, int]:
    """Return the negative log-likelihood of all supervised tokens, in nats, and their number.

    Args:
        model: a language model of transformers, in whatever dtype; the losses are float32, their sum float64.
        batches: what the model is called with, each [B, ...], and labels [B, S]; positions whose label is IGNORE are
            not scored.
        device: of the model.
        accelerator: if given, both numbers are summed over its processes, which must all call this.
        survives: what does not fit into memory is done again in halves; False raises (see `FittingParts`).
    """
    total = 0.0
    count = 0
    parts = FittingParts(survives=survives)
    with evaluation_mode(model):
        for inputs, labels in batches:
            score = partial(_part_nll, model, inputs, labels, device)
            rows_at_once = _rows_at_once(model, labels.shape[1], device)
            for nll, tokens in parts.of(range(len(labels)), score, rows_at_once):
                total += nll
                count += tokens

    summed_nll, summed_count = sum_over_processes([total, count], accelerator)
    return summed_nll, round(summed_count)


def evaluate(
    model: nn.Module,
    batches: Iterable[Counted],
    device: torch.device,
    accelerator: Accelerator | None = None,
    *,
    float32: bool = True,
    survives: bool = True,
) -> dict[str, float | int]:
    """Return the `metrics` of a model on batches as for `token_nll`, with the bytes of text that each scores.

    Args:
        float32: compute in float32 whatever the model's dtype (see `float32_evaluation`); False for a
            teacher whose float32 copy would not fit: then only the loss is float32.
        survives: as for `token_nll`.
    """
    num_bytes = 0

    # bytes are counted while the batches pass: they are read once
    def counted() -> Iterator[Scored]:
        nonlocal num_bytes
        for inputs, labels, size in batches:
            num_bytes += int(size)
            yield inputs, labels

    with float32_evaluation(model) if float32 else nullcontext():
        nll, tokens = token_nll(model, counted(), device, accelerator, survives=survives)
    [total_bytes] = sum_over_processes([num_bytes], accelerator)
    return metrics(nll, tokens, round(total_bytes))


def metrics(nll: float, tokens: int, num_bytes: int) -> dict[str, float | int]:
    """Compute loss (nats per token), perplexity and bits per byte from sums over a whole text.

    Args:
        nll: negative log-likelihood, in nats.

    Raises:
        UserError: the text is empty.
    """
    if tokens <= 0 or num_bytes <= 0:
        raise UserError(
            f"the evaluation text holds {tokens} tokens and {num_bytes} bytes to score; expected at least one of each. "
            "Give a longer text with --eval-data, or raise data.eval_fraction."
        )

    loss = nll / tokens
    perplexity = math.exp(loss) if loss < LARGEST_EXPONENT else math.inf
    return {
        "loss": loss,
        "perplexity": perplexity,
        "bits_per_byte": nll / (num_bytes * math.log(2)),
        "tokens": tokens,
        "bytes": num_bytes,
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Return the number of parameters (shared ones counted once) and their dtype, for the report."""
    parameters = list(model.parameters())

    # quantised weights are integers: `uint8` holds two of 4 bits, and only transformers can count them
    if hasattr(model, "num_parameters"):
        count = model.num_parameters()
    else:
        count = sum(parameter.numel() for parameter in parameters)

    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in parameters}
    description: dict[str, Any] = {"parameters": count, "dtype": "+".join(sorted(dtypes))}
    if has_encoder(model):
        description["encoder_decoder"] = True
    return description


def has_encoder(model: nn.Module) -> bool:
    """Return whether a model has encoder and decoder."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def compare(
    compare_batch: Callable[[Any], dict[str, float]],
    batches: Iterable[Any],
    accelerator: Accelerator | None = None,
) -> dict[str, float | None]:
    """Compute how often student and teacher agree, over all batches.

    Args:
        compare_batch: batch -> `{agree, kl_sum, count}`: positions where the most probable token is the same,
            sum of KL in nats, positions compared. Sums, not means.

    Returns:
        `{top1_agreement, kl_nats_per_token}`; None where nothing could be compared.
    """
    agree = 0.0
    kl = 0.0
    count = 0.0
    for batch in batches:
        result = compare_batch(batch)
        agree += result["agree"]
        kl += result["kl_sum"]
        count += result["count"]

    agree, kl, count = sum_over_processes([agree, kl, count], accelerator)
    if count == 0:
        return {"top1_agreement": None, "kl_nats_per_token": None}
    return {"top1_agreement": agree / count, "kl_nats_per_token": kl / count}


def gap_closed(student: float, initial: float, teacher: float) -> float | None:
    """Return (initial - student) / (initial - teacher) in bits per byte: 0 nothing learnt, 1 as good as the teacher.

    None if the teacher is no better than the initial student: there is no gap.
    """
    if initial <= teacher:
        return None
    return (initial - student) / (initial - teacher)


def retention(
    student: dict[str, Any],
    teacher: dict[str, Any],
    initial: dict[str, Any],
    agreement: dict[str, float | None],
) -> dict[str, float | str | None]:
    """Return the report's `retention`, from three `metrics` on one text and a `compare`.

    `bits_per_byte_ratio` is student / teacher: 1 is the teacher's level, above it is worse. It and `gap_closed` are
    None where the bits do not compare, for the reason `not_comparable`.
    """
    reason = unspelt_text({"student": student, "teacher": teacher})
    if reason:
        return {"bits_per_byte_ratio": None, **agreement, "gap_closed": None, "not_comparable": reason}

    ratio = student["bits_per_byte"] / teacher["bits_per_byte"]
    share = gap_closed(student["bits_per_byte"], initial["bits_per_byte"], teacher["bits_per_byte"])
    return {"bits_per_byte_ratio": ratio, **agreement, "gap_closed": share}


def bits_behind(
    model: nn.Module,
    texts: Sequence[tuple[Sequence[int], int]],
    starts: Sequence[int],
    device: torch.device,
) -> dict[int, float]:
    """Return the bits per byte of the same texts behind each start token.

    Args:
        texts: ids of each without a start, and its bytes.
        starts: the tokens to try.
    """
    num_bytes = sum(size for _, size in texts)
    bits = {}
    for start in starts:
        batches = []
        for ids, _ in texts:
            row = torch.tensor([[start, *ids]])
            inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}

            # every token of the text is predicted, the first one from the start; nothing follows the last
            nothing = torch.full((1, 1), IGNORE)
            labels = torch.cat([row[:, 1:], nothing], dim=1)
            batches.append((inputs, labels))

        nll, _ = token_nll(model, batches, device)
        bits[start] = nll / (num_bytes * math.log(2))
    return bits


def _rows_at_once(model: nn.Module, positions: int, device: torch.device) -> int:
    """Return the rows of a batch whose logits are made in one go, at least one."""
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None) or 1
    return max(1, scored_logits(device) // (vocabulary * max(positions, 1)))


def _part_nll(
    model: nn.Module,
    inputs: dict[str, Tensor],
    labels: Tensor,
    device: torch.device,
    rows: Sequence[int],
) -> tuple[float, int]:
    """Compute `_rows_nll` of neighbouring rows of a batch, moved to the device."""
    part = slice(rows[0], rows[-1] + 1)
    inputs = {name: tensor[part].to(device) for name, tensor in inputs.items()}
    return _rows_nll(model, inputs, labels[part])


def _rows_nll(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[float, int]:
    """Return the negative log-likelihood of rows, and how many of their tokens are supervised.

    Args:
        labels: on the host, where they are looked at without waiting for a device.
    """
    labels = labels.flatten()
    positions = (labels != IGNORE).nonzero().flatten()
    if not len(positions):
        return 0.0, 0

    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)  # [B * S, V]
    targets = labels.to(logits.device)

    # a float32 copy of all logits at once might not fit
    chunk_size = max(1, scored_logits(logits.device) // logits.shape[1])
    losses = []
    for chunk in positions.to(logits.device).split(chunk_size):
        losses.append(F.cross_entropy(logits[chunk].float(), targets[chunk], reduction="none"))

    # float64 on the host: not every device has it. Once: each copy to the host waits for the device
    nll = torch.cat(losses).cpu().double().sum().item()
    return nll, len(positions)


def sum_over_processes(values: Sequence[float], accelerator: Accelerator | None) -> list[float]:
    """Return each of the values, summed over the processes of an accelerator, which must all call this."""
    if accelerator is None or accelerator.num_processes == 1:
        return list(values)

    # Apple's GPUs have no float64
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    sums = torch.tensor(values, dtype=dtype, device=accelerator.device)
    return accelerator.reduce(sums, "sum").tolist()
