"""Windows of encoder-decoder pairs (T5, BART), made of prompts and completions: `SourceEncoder`, `make_encoder`.

The encoders read the prompt, each in its own tokens, and the decoders the completion: theirs are the positions that are
aligned, taught and compared. A window is one example. It has the columns of `PairEncoder.windows` for what the decoders
read (what they begin with, as a marker; the completion; its end of text), and beside them `student_source` and
`teacher_source`, the ids for the encoders. The shift is that of every window: position j predicts token j + 1.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..validation import expect_texts
from .chat import ChatEncoder, ConversationSettings
from .chat_template import ConversationError, named
from .messages import Conversation
from .text_start import leading_bos
from .windows import ANY_MODEL, SIDES, ModelFacts, PairEncoder

EXPECTED = "Encoder-decoder models learn from a prompt and its completion: columns 'prompt' and 'completion'"


class SourceEncoder(PairEncoder):
    """Prompts and completions -> windows.

    An example whose prompt does not fit is left out: cut, it would be cut elsewhere by each model. A completion that
    does not fit loses its end.

    Args:
        starts: the tokens that the decoders of student and teacher begin with. A start of text (bos) follows where the
            tokenizer puts one before every text, as BART's does.

    Raises:
        ValueError: a tokenizer writes text in several languages, which nothing here names; else as `PairEncoder`.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        starts: tuple[int, int],
        facts: ModelFacts = ANY_MODEL,
    ) -> None:
        super().__init__(student_tokenizer, teacher_tokenizer, max_length, facts)
        self._set_start(0, student_tokenizer, starts[0])
        self._set_start(1, teacher_tokenizer, starts[1])

        # Windows of such a pair have other columns than those of the same tokenizers for causal models.
        content = json.dumps([self.fingerprint, "source", self.starts])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def _set_start(
        self,
        side: int,
        tokenizer: PreTrainedTokenizerBase,
        start: int,
    ) -> None:
        """Set the ids that a side's decoder reads before a text."""
        if hasattr(tokenizer, "src_lang"):
            raise ValueError(
                f"the {SIDES[side]}'s tokenizer ({type(tokenizer).__name__}) marks the languages of prompt and "
                "completion, which no column names: expected one such as T5's or BART's"
            )

        # BART's decoder begins with its start token and then a bos; T5's with its start token alone.
        bos = leading_bos(tokenizer)
        self.starts[side] = [start] if bos is None else [start, bos]
        self._require_rows(side)

    def _require_rows(self, side: int) -> None:
        """Refuse a tokenizer that frames texts with tokens which its model has no row for."""
        table = self.tables[side]
        frame = [*self.starts[side], *table.framed("a").tolist()]
        beyond = [token for token in frame if token >= table.rows]
        if beyond:
            raise ValueError(
                f"the {SIDES[side]} puts token {beyond[0]:,} around a text, but its model has only {table.rows:,} "
                "rows: expected tokens that the model has; correct its tokenizer, or its decoder_start_token_id"
            )

    def windows(self, texts: list[str], documents: list[str] | None = None) -> list[dict[str, Any]]:
        """Return one window for each example, a conversation of one prompt and one answer; see `PairEncoder.windows`.

        `left_out` counts bytes of completions whose prompt, or which themselves, do not fit.

        Raises:
            ConversationError: a conversation of something else.
        """
        expect_texts(texts, documents)
        names = documents or [""] * len(texts)

        # Bytes that are left out are told in the next window, or in the last.
        windows: list[dict[str, Any]] = []
        left_out = 0
        for name, example in zip(names, texts, strict=True):
            with named(name):
                prompt, completion = self._example(example)
            sources = [table.framed(prompt) for table in self.tables]
            window, text_bytes = self._window(name, sources, completion)

            left_out += len(completion.encode()) - text_bytes
            if window is not None:
                windows.append(window | {"left_out": left_out})
                left_out = 0

        if windows:
            windows[-1]["left_out"] += left_out
        return windows

    def _window(
        self,
        name: str,
        sources: Sequence[np.ndarray],
        completion: str,
    ) -> tuple[dict[str, Any] | None, int]:
        """Return the window of an example, None if it does not fit, and the bytes of the completion that it has."""
        readings = [table.read([completion])[0] for table in self.tables]
        pieces, _ = self._pieces(name, len(completion.encode()), readings)

        # The completion has to begin in the first piece, right behind the marker (byte -1).
        has_start = bool(pieces) and pieces[0].first_byte == -1
        if not has_start or not all(0 < len(ids) <= self.max_length for ids in sources):
            return None, 0

        window = self._assemble(pieces[:1])
        window |= {f"{side}_source": ids for side, ids in zip(SIDES, sources, strict=True)}
        return window, pieces[0].text_bytes

    def prompt(self, example: str, side: str) -> tuple[str, list[int]]:
        """Return the prompt of an example, and the ids that a side's encoder reads of it."""
        # As in a window; a longer prompt, which no window has, is cut at its end.
        prompt, _ = self._example(example)
        table = self.tables[SIDES.index(side)]
        return prompt, table.framed(prompt).tolist()[: self.max_length]

    def _example(self, conversation: str) -> tuple[str, str]:
        """Return (prompt, completion) of a conversation that has these two messages and no other."""
        parsed = Conversation.parse(conversation)
        messages = parsed.messages
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"]:
            raise ConversationError(f"{EXPECTED}. Got a conversation of {', '.join(roles)}.")
        if any("reasoning_content" in message for message in messages):
            raise ConversationError(
                f"{EXPECTED}. Got thinking (reasoning_content) besides, which would not be learned."
            )

        others = {
            "tools": parsed.tools,
            "chat_template_kwargs": parsed.variables,
            "teacher_messages": parsed.teacher_messages,
            "tool_calls": any(message.get("tool_calls") for message in messages),
        }
        present = [name for name, value in others.items() if value]
        if present:
            raise ConversationError(f"{EXPECTED}. Got {', '.join(present)} besides, which these models do not read.")

        question, answer = messages
        return question["content"], self.canonical(answer["content"])


def make_encoder(
    pair: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    max_length: int,
    *,
    conversations: ConversationSettings | None,
    starts: tuple[int, int] | None,
    facts: ModelFacts = ANY_MODEL,
) -> PairEncoder:
    """Return the encoder for a family of models and a kind of text.

    Args:
        pair: tokenizers of student and teacher.
        conversations: how they are learned, where the texts are conversations, as prompts and completions are, too;
            None for plain text.
        starts: as in `SourceEncoder`; None for causal models.

    Raises:
        ConversationError: plain text for an encoder-decoder pair.
        ValueError: see the encoders.
    """
    student, teacher = pair
    is_causal = starts is None

    if is_causal and conversations is not None:
        return ChatEncoder(
            student,
            teacher,
            max_length,
            conversations.learn_from,
            conversations.today,
            facts,
            learn_reasoning=conversations.learn_reasoning,
        )
    if is_causal:
        return PairEncoder(student, teacher, max_length, facts)

    # A prompt and its completion arrive as a conversation of two messages.
    if conversations is None:
        raise ConversationError(f"{EXPECTED}. Got plain text.")
    return SourceEncoder(student, teacher, max_length, starts, facts)
