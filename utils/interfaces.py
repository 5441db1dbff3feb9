"""Types between the towers: what a run expects of what is learned, which models/ fulfils without importing from here.

The settings, the batch, the teacher and the module that is trained are seen from utils/ through these protocols alone.
A teacher of another kind (behind a server, or a second one) and a module with other terms need no change there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from .config.protocols import RunConfig
from .machine.hardware import Choice

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Side = Literal["student", "teacher"]


# ---------------------------------------------------------------------------------- what is computed


class Batch(Protocol):
    """Windows of text, collated for both models, which score the same bytes of text."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Items of every loss term, known before any forward."""

    @property
    def student_ids(self) -> Tensor:
        """[B, S] tokens that the student reads, padded on the right."""

    @property
    def student_mask(self) -> Tensor:
        """[B, S] 1 on tokens, 0 on padding."""

    @property
    def labels(self) -> Tensor:
        """[B, S] token to predict at each position of the student, -100 where none is."""

    @property
    def bytes(self) -> Tensor:
        """[B] bytes of text that each window scores."""

    @property
    def documents(self) -> Sequence[str]:
        """Names of the documents that each window is cut from, for messages."""

    def to(self, device: Any, non_blocking: bool = False) -> "Batch":
        """Return the batch with its tensors on a device."""

    def without_anchors(self) -> "Batch":
        """Return a batch that no hidden-state term compares, for a process without work in a short step."""

    def scored(self, side: Side) -> tuple[dict[str, Tensor], Tensor]:
        """Return what the model of a side is called with, each [B, ...], and labels [B, S], already shifted."""

    def teacher_nll(self, signal: Any) -> tuple[float, int]:
        """Return the teacher's loss on the text that `scored` scores, in nats, and its tokens, from its signal."""


class Collator(Protocol):
    """Makes batches of windows."""

    def __call__(self, windows: Any) -> Batch: ...


class Teacher(Protocol):
    """A frozen teacher: in this process, behind a cache, or elsewhere."""

    @property
    def model(self) -> nn.Module | None:
        """The network; None if it is not in this process: then only signals are asked for."""

    def signal(self, batch: Any, top_k: int = ..., layers: Sequence[int] = ()) -> Any:
        """Return top-k distributions, tail and text probabilities of a batch (`models.types.TeacherSignal`)."""


class CachingTeacher(Teacher, Protocol):
    """A teacher behind a cache."""

    def begin(self, batch: Any) -> bool:
        """Let a teacher elsewhere begin its answer to a batch that is not stored; False: there is nothing to begin."""


class TeacherElsewhere(Teacher, Protocol):
    """A teacher whose model is None."""

    def identity(self) -> dict[str, Any]:
        """Return what makes it this teacher, for checkpoints; of a model here it is a fingerprint of its weights."""

    def begin(self, batch: Any, top_k: int = ...) -> bool:
        """Begin the answer to a batch, for a `signal` that is asked for later; returns True, at once."""


class TermSum(Protocol):
    """A loss term of one micro-batch, summed over its items."""

    sum: Tensor
    count: int


class StepOutput(Protocol):
    """The loss of one micro-batch, and the sums it is made of."""

    loss: Tensor
    """Scalar: the sum over terms of weight * sum / count in the whole optimizer step."""
    terms: Mapping[str, TermSum]
    weights: Mapping[str, float]
    scalars: Mapping[str, float]
    """Scheduled values, such as the temperature."""


class StepModule(Protocol):
    """A module that the training loop trains; an `nn.Module` whose forward is one micro-batch of a step."""

    couples_windows: bool
    """A term compares the windows of a micro-batch with one another, so that its size changes what is learned."""

    def __call__(self, batch: Batch, step: int, **options: Any) -> StepOutput: ...

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return what the optimizer is to update."""


# --------------------------------------------------------------------------------------- what is run


class TokenReading(Protocol):
    """Tokens of one side, as `models.text.tokens.Reading` holds them."""

    @property
    def ids(self) -> Any:
        """[T] token ids."""


class OwnPrompt(Protocol):
    """The beginning of a given window, which both models have read before the student writes."""

    @property
    def student_ids(self) -> list[int]:
        """Tokens that the student has read."""

    @property
    def teacher(self) -> TokenReading:
        """The same in the teacher's tokens."""


class OwnText(Protocol):
    """A text that the student wrote behind a prompt."""

    @property
    def window(self) -> dict[str, Any] | None:
        """To learn from; None where nothing can be learned."""

    @property
    def text(self) -> str: ...

    @property
    def tokens(self) -> int:
        """Sampled tokens that the text is made of."""

    @property
    def ended(self) -> bool:
        """The student ended it by itself."""

    @property
    def broken(self) -> bool:
        """A special token in its middle, or bytes that are no UTF-8, cut it short."""


class Pair(Protocol):
    """A student and a teacher with all between their vocabularies, as `models.distillation.Distillation` is."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def encoder(self) -> Any:
        """Cuts text into windows: `windows`, `fingerprint`, `tables`, `starts`, `prompt`, `day`, `notes`."""

    @property
    def vocabulary(self) -> Any:
        """The map from the teacher's vocabulary to the student's."""

    @property
    def tokenizers(self) -> "Mapping[str, PreTrainedTokenizerBase]": ...

    @property
    def collate(self) -> Collator: ...

    @property
    def members(self) -> "Sequence[Any]":
        """With several teachers, the pair (a `Pair` with its `method`) of each of them."""

    def weight_of_member(self, number: int, progress: float) -> float:
        """Return the weight of one of several teachers at a progress in [0, 1]."""

    def mixture(self, teachers: "Sequence[Any]") -> Teacher:
        """Make one teacher of those of the members."""

    def collate_mixed(self, collators: "Sequence[Any]") -> Collator:
        """Make one collator of those of the members."""

    def frozen(self, model: nn.Module) -> Teacher: ...

    def listed(self, source: Any) -> Teacher:
        """Make a teacher of a source of lists, as `utils.served.teacher.ListServer` is."""

    def cached(self, teacher: Any, memory: Any, share: float = 1.0) -> CachingTeacher:
        """Make a teacher that answers from memory, which keeps a share of the rows of windows that are learned from."""

    def remember(self, collate: Any, memory: Any, ahead: bool = True, *, is_learned: bool = False) -> Collator: ...

    def describe_documents(self, teacher: Any) -> list[str]:
        """Return how models read isolated documents, and why so, in lines for the log."""

    def framework(self, total_steps: int, *, student: Any, teacher: Any) -> Any:
        """Make the module that is trained, a `StepModule`."""

    def read_and_learned(self, window: dict[str, Any]) -> tuple[Any, ...]: ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens with which the student ends a text, or its turn."""

    def require_own_text(self) -> None:
        """Raise a ValueError if the student cannot learn from text that it writes itself."""

    def own_prompt(self, window: "Mapping[str, Any]", tokens: int, draw: float) -> "OwnPrompt | None":
        """Return the begin of a document of a window, for the student to go on from."""

    def own_window(self, prompt: Any, sampled: Sequence[int]) -> "OwnText":
        """Make a window of the tokens that the student sampled behind a prompt."""

    def places_of(self, batch: Any, student: nn.Module, share: float) -> list[Any]:
        """Return the places of each window's positions by the student's entropy, -1 behind a share; arrays."""

    def without_teacher(self) -> "Pair": ...

    def with_counted_channel(self, windows: Sequence[dict[str, Any]]) -> "Pair": ...


class Method(Protocol):
    """Settings of what is learned, as `models.distillation.Method` is."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def compares_states(self) -> bool: ...

    @property
    def state_terms(self) -> set[str]: ...

    def check_widths(self, student: int, teacher: int) -> None: ...

    def open_text(self, total_steps: int) -> Callable[[int], float]: ...

    def chat_tokenizers(
        self,
        tokenizers: "dict[str, PreTrainedTokenizerBase]",
        variables: "Mapping[str, Mapping[str, Any]] | None" = None,
    ) -> "tuple[dict[str, PreTrainedTokenizerBase], list[str]]": ...

    def join(self, tokenizers: "dict[str, PreTrainedTokenizerBase]", text: Any) -> Pair: ...

    def describe_head(
        self,
        student: nn.Module,
        device: torch.device,
        *,
        is_half: bool,
    ) -> list[str]: ...


class HeldOutText(Protocol):
    """Text that is evaluated on."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def windows(self) -> Sequence[Any]: ...
    @property
    def collate(self) -> Collator: ...
    @property
    def batch_size(self) -> int: ...

    def score(self, model: "nn.Module", side: Side) -> dict[str, Any]:
        """Return loss, perplexity and bits per byte of a model, with the tokens and bytes they are of."""

    def coverage(self) -> dict[str, float]:
        """Return the items of every loss term, summed over the windows."""

    def unspelt_shares(self) -> dict[str, float]:
        """Return the share of the text's bytes that the tokens of each side leave out."""


class MemoryForecast(Protocol):
    """Memory that training is expected to take on the student's device."""

    @property
    def size(self) -> int:
        """Bytes, without the teacher; 0: unknown."""


class Job(Protocol):
    """Everything that training and evaluation work with, as `utils.run.prepare.Job` holds it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def config(self) -> RunConfig: ...
    @property
    def accelerator(self) -> "Accelerator": ...
    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase": ...
    @property
    def vocabulary(self) -> Any: ...
    @property
    def collate(self) -> Collator: ...
    @property
    def windows(self) -> "Dataset": ...
    @property
    def held_out(self) -> HeldOutText: ...
    @property
    def fingerprint(self) -> Mapping[str, Any]: ...
    @property
    def teacher_device(self) -> torch.device: ...
    @property
    def teacher_dtype(self) -> Choice[torch.dtype]: ...
    @property
    def needed(self) -> MemoryForecast: ...
    @property
    def teacher_name(self) -> str | None:
        """Name of the teacher, for the log, where it is one of several."""
