"""One model's tokens of a conversation, with their roles and their bytes in the stream of both (`chat_places`).

What both models write has the bytes of the stream. Markup that a model must write has role WRITTEN: it is learned from
the text alone. All other tokens have role MARKER: they are read and are no targets.
"""

import bisect
import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from .chat_places import Field, Place
from .chat_template import ChatTemplate, ConversationError, Segment
from .chat_turns import control_tokens
from .messages import BREAK, MARK
from .tokens import END, MARKER, WRITTEN, Reading, TokenTable

Span = tuple[int, int]
"""(begin, end) in characters of a text."""


class Edge(NamedTuple):
    """A character of a text that no token may lie across."""

    position: int
    after_space: bool
    """True if a token may begin with the space before it."""


class Tokens(NamedTuple):
    """A tokenised text; all but the ids counts characters from its begin."""

    text: str
    ids: list[int]
    offsets: list[Span]
    """Of the tokens."""
    spans: list[Span]
    """Of the segments that the text is made of."""
    edges: list[Edge]

    def within(self, span: Span) -> slice:
        """Return the tokens of a span of the text."""
        begin, end = span
        first = bisect.bisect_right(self.offsets, begin, key=_end_of)
        last = bisect.bisect_left(self.offsets, end, key=_begin_of)
        return slice(first, max(first, last))

    def joined(self, table: TokenTable) -> bool:
        """Return whether a token lies across one of the edges."""
        return any(self._is_crossed(edge, table) for edge in self.edges)

    def _is_crossed(self, edge: Edge, table: TokenTable) -> bool:
        """Return whether a token lies across an edge."""
        # offsets are in the order of the text: earlier tokens end before the edge
        first = bisect.bisect_right(self.offsets, edge.position, key=_end_of)
        for token_id, (begin, end) in zip(self.ids[first:], self.offsets[first:], strict=True):
            if begin >= edge.position:
                return False
            follows_space = edge.after_space and begin == edge.position - 1 and self.text[begin] == " "
            writes_space = follows_space and table.bytes[token_id][:1] == b" "
            if end > edge.position and not writes_space:
                return True
        return False


def _begin_of(span: Span) -> int:
    return span[0]


def _end_of(span: Span) -> int:
    return span[1]


class ChatSide:
    """One model's reading of conversations."""

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        table: TokenTable,
        *,
        learn_reasoning: bool = True,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.table = table
        self.template = ChatTemplate(name, tokenizer, learn_reasoning=learn_reasoning)
        self.aliases = {token: f"{MARK}{n}{MARK}" for n, token in enumerate(control_tokens(tokenizer))}
        """Other names of the control tokens, which no content holds."""

    def __getstate__(self) -> dict[str, Any]:
        cached = ("_backend", "_break", "controls")
        return {name: value for name, value in self.__dict__.items() if name not in cached}

    # ------------------------------------------------------------ the tokenizer

    @functools.cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        """The tokenizer with other names for its control tokens, so that in contents the usual names are text."""
        spec = self.table.spec
        vocab = spec["model"]["vocab"]

        # The names in all places where a tokenizer has them; Unigram's vocabulary is a list with scores.
        if isinstance(vocab, dict):
            vocab = {self._renamed(token): token_id for token, token_id in vocab.items()}
        else:
            vocab = [[self._renamed(token), score] for token, score in vocab]

        model = spec["model"] | {"vocab": vocab}
        if model.get("unk_token"):
            model["unk_token"] = self._renamed(model["unk_token"])
        added = [token | {"content": self._renamed(token["content"])} for token in spec["added_tokens"]]

        # A template writes everything that stands around a text: the tokenizer adds nothing.
        renamed = spec | {"model": model, "added_tokens": added, "post_processor": None}
        backend = tokenizers.Tokenizer.from_str(json.dumps(renamed))
        backend.add_tokens([tokenizers.AddedToken(BREAK, normalized=False)])
        return backend

    def _renamed(self, token: str) -> str:
        return self.aliases.get(token, token)

    @functools.cached_property
    def _break(self) -> int:
        """Token between texts that no token may join; it is left out of what the model reads."""
        return self._backend.token_to_id(BREAK)

    @functools.cached_property
    def controls(self) -> re.Pattern:
        """Pattern of the control tokens; of nothing where there are none."""
        return re.compile("|".join(map(re.escape, self.aliases)) or "(?!)")

    def _with_aliases(self, piece: Segment) -> str:
        """Return the text of a segment, in which control tokens are tokens only where the template writes them."""
        if piece.field is not None:
            return piece.text
        return self.controls.sub(lambda match: self.aliases[match[0]], piece.text)

    # ------------------------------------------------------------ renderings -> tokens

    def tokenise(self, pieces: Sequence[Segment], contents: Iterable[Field]) -> Tokens:
        """Tokenise a rendering as the tokenizer reads the whole text.

        Only where a token would lie across the begin or the end of what is learned, or of a content (but for one space
        in front that the model writes itself), these are read apart, as they are when the model answers.
        """
        fields = set(contents)
        tokens = self._tokenise(pieces, fields, apart=False)
        self._require_rows(tokens.ids)
        if tokens.joined(self.table):
            tokens = self._tokenise(pieces, fields, apart=True)
            self._require_rows(tokens.ids)
        return tokens

    def _require_rows(self, ids: list[int]) -> None:
        """Refuse a template that writes special tokens which the model has no row for."""
        beyond = [token_id for token_id in ids if token_id >= self.table.rows]
        if beyond:
            raise ConversationError(
                f"the {self.name}'s chat template writes {self.tokenizer.convert_ids_to_tokens(beyond[0])!r}, token "
                f"{beyond[0]:,}, but its model has only {self.table.rows:,} rows. Expected a template of tokens that "
                "the model has; give the model rows with resize_token_embeddings, or another template."
            )

    def _tokenise(
        self,
        pieces: Sequence[Segment],
        contents: set[Field],
        *,
        apart: bool,
    ) -> Tokens:
        """Tokenise a rendering; `apart`: no token joins the texts on both sides of an edge."""
        text = ""
        spans = []
        edges = []
        for number, piece in enumerate(pieces):
            before = pieces[number - 1] if number > 0 else piece
            after = pieces[number + 1] if number + 1 < len(pieces) else piece

            # Edges lie before contents and stretches, and behind contents that no other content follows.
            is_aligned = piece.field in contents
            begins_stretch = piece.stretch is not None and piece.stretch != before.stretch
            has_edge_before = is_aligned or begins_stretch
            has_edge_behind = is_aligned and (after.stretch != piece.stretch or after.field not in contents)

            if has_edge_before and apart:
                text += BREAK
            begin = len(text)
            text += self._with_aliases(piece)
            spans.append((begin, len(text)))

            if has_edge_before:
                edges.append(Edge(begin, after_space=_may_begin_with_space(piece, before, is_aligned)))
            if has_edge_behind:
                edges.append(Edge(len(text), after_space=False))
                if apart:
                    text += BREAK

        # The model does not read the breaks, but its tokens lie between them.
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = []
        offsets = []
        for token_id, span in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id != self._break:
                ids.append(token_id)
                offsets.append(span)
        return Tokens(
            text=text,
            ids=ids,
            offsets=offsets,
            spans=spans,
            edges=edges,
        )

    def read(self, pieces: Sequence[Segment], places: Sequence[Place]) -> Reading:
        """Return all tokens of a rendering; those that are learned lie on the stream's bytes."""
        fields = [content.field for place in places for content in place.contents]
        writer = _Writer(self.table, self.tokenise(pieces, fields))
        for number, place in enumerate(places):
            indices = [index for index, piece in enumerate(pieces) if piece.stretch == number]
            writer.stretch(pieces, indices, place)
        return writer.reading()

    def prompt(
        self,
        pieces: Sequence[Segment],
        contents: Sequence[Field],
        stretch: int,
    ) -> list[int]:
        """Return the ids of all that stands before a stretch."""
        tokens = self.tokenise(pieces, contents)
        first = next(index for index, piece in enumerate(pieces) if piece.stretch == stretch)
        return tokens.ids[: tokens.within(tokens.spans[first]).start]


def _may_begin_with_space(piece: Segment, before: Segment, is_aligned: bool) -> bool:
    """Return whether the first token of a segment may begin with the last character before it.

    A space of the generation prompt is a token of its own when a model is asked; one that the model writes is not.
    """
    return is_aligned and bool(piece.text) and piece.stretch == before.stretch


class _Writer:
    """Roles and bytes of the tokens of a rendering, stretch by stretch."""

    def __init__(self, table: TokenTable, tokens: Tokens) -> None:
        count = len(tokens.ids)
        self.table = table
        self.tokens = tokens
        self.starts = np.zeros(count, dtype=np.int64)
        self.ends = np.zeros(count, dtype=np.int64)
        self.roles = np.full(count, MARKER, dtype=np.int8)

        self.placed = 0
        """Tokens that have their role and bytes."""
        self.byte = 0
        """Byte of the stream behind them."""

    def stretch(
        self,
        pieces: Sequence[Segment],
        indices: Sequence[int],
        place: Place,
    ) -> None:
        """Place the tokens of a learned stretch, and those between it and the one before.

        Args:
            pieces: all segments of the rendering.
            indices: those of the stretch.
            place: of the stretch in the stream of bytes.
        """
        spans = self.tokens.spans

        # Before the stretch: tokens that are read and not learned.
        begin = self.tokens.within(spans[indices[0]]).start
        self._fill_up_to(begin, MARKER, self.byte)

        # Its contents, each behind markup that is learned and has no bytes.
        contents = {content.field: content for content in place.contents}
        for index in indices:
            content = contents.get(pieces[index].field)
            if content is not None:
                inside = self.tokens.within(spans[index])
                self._fill_up_to(inside.start, WRITTEN, content.lead)
                self._place_content(pieces[index].text, inside, spans[index][0], content.begin)
                self.byte = content.begin + content.size

        # A stretch without an end of the turn ends with a content.
        last = indices[-1]
        if pieces[last].field is None:
            self._place_end(spans[last], place)
        self.byte = place.end + 1

    def _place_content(
        self,
        text: str,
        inside: slice,
        first: int,
        begin: int,
    ) -> None:
        """Place the tokens of a content.

        Args:
            text: the content.
            inside: its tokens.
            first: its first character in the whole text.
            begin: its first byte in the stream.
        """
        # a token may begin with the space before the content
        offsets = []
        for token_begin, token_end in self.tokens.offsets[inside]:
            offsets.append((max(token_begin - first, 0), token_end - first))
        reading = self.table.place(text, self.tokens.ids[inside], offsets)
        self.starts[inside] = reading.starts + begin
        self.ends[inside] = reading.ends + begin
        self.roles[inside] = reading.roles
        self.placed = inside.stop

    def _place_end(self, span: Span, place: Place) -> None:
        """Place the tokens behind the last content of a stretch: markup and, last of all, the end of the turn."""
        inside = self.tokens.within(span)
        is_empty = inside.stop <= inside.start
        if is_empty or self.tokens.ids[inside.stop - 1] != self.table.end_of_text or not place.ends_alike:
            self._fill_up_to(max(inside.stop, self.placed), WRITTEN, self.byte)
            return

        self._fill_up_to(inside.stop - 1, WRITTEN, self.byte)
        self.starts[self.placed] = place.end
        self.ends[self.placed] = place.end + 1
        self.roles[self.placed] = END
        self.placed += 1

    def _fill_up_to(
        self,
        stop: int,
        role: int,
        byte: int,
    ) -> None:
        """Give the tokens before `stop` that have no place yet this role, and no bytes."""
        rest = slice(self.placed, max(stop, self.placed))
        self.starts[rest] = byte
        self.ends[rest] = byte
        self.roles[rest] = role
        self.placed = rest.stop

    def reading(self) -> Reading:
        """Return all tokens; those behind the last stretch are read, and no targets."""
        self._fill_up_to(len(self.tokens.ids), MARKER, self.byte)
        ids = np.array(self.tokens.ids, dtype=np.int64)
        return Reading(
            ids=ids,
            starts=self.starts,
            ends=self.ends,
            roles=self.roles,
        )
