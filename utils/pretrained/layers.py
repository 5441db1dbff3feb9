"""A smaller model made from a bigger one: some of its layers, with its embeddings, its head and its widths.

`choose_layers` says which layers change the text most on its way through the model (block influence, ShortGPT,
arXiv 2403.03853, as the angular distance of arXiv 2403.17887), or spreads them evenly where there is no text;
`keep_layers` makes the model that has only these. The list of layers is recognised by its length, which the config
names, and not by its name, so that any decoder will do.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

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
    """For every layer of the whole model, how far it turns the hidden states (0: not at all, 1: into the opposite);
    empty where the choice was made without text, or there was nothing to choose."""

    def __str__(self) -> str:
        layers = ", ".join(map(str, self.indices))
        noun = "layer" if len(self.indices) == 1 else "layers"
        return f"{noun} {layers} of {self.depth} (numbered from 0): {self.reason}"


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

    if count == total:
        return LayerChoice(tuple(range(total)), total, "all of them, so that nothing is cut")

    texts = list(windows or ())
    if not texts:
        return LayerChoice(evenly_spread(total, count), total, "evenly spread, without a text to measure them on")

    changes = layer_changes(model, texts)
    # the earlier layer wins a tie
    by_change = sorted(range(total), key=lambda index: (-changes[index], index))
    return LayerChoice(
        indices=tuple(sorted(by_change[:count])),
        depth=total,
        reason=f"those that turn the hidden states most, on {len(texts)} windows",
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


def layer_changes(model: nn.Module, windows: Sequence[torch.Tensor]) -> list[float]:
    """Return the angle between what enters and what leaves each layer, as a share of 180 degrees, mean over tokens.

    Of each window the first token is left out: much attention rests on it, and its states are unlike all others.
    """
    layers = layer_list(model)
    sums = [0.0] * len(layers)
    tokens = 0

    device = model.get_input_embeddings().weight.device
    with _angles_recorded(layers, sums), _evaluation_mode(model), torch.no_grad():
        for window in windows:
            model(input_ids=window.to(device)[None], use_cache=False)
            tokens += max(len(window) - 1, 0)
    return [total / max(tokens, 1) for total in sums]


@contextmanager
def _angles_recorded(layers: nn.ModuleList, sums: list[float]) -> Iterator[None]:
    """Add up the angles of each layer's tokens in `sums` while the model computes in the block."""

    def record(index: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        # float32: in half precision the cosine of nearly equal states is 1
        cosines = nn.functional.cosine_similarity(entering[:, 1:].float(), leaving[:, 1:].float(), dim=-1)
        sums[index] += torch.acos(cosines.clamp(-1, 1)).sum().item() / math.pi

    handles = []
    for index, layer in enumerate(layers):

        def hook(_: nn.Module, positional: tuple, named: dict[str, Any], output: Any, index: int = index) -> None:
            record(index, _first_tensor((*positional, *named.values())), _first_tensor(output))

        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(values: Any) -> torch.Tensor:
    """Return the hidden states of what a layer is given or returns: they come first, in every architecture."""
    if isinstance(values, torch.Tensor):
        return values
    if isinstance(values, ModelOutput):
        values = values.to_tuple()
    states = (value for value in values if isinstance(value, torch.Tensor) and value.dim() == 3)
    found = next(states, None)
    if found is None:
        raise UserError(
            "student.init layers:K: the layers of this model pass on no hidden states [texts, tokens, width], so that "
            "nobody can say which of them change a text most. Expected a decoder whose layers do; or give the whole "
            "model: --student-init pretrained."
        )
    return found


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
    smaller = empty_model(cut_config(model.config, indices), model.get_input_embeddings().weight.dtype)
    weights = _kept_weights(model, indices)
    _require_places(smaller, weights, len(indices))
    smaller.load_state_dict(weights)

    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(model.get_input_embeddings().weight.device).train(model.training)


def require_kept(model: PreTrainedModel, indices: Sequence[int]) -> None:
    """Check that `keep_layers` will make a model of these layers, without taking memory for it.

    Raises:
        UserError: the config cannot describe the smaller model.
    """
    smaller = weightless_model(cut_config(model.config, indices))
    _require_places(smaller, _kept_weights(model, indices), len(indices))


def weightless_model(config: PretrainedConfig) -> PreTrainedModel:
    """Make a model of a config that `cut_config` returned, without memory for weights; raises like `empty_model`."""
    with torch.device("meta"):
        return empty_model(config)


def empty_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make a model, with random weights, of the config that `cut_config` returned.

    Raises:
        UserError: transformers makes no model of it: some architectures compute with the number of layers.
    """
    try:
        return auto_class(config).from_config(config, dtype=dtype)
    except Exception as error:  # whatever an architecture raises for a number that it does not expect
        raise UserError(
            f"student.init layers:{depth(config)}: transformers makes no {config.model_type} model of so many layers "
            f"({type(error).__name__}: {error}). Expected another number; or give the whole model: --student-init "
            "pretrained."
        ) from error


def _kept_weights(model: PreTrainedModel, indices: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the weights of some layers, numbered anew, and those of all that is no layer."""
    name = layer_list_name(model)
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
    return weights


def _require_places(smaller: PreTrainedModel, weights: Mapping[str, torch.Tensor], count: int) -> None:
    """Check that a smaller model has a place for each of these weights, and no others.

    Raises:
        UserError: it has not, since the layers are of several forms.
    """
    places = {name: tuple(value.shape) for name, value in smaller.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    differing = sorted(name for name in places.keys() | shapes if places.get(name) != shapes.get(name))
    if not differing:
        return

    name = differing[0]
    raise UserError(
        f"student.init layers:{count}: the layers of a {type(smaller).__name__} are not alike, and its config cannot "
        f"say which of them are there: {name} is {shapes.get(name, 'nowhere')} in the model and "
        f"{places.get(name, 'nowhere')} in one of {count} layers. Expected an architecture whose layers have one form, "
        "or a config that lists their forms; or give the whole model: --student-init pretrained."
    )


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
