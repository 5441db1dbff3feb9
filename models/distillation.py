"""A pair of a student and a teacher, with all that lies between their two vocabularies, in one object.

`Distillation` is the pair; `Method` is what is learned, by its settings alone, before any tokenizer is there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from . import document_attention
from .chosen_positions import places_of
from .config import CurriculumConfig, LossConfig, RouterConfig, Schedule, Term
from .curriculum import CurriculumScheduler, value_at
from .distillation_framework import DistillationFramework
from .language_model import check_isolation, context_length, vocabulary_size
from .losses import head_passes
from .losses.chunk_size import chunk_rows
from .student_aware_router import ROUTER_TERMS
from .teacher.cached import CachedTeacher, RememberingCollator
from .teacher.frozen import FrozenTeacher
from .teacher.kept_rows import RowsByEntropy
from .teacher.listed import ListedTeacher
from .teacher.mixture import Member, Mix, TeacherMixture
from .teacher.projection import Projection
from .text.chat import ConversationSettings
from .text.chat_turns import tokenizers_for_chat
from .text.collate import PairCollator, count_channel, read_and_learned
from .text.encoder_decoder import make_encoder
from .text.mixed_batches import Collate, MixedCollator, as_pair
from .text.own_text import OwnPrompt, OwnText, own_prompt, own_window, require_own_text, stop_ids
from .text.vocabulary import VocabularyMap
from .text.windows import ModelFacts, PairEncoder, sides_of
from .types import PairedBatch
from .validation import Validated, expect

LM_ONLY = CurriculumConfig(kd=Term(0.0), lm=Term(1.0))
"""Learning from the text alone, to compare with."""

Conversation = list[Mapping[str, Any]]
"""Messages with `role` and `content`."""


class TextSettings(Protocol):
    """Facts of a run's text and models that `Method.join` needs; values of a pair: student, teacher or teachers."""

    @property
    def max_length(self) -> int:
        """Tokens of a window."""

    @property
    def conversations(self) -> bool:
        """True: documents are conversations; False: plain text."""

    @property
    def learn_from(self) -> Literal["completions", "all"]:
        """The part of conversations that is learned: the assistant's, or everything."""

    @property
    def learn_reasoning(self) -> bool:
        """False: the thinking before an answer is read, and not learned."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the heads."""

    @property
    def decoder_starts(self) -> tuple[int, int] | None:
        """Ids that the decoders of encoder-decoder models begin with; None: causal models."""

    @property
    def text_starts(self) -> tuple[str | None, ...]:
        """Tokens that plain text starts with; None: chosen by `models.text.text_start`."""

    @property
    def isolate_documents(self) -> bool:
        """True: documents that share a window do not see each other."""

    @property
    def today(self) -> date | None:
        """The day for chat templates that write it."""

    @property
    def cache_dir(self) -> Any:
        """Folder in which vocabulary maps are kept."""


@dataclass(frozen=True)
class TeacherShare(Validated):
    """The part that one of several teachers has."""

    weight: Schedule = 1.0
    """Beside those of the others; a ramp follows the run."""
    only_for: tuple[str, ...] = ()
    """Routes of text that it is asked about, see `mixed_batches.ROUTE`; empty: all."""


@dataclass(frozen=True)
class Method(Validated):
    """Settings of what is learned: they make a pair of two tokenizers."""

    loss: LossConfig = field(default_factory=LossConfig)
    """How the teacher's distribution becomes a loss."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Which terms weigh how much, and when."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """For the terms on hidden states, if the curriculum uses any."""
    teachers: tuple["TeacherShare", ...] = ()
    """Shares of several teachers, in the order of their models; empty: there is one."""
    mix: Mix = "weights"
    """How several teachers are weighed."""

    @property
    def compares_states(self) -> bool:
        """True if the curriculum uses terms on hidden states, for which the teacher must compute in every step."""
        return bool(self.state_terms)

    @property
    def state_terms(self) -> set[str]:
        """The terms on hidden states that the curriculum uses."""
        return self.curriculum.used() & {*ROUTER_TERMS}

    def open_text(self, total_steps: int) -> Callable[[int], float]:
        """Return the share of the training windows that is open in each of so many optimizer steps."""
        return CurriculumScheduler(self.curriculum, self.loss, total_steps).open_text

    def check_widths(self, student: int, teacher: int) -> None:
        """Check that the router's heads divide the widths of both models.

        Raises:
            ValueError: they do not.
        """
        if self.compares_states:
            self.router.check_widths(student=student, teacher=teacher)

    @staticmethod
    def chat_tokenizers(
        tokenizers: dict[str, PreTrainedTokenizerBase],
        variables: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> tuple[dict[str, PreTrainedTokenizerBase], list[str]]:
        """Return tokenizers that can write conversations, and what their own templates lack, in words.

        Args:
            variables: by role, values for the variables of its chat template.

        Raises:
            ValueError: a template has no such variable.
        """
        return tokenizers_for_chat(tokenizers, variables)

    def join(self, tokenizers: dict[str, PreTrainedTokenizerBase], text: TextSettings) -> "Distillation":
        """Make the pair of two tokenizers, without models; with several teachers, the pair of them all.

        Args:
            tokenizers: of `student` and `teacher`; of further teachers as `teacher_2` and so on.

        Raises:
            ValueError: a tokenizer does not fit; see `PairEncoder` and `VocabularyMap.build`.
        """
        if self.teachers:
            return self._join_several(tokenizers, text)

        student, teacher = tokenizers["student"], tokenizers["teacher"]
        conversations = None
        if text.conversations:
            conversations = ConversationSettings(text.learn_from, text.learn_reasoning, text.today)
        encoder = make_encoder(
            (student, teacher),
            text.max_length,
            conversations=conversations,
            starts=text.decoder_starts,
            facts=ModelFacts(text.rows, text.text_starts),
        )
        # An example of an encoder-decoder pair has a window to itself.
        if text.isolate_documents and text.decoder_starts is None:
            encoder = encoder.isolated()

        student_rows, teacher_rows = text.rows
        vocabulary = VocabularyMap.build(student, teacher, student_rows, teacher_rows, cache_dir=text.cache_dir)

        return Distillation(
            encoder=encoder,
            vocabulary=vocabulary,
            method=self,
            tokenizers=tokenizers,
        )

    def _join_several(
        self,
        tokenizers: dict[str, PreTrainedTokenizerBase],
        text: TextSettings,
    ) -> "Distillation":
        """Make the pair of a student and several teachers, which has a pair for each of them as `members`.

        Raises:
            ValueError: a tokenizer does not fit, or the text is one that several teachers cannot read together.
        """
        if text.conversations or text.decoder_starts is not None:
            kind = "encoder-decoder models" if text.decoder_starts is not None else "conversations"
            raise ValueError(
                f"got {len(self.teachers)} teachers and {kind}, expected plain text: each model writes a conversation "
                "in its own way. Give one teacher, or read the text as plain: --set data.text_column=NAME"
            )

        names = sides_of(1 + len(self.teachers))
        student, *of_teachers = (tokenizers[name] for name in names)
        encoder = PairEncoder(
            student,
            of_teachers[0],
            text.max_length,
            ModelFacts(text.rows, text.text_starts),
            further=of_teachers[1:],
        )
        if text.isolate_documents:
            encoder = encoder.isolated()

        members = []
        single = replace(self, teachers=())
        for number, tokenizer in enumerate(of_teachers):
            rows = text.rows[1 + number]
            vocabulary = VocabularyMap.build(student, tokenizer, text.rows[0], rows, cache_dir=text.cache_dir)
            members.append(
                Distillation(
                    encoder=encoder.beside(number),
                    vocabulary=vocabulary,
                    # The first teacher's hidden states are those that are compared.
                    method=single if number == 0 else single.without_states(),
                    tokenizers={"student": student, "teacher": tokenizer},
                )
            )
        return Distillation(
            encoder=encoder,
            vocabulary=members[0].vocabulary,
            method=self,
            tokenizers=tokenizers,
            members=tuple(members),
        )

    def without_states(self) -> "Method":
        """Return the method without terms on hidden states."""
        weights: dict[str, Any] = {name: Term(0.0) for name in ROUTER_TERMS}
        return replace(self, curriculum=replace(self.curriculum, **weights))

    def describe_head(
        self,
        student: nn.Module,
        device: torch.device,
        *,
        is_half: bool,
    ) -> list[str]:
        """Choose how the student's head computes on a device, in half precision or not, and say it, a line a choice.

        Raises:
            ValueError: `loss.head_passes` asks for what the device cannot do.
        """
        return [
            f"student's head: {chunk_rows(vocabulary_size(student), device, is_half=is_half)[1]}",
            f"its elementwise work: {head_passes.choose(self.loss.head_passes, device)[1]}",
        ]


@dataclass(frozen=True, eq=False)
class Distillation:
    """A pair to distil: a student, a teacher, and all that lies between their two vocabularies.

    Usually made by `from_pretrained`, from names, or by `from_models`, from what is loaded already. Made from its parts
    it needs no models: `framework` can be given them later.

        pair = Distillation.from_pretrained("HuggingFaceTB/SmolLM2-360M", "Qwen/Qwen2.5-1.5B", max_length=512)
        windows = pair.windows(texts)
        framework = pair.framework(total_steps=1000)
        framework(pair.collate(windows[:2]), step=0).loss.backward()
    """

    encoder: PairEncoder
    """Cuts text into windows that both tokenizers read."""
    vocabulary: VocabularyMap
    """Spells the teacher's tokens in the student's."""
    method: Method = field(default_factory=Method)
    """Loss, curriculum and router."""
    student: nn.Module | None = None
    teacher: FrozenTeacher | CachedTeacher | TeacherMixture | None = None
    tokenizers: dict[str, PreTrainedTokenizerBase] | None = None
    """Of `student` and `teacher`, as the text needs them: for conversations with a chat template."""
    members: tuple["Distillation", ...] = ()
    """With several teachers, the pair of the student and each of them; the rest of this pair is then of the first
    one, but for its windows, which hold the tokens of all."""

    @classmethod
    def from_pretrained(
        cls,
        student: str,
        teacher: str,
        max_length: int = 512,
        *,
        conversations: bool = False,
        isolate_documents: bool = False,
        method: Method | None = None,
    ) -> "Distillation":
        """Load a student in float32 and a teacher in its own precision, with their tokenizers, by transformers.

        Args:
            student, teacher: names on the hub, or folders.
            max_length: most tokens of a window, in either tokenizer; fewer where a model reads no more at once.
            conversations: the documents are conversations, each a list of messages with `role` and `content`, instead
                of plain text; the assistant's messages are learned.
            isolate_documents: documents that share a window do not see each other.

        Raises:
            OSError: a model cannot be found.
            ValueError: the two do not fit each other; see `from_models`.
        """
        tokenizers = {
            "student": AutoTokenizer.from_pretrained(student),
            "teacher": AutoTokenizer.from_pretrained(teacher),
        }
        return cls.from_models(
            _load(student, torch.float32),
            _load(teacher, "auto"),
            tokenizers,
            max_length,
            conversations=conversations,
            isolate_documents=isolate_documents,
            method=method,
        )

    @classmethod
    def from_models(
        cls,
        student: nn.Module,
        teacher: nn.Module,
        tokenizers: dict[str, PreTrainedTokenizerBase],
        max_length: int = 512,
        *,
        conversations: bool = False,
        isolate_documents: bool = False,
        method: Method | None = None,
    ) -> "Distillation":
        """Join two loaded models.

        Args:
            tokenizers: of `student` and `teacher`, by these names; fast ones (of the `tokenizers` library).
            max_length, conversations, isolate_documents: as in `from_pretrained`.

        Raises:
            TypeError: something is of another kind than it should be.
            ValueError: a tokenizer that is not fast or has tokens without a row in its model's head, or an
                encoder-decoder model beside a causal one.
        """
        expect("tokenizers", tokenizers, Mapping, '{"student": tokenizer, "teacher": tokenizer}')
        if set(tokenizers) != {"student", "teacher"}:
            names = sorted(map(str, tokenizers))
            raise ValueError(f"tokenizers: got keys {names}, expected student and teacher")
        if method is not None:
            expect("method", method, Method, "Method(loss=..., curriculum=..., router=...)")
        for role, model in (("student", student), ("teacher", teacher)):
            if not hasattr(model, "get_output_embeddings"):
                raise TypeError(
                    f"{role}: got a {type(model).__name__}, expected a language model of transformers; from names a "
                    "pair is made by from_pretrained"
                )
        if conversations:
            tokenizers, _ = tokenizers_for_chat(tokenizers)

        limits = (context_length(student), context_length(teacher))
        text = _Text(
            int(min(max_length, *limits)),
            conversations,
            rows=(vocabulary_size(student), vocabulary_size(teacher)),
            decoder_starts=_decoder_starts(student, teacher),
            isolate_documents=isolate_documents,
        )
        pair = (method or Method()).join(tokenizers, text)
        return replace(pair, student=student, teacher=pair.frozen(teacher))

    @cached_property
    def collate(self) -> PairCollator | MixedCollator:
        """The collator: windows -> a `PairedBatch`, for a DataLoader's `collate_fn` too."""
        if self.members:
            return self.collate_mixed([member.collate for member in self.members])
        router = self.method.router if self.method.compares_states else None
        return PairCollator(self.vocabulary, self.encoder.end_of_text, self.method.loss.max_depth, router)

    def windows(self, texts: Sequence[str | Conversation]) -> list[dict[str, Any]]:
        """Cut documents into windows.

        Args:
            texts: documents; of a pair made with `conversations`, lists of messages, or such lists in JSON.

        Returns:
            one dictionary per window; see `PairEncoder.windows`.

        Raises:
            TypeError: a single text in place of a list, or something in the list that is no text.
        """
        # A pair for plain text refuses everything else, conversations too.
        if self.encoder.prompt is None or not isinstance(texts, Sequence) or isinstance(texts, str):
            return self.encoder.windows(cast("list[str]", texts))  # or refuses it

        written = [_as_json(number, text) for number, text in enumerate(texts)]
        return self.encoder.windows(written)

    def batch(self, texts: Sequence[str | Conversation]) -> PairedBatch:
        """Return all windows of some documents as one batch."""
        return self.collate(self.windows(texts))

    def framework(
        self,
        total_steps: int,
        *,
        student: nn.Module | None = None,
        teacher: FrozenTeacher | CachedTeacher | TeacherMixture | None = None,
    ) -> DistillationFramework:
        """Make the module that is trained: its forward is the loss of one micro-batch.

        Args:
            total_steps: optimizer steps of the whole run, over which the curriculum's ramps stretch.
            student: trained instead of this pair's own.
            teacher: asked instead of this pair's own.

        Raises:
            ValueError: there is no student, a term needs a teacher and there is none, or the models are none that this
                vocabulary belongs to; documents are isolated, and the student reads across them.
        """
        student = student or self.student
        if student is None:
            raise ValueError("framework: got no student, neither here nor when the pair was made; give student=MODEL")

        if self.encoder.isolates:
            check_isolation(student, "student")

        method = self.method
        scheduler = CurriculumScheduler(method.curriculum, method.loss, total_steps)
        return DistillationFramework(
            student,
            teacher or self.teacher,
            self.vocabulary,
            method.loss,
            scheduler,
            method.router,
        )

    # ------------------------------------------------------- parts, for a run that puts them together

    def frozen(self, model: nn.Module) -> FrozenTeacher:
        """Make a teacher of a model.

        Raises:
            ValueError: its head has other rows than the vocabulary map, or it reads across isolated documents.
        """
        teacher = FrozenTeacher(model, self.vocabulary)
        if self.encoder.isolates:
            check_isolation(model, "teacher")
            teacher.document_attention = document_attention.choose(model)
        return teacher

    def describe_documents(self, teacher: Any) -> list[str]:
        """Return the attention with which models read isolated documents, with its reason; nothing where none are.

        Args:
            teacher: a teacher of any kind, or None.
        """
        if not self.encoder.isolates:
            return []

        lines = [f"isolated documents, attention of the student: {document_attention.STUDENT_REASON}"]
        for running in getattr(teacher, "members", [teacher]):
            # A member of a mixture and a cache have the teacher that they stand for.
            while not isinstance(running, FrozenTeacher | None):
                running = getattr(running, "teacher", None)
            if running is not None:
                lines.append(f"isolated documents, attention of the teacher: {running.document_attention.reason}")
        return lines

    def listed(self, source: Any) -> ListedTeacher:
        """Make a teacher of a source of lists, such as a server; see `ListedTeacher`."""
        return ListedTeacher(source, self.vocabulary)

    def mixture(self, teachers: Sequence[FrozenTeacher | CachedTeacher | ListedTeacher]) -> TeacherMixture:
        """Make one teacher of several, in the order of `members`."""
        parts = zip(self.members, teachers, self.method.teachers, strict=True)
        members = [Member(teacher, pair.vocabulary, share.weight) for pair, teacher, share in parts]
        return TeacherMixture(members, self.method.mix)

    def weight_of_member(self, number: int, progress: float) -> float:
        """Return the weight of one of several teachers at a progress in [0, 1]; `number` counts from 0."""
        return value_at(self.method.teachers[number].weight, progress)

    def collate_mixed(self, collators: Sequence[Collate]) -> MixedCollator:
        """Make one collator of those of several teachers, in the order of `members`."""
        only_for = tuple(share.only_for for share in self.method.teachers)
        return MixedCollator(tuple(collators), only_for)

    @staticmethod
    def window_of_member(window: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Return a window as the student and one of several teachers read it; `number` counts from 0."""
        return as_pair(window, number)

    def cached(self, teacher: FrozenTeacher | None, memory: Any, share: float = 1.0) -> CachedTeacher:
        """Make a teacher that answers from memory; see `CachedTeacher`.

        Args:
            share: of a window's positions that KD is learned at, at most, chosen by the teacher's entropy.
        """
        rows = None
        if share < 1:
            projection = Projection(self.vocabulary, self.method.loss.correction, self.method.loss.min_prefix_mass)
            rows = RowsByEntropy(projection, share)
        return CachedTeacher(teacher, memory, rows)

    @staticmethod
    def remember(
        collate: PairCollator, memory: Any, ahead: bool = True, *, is_learned: bool = False
    ) -> RememberingCollator:
        """Make a collator whose batches come with what is in memory of them; see `RememberingCollator`."""
        return RememberingCollator(collate, memory, ahead, is_learned)

    # ------------------------------------------------------- the student's own text

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens with which the student ends a text, or its turn."""
        return stop_ids(self.encoder)

    def require_own_text(self) -> None:
        """Check that the student can learn from text that it writes itself.

        Raises:
            ValueError: the models are encoder-decoders, or the student's tokens do not spell its text.
        """
        require_own_text(self.encoder)

    def own_prompt(self, window: Mapping[str, Any], tokens: int, draw: float) -> OwnPrompt | None:
        """Return the begin of a document of a window, for the student to go on from; see `models.text.own_text`."""
        return own_prompt(self.encoder, window, tokens, draw)

    def own_window(self, prompt: OwnPrompt, sampled: Sequence[int]) -> OwnText:
        """Make a window of the tokens that the student sampled behind a prompt."""
        return own_window(self.encoder, prompt, sampled)

    # ------------------------------------------------------- positions that KD is learned at

    @staticmethod
    def places_of(batch: PairedBatch, student: nn.Module, share: float) -> list[Any]:
        """Return the places of each window's positions by the student's entropy; see `models.chosen_positions`."""
        return places_of(batch, student, share)

    # ------------------------------------------------------- for the log

    @staticmethod
    def read_and_learned(window: dict[str, Any]) -> tuple[Any, Any]:
        """Return what the student reads of a window, and what of it is learned; for an example in the log."""
        return read_and_learned(window)

    def without_teacher(self) -> "Distillation":
        """Return the same pair under the LM term alone."""
        return replace(self, method=replace(self.method, curriculum=LM_ONLY), teacher=None)

    def with_counted_channel(self, windows: Sequence[dict[str, Any]]) -> "Distillation":
        """Return the pair with the channel counted on some windows, for `loss.correction: channel`."""
        if not self.members:
            return replace(self, vocabulary=self.vocabulary.with_channel(count_channel(windows)))

        members = []
        for number, member in enumerate(self.members):
            read_by_member = [as_pair(window, number) for window in windows]
            members.append(member.with_counted_channel(read_by_member))
        return replace(self, vocabulary=members[0].vocabulary, members=tuple(members))


def _as_json(number: int, document: Any) -> str:
    """Return a conversation as the encoder reads it.

    Raises:
        TypeError: it is none.
    """
    if isinstance(document, str):
        return document

    place = f"texts[{number}]"
    expected = "a list of messages, each with role and content, both text"
    if not isinstance(document, list | tuple) or not document:
        raise TypeError(f"{place}: got {type(document).__name__} {document!r:.60}, expected {expected}")
    for message in document:
        is_message = isinstance(message, Mapping)
        if not is_message or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise TypeError(f"{place}: got the message {message!r:.80}, expected {expected}")
    return json.dumps(list(document))


@dataclass(frozen=True)
class _Text:
    """The `TextSettings` of a pair of loaded models."""

    max_length: int
    conversations: bool
    rows: tuple[int, ...]
    decoder_starts: tuple[int, int] | None
    learn_from: Literal["completions", "all"] = "completions"
    learn_reasoning: bool = True
    text_starts: tuple[str | None, str | None] = (None, None)
    today: date | None = None
    cache_dir: Any = None
    isolate_documents: bool = False


def _load(name: str, dtype: torch.dtype | str) -> nn.Module:
    """Load a model with a language-model head, causal or encoder-decoder."""
    config = AutoConfig.from_pretrained(name)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(name, dtype=dtype)


def _decoder_starts(student: nn.Module, teacher: nn.Module) -> tuple[int, int] | None:
    """Return the ids that the decoders of encoder-decoder models begin with; None for causal models."""
    configs = (student.config, teacher.config)
    if not any(config.is_encoder_decoder for config in configs):
        return None
    if not all(config.is_encoder_decoder for config in configs):
        kinds = " and ".join(config.model_type for config in configs)
        raise ValueError(
            f"got an encoder-decoder model beside a causal one ({kinds}), expected two of one kind: what these two "
            "predict depends on different text"
        )
    return tuple(config.decoder_start_token_id for config in configs)
