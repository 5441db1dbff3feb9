"""A smaller model made from a bigger one: some of its layers, with its embeddings, its head and its widths.

`choose_layers` says which layers change the text most on its way through the model (block influence, ShortGPT,
arXiv 2403.03853, as the angular distance of arXiv 2403.17887), or spreads them evenly where there is no text. The
layer that changes least is dropped, and the others are measured anew without it, until so many are left as are wanted.
`keep_layers` makes the model that has only these. The list of layers is recognised by its length, which the config
names, and not by its name, so that any decoder will do.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UserError
from .families import auto_class, depth, layer_counts
from .precision import quantisation_method


@dataclass(frozen=True)
class LayerChoice:
    """The layers of a model that a smaller one is made from."""

    indices: tuple[int, ...]
    """Their numbers in the whole model, from 0, in ascending order."""

    depth: int
    """Layers of the whole model."""

    reason: str
    """Rule by which they were chosen, in words."""

    changes: tuple[float, ...] = ()
    """For every layer of the whole model, how far it turns the hidden states (0: not at all, 1: into the opposite): of
    those that were dropped at that time, of the others at the end. Empty where the choice was made without text."""

    def __str__(self) -> str:
        layers = ", ".join(map(str, self.indices))
        return f"layers {layers} of {self.depth} (numbered from 0): {self.reason}"


# ------------------------------------------------------------------------------------------ the choice


def choose_layers(model: nn.Module, count: int, windows: Iterable[torch.Tensor] | None = None) -> LayerChoice:
    """Choose the layers to keep: those that turn the hidden states of a text most.

    The same model and windows give the same choice every time; no random number is drawn.

    Args:
        count: number of layers to keep.
        windows: texts as token ids [n], on any device; None or none at all: the layers are evenly spread.

    Raises:
        UserError: the model has fewer layers, or no list of layers that can be recognised.
    """
    total = depth(model.config)
    require_count(model.config, count)

    texts = list(windows or ())
    if not texts:
        return LayerChoice(evenly_spread(total, count), total, "evenly spread, without a text to measure them on")

    changes = layer_changes(model, texts)
    remaining = list(range(total))
    while len(remaining) > count:
        # one at a time: without it, the others may matter more than they did; of equal ones the later layer goes
        remaining.remove(min(reversed(remaining), key=lambda index: changes[index]))
        anew = layer_changes(model, texts, remaining)
        for index in remaining:
            changes[index] = anew[index]

    return LayerChoice(
        indices=tuple(remaining),
        depth=total,
        reason=f"those that turn the hidden states most, on {len(texts)} windows, the least of them dropped one by one",
        changes=tuple(changes),
    )


def require_count(config: PretrainedConfig, count: int) -> None:
    """Check that a model has so many layers to keep.

    Raises:
        UserError: it has not, or it is an encoder-decoder model.
    """
    if config.is_encoder_decoder:
        raise UserError(
            f"student.init layers:{count}: not for encoder-decoder models ({config.model_type}), whose two halves "
            "have layers of their own. Expected a causal language model, or pretrained."
        )
    total = depth(config)
    if not 1 <= count <= total:
        raise UserError(
            f"student.init layers:{count}: the student {config.model_type} has {total} layers. Expected layers:1 to "
            f"layers:{total}."
        )


def evenly_spread(total: int, count: int) -> tuple[int, ...]:
    """Return layers at equal distances, the first and the last among them; of one layer the first."""
    if count == 1:
        return (0,)
    return tuple(round(position * (total - 1) / (count - 1)) for position in range(count))


def layer_changes(
    model: nn.Module, windows: Sequence[torch.Tensor], remaining: Sequence[int] | None = None
) -> list[float]:
    """Return the angle between what enters and what leaves each layer, as a share of 180 degrees, mean over tokens.

    Of each window the first token is left out: much attention rests on it, and its states are unlike all others.

    Args:
        remaining: layers that compute; the others hand on what enters them. None: all compute.
    """
    layers = layer_list(model)
    sums = [0.0] * len(layers)
    computing = set(range(len(layers)) if remaining is None else remaining)
    tokens = 0

    device = model.get_input_embeddings().weight.device
    with _layers_watched(layers, sums, computing), _evaluation_mode(model), torch.no_grad():
        for window in windows:
            model(input_ids=window.to(device)[None], use_cache=False)
            tokens += max(len(window) - 1, 0)
    return [total / max(tokens, 1) for total in sums]


@contextmanager
def _layers_watched(layers: nn.ModuleList, sums: list[float], computing: set[int]) -> Iterator[None]:
    """Add up the angles of each layer's tokens in `sums` while the model computes in the block.

    Layers that are not among `computing` have no effect, as if they were not there.
    """

    def watch(index: int, entering: torch.Tensor, output: Any) -> Any:
        if index not in computing:
            return entering if isinstance(output, torch.Tensor) else (entering, *output[1:])

        # float32: in half precision the cosine of nearly equal states is 1
        leaving = output if isinstance(output, torch.Tensor) else output[0]
        cosines = nn.functional.cosine_similarity(entering[:, 1:].float(), leaving[:, 1:].float(), dim=-1)
        sums[index] += torch.acos(cosines.clamp(-1, 1)).sum().item() / math.pi
        return output

    handles = []
    for index, layer in enumerate(layers):

        def hook(_: nn.Module, positional: tuple, named: dict[str, Any], output: Any, index: int = index) -> Any:
            return watch(index, _hidden_states((*positional, *named.values())), output)

        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden_states(arguments: tuple) -> torch.Tensor:
    """Return the hidden states among the arguments of a layer: they come first, in every architecture."""
    return next(value for value in arguments if isinstance(value, torch.Tensor) and value.dim() == 3)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Compute without dropout in the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ------------------------------------------------------------------------------------------- the cut


def keep_layers(model: PreTrainedModel, indices: Sequence[int]) -> PreTrainedModel:
    """Return a new model with these layers only, in this order, numbered anew; everything else is as in `model`.

    It is a plain model on the same device: its config describes it, so that it is saved and loaded like any other.

    Raises:
        UserError: the config cannot describe the smaller model.
    """
    name = layer_list_name(model)
    config = cut_config(model.config, indices)
    dtype = model.get_input_embeddings().weight.dtype
    smaller = auto_class(config).from_config(config, dtype=dtype)

    # blocks.7.attn.weight -> blocks.2.attn.weight
    positions = {str(index): str(position) for position, index in enumerate(indices)}
    weights = {}
    for key, value in model.state_dict().items():
        if key.startswith(f"{name}."):
            index, _, rest = key.removeprefix(f"{name}.").partition(".")
            if index not in positions:
                continue
            key = f"{name}.{positions[index]}.{rest}"
        weights[key] = value

    try:
        smaller.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"student.init layers:{len(indices)}: the layers of a {type(model).__name__} are not alike, and its config "
            "cannot say which of them are there. Expected an architecture whose layers have one form, or a config "
            f"that lists their forms; or give the whole model: --student-init pretrained.\n  {error}"
        ) from error

    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(model.get_input_embeddings().weight.device).train(model.training)


def layer_list(model: nn.Module) -> nn.ModuleList:
    """Return the layers of a causal language model.

    Raises:
        UserError: no list of modules has the length that the config names.
    """
    return model.get_submodule(layer_list_name(model))


def layer_list_name(model: nn.Module) -> str:
    """Return the name of the list of layers within a model: of lists with as many modules as the config has layers the
    one with most weights.

    Raises:
        UserError: there is none.
    """
    total = depth(model.config)
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    }
    if not sizes:
        raise UserError(
            f"student.init layers:K: a {type(model).__name__} has no list of {total} layers, the number in its config. "
            "Expected a decoder of transformers whose layers are one list; or give the whole model: --student-init "
            "pretrained."
        )
    # an outer list before one within it that has all the weights too
    return max(sizes, key=lambda name: (sizes[name], -len(name)))


def cut_config(config: PretrainedConfig, indices: Sequence[int]) -> PretrainedConfig:
    """Return the config of a model with these layers only; lists that have a value for every layer are cut too."""
    smaller = copy.deepcopy(config)
    # What transformers dequantised calls itself quantised still.
    if quantisation_method(smaller) is not None:
        del smaller.quantization_config

    text = smaller.get_text_config()
    total = depth(text)
    for key, values in _lists_by_layer(text, total).items():
        setattr(text, key, [values[index] for index in indices])
    for key in layer_counts(text):
        setattr(text, key, len(indices))

    # GPT-Neo writes its list of attention layers as a pattern and a number of times.
    if hasattr(text, "attention_types"):
        text.attention_types = [[list(text.attention_layers), 1]]
    return smaller


def _lists_by_layer(config: PretrainedConfig, total: int) -> dict[str, list]:
    """Return the settings that have one value for every layer: lists of that length, but for those of every model."""
    general = vars(PretrainedConfig())
    lists = {}
    for key, value in vars(config).items():
        is_list = isinstance(value, list | tuple) and len(value) == total
        # a model of two layers may end texts with one of two tokens
        is_about_tokens = key.endswith(("_token_id", "_ids"))
        if is_list and key not in general and not is_about_tokens:
            lists[key] = list(value)
    return lists
