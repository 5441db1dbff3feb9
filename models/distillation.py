"""A pair of a student and a teacher, with all that lies between their two vocabularies, in one object."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from .config import CurriculumConfig, LossConfig, RouterConfig
from .curriculum import CurriculumScheduler
from .distillation_framework import DistillationFramework
from .language_model import vocabulary_size
from .student_aware_router import ROUTER_TERMS
from .teacher.cached import CachedTeacher
from .teacher.frozen import FrozenTeacher
from .text.chat_template import tokenizers_for_chat
from .text.collate import PairCollator
from .text.encoder_decoder import make_encoder
from .text.vocabulary import VocabularyMap
from .text.windows import ModelFacts, PairEncoder
from .types import PairedBatch

Conversation = list[Mapping[str, Any]]
"""Messages with `role` and `content`."""


@dataclass(frozen=True, eq=False)
class Distillation:
    """What a student learns, and from whom.

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
    loss: LossConfig = field(default_factory=LossConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    """For the terms on hidden states, if the curriculum uses any."""
    student: nn.Module | None = None
    teacher: FrozenTeacher | CachedTeacher | None = None
    tokenizers: dict[str, PreTrainedTokenizerBase] | None = None
    """Of `student` and `teacher`, as the text needs them: for conversations with a chat template."""

    @classmethod
    def from_pretrained(
        cls,
        student: str,
        teacher: str,
        max_length: int = 512,
        *,
        conversations: bool = False,
        loss: LossConfig | None = None,
        curriculum: CurriculumConfig | None = None,
        router: RouterConfig | None = None,
    ) -> "Distillation":
        """Load a student in float32 and a teacher in its own precision, with their tokenizers, by transformers.

        Args:
            student, teacher: names on the hub, or folders.
            max_length: tokens of a window, in either tokenizer.
            conversations: the documents are conversations, each a list of messages with `role` and `content`, instead
                of plain text; the assistant's messages are learned.

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
            loss=loss,
            curriculum=curriculum,
            router=router,
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
        loss: LossConfig | None = None,
        curriculum: CurriculumConfig | None = None,
        router: RouterConfig | None = None,
    ) -> "Distillation":
        """Join two loaded models.

        Args:
            tokenizers: of `student` and `teacher`, by these names; fast ones (of the `tokenizers` library).
            max_length, conversations: as in `from_pretrained`.

        Raises:
            TypeError: something is of another kind than it should be.
            ValueError: a tokenizer that is not fast or has tokens without a row in its model's head, or an
                encoder-decoder model beside a causal one.
        """
        if set(tokenizers) != {"student", "teacher"}:
            raise ValueError(f"tokenizers: got keys {sorted(tokenizers)}, expected student and teacher")
        if conversations:
            tokenizers, _ = tokenizers_for_chat(tokenizers)

        both = (tokenizers["student"], tokenizers["teacher"])
        rows = (vocabulary_size(student), vocabulary_size(teacher))
        encoder = make_encoder(
            both,
            max_length,
            conversations=conversations,
            learn_from="completions",
            starts=_decoder_starts(student, teacher),
            facts=ModelFacts(rows),
        )
        vocabulary = VocabularyMap.build(*both, *rows)
        return cls(
            encoder=encoder,
            vocabulary=vocabulary,
            loss=loss or LossConfig(),
            curriculum=curriculum or CurriculumConfig(),
            router=router or RouterConfig(),
            student=student,
            teacher=FrozenTeacher(teacher, vocabulary),
            tokenizers=tokenizers,
        )

    @property
    def compares_states(self) -> bool:
        """True if the curriculum uses terms on hidden states."""
        return bool(self.curriculum.used() & {*ROUTER_TERMS})

    @cached_property
    def collate(self) -> PairCollator:
        """The collator: windows -> a `PairedBatch`, for a DataLoader's `collate_fn` too."""
        router = self.router if self.compares_states else None
        return PairCollator(self.vocabulary, self.encoder.end_of_text, self.loss.max_depth, router)

    def windows(self, texts: Sequence[str | Conversation]) -> list[dict[str, Any]]:
        """Cut documents into windows.

        Args:
            texts: documents; of a pair made with `conversations`, lists of messages, or such lists in JSON.

        Returns:
            one dictionary per window; see `PairEncoder.windows`.

        Raises:
            TypeError: a single text in place of a list, or something in the list that is no text.
        """
        if isinstance(texts, str):
            return self.encoder.windows(texts)  # which refuses it

        return self.encoder.windows([json.dumps(text) if isinstance(text, list) else text for text in texts])

    def batch(self, texts: Sequence[str | Conversation]) -> PairedBatch:
        """Return all windows of some documents as one batch."""
        return self.collate(self.windows(texts))

    def framework(
        self,
        total_steps: int,
        *,
        student: nn.Module | None = None,
        teacher: FrozenTeacher | CachedTeacher | None = None,
    ) -> DistillationFramework:
        """Make the module that is trained: its forward is the loss of one micro-batch.

        Args:
            total_steps: optimizer steps of the whole run, over which the curriculum's ramps stretch.
            student: trained instead of this pair's own.
            teacher: asked instead of this pair's own.

        Raises:
            ValueError: there is no student, a term needs a teacher and there is none, or the models are none that this
                vocabulary belongs to.
        """
        student = student or self.student
        if student is None:
            raise ValueError("framework: got no student, neither here nor when the pair was made; give student=MODEL")

        scheduler = CurriculumScheduler(self.curriculum, self.loss, total_steps)
        return DistillationFramework(
            student,
            teacher or self.teacher,
            self.vocabulary,
            self.loss,
            scheduler,
            self.router,
        )


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
