"""Documents of all sources of a stream, mixed or in turn, without those that are empty, repeated or held out.

What comes when is a pure function of the texts, of the seed and of the number of documents drawn before.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from typing import Any

from ...config.settings import DataConfig
from ...errors import UserError
from ..conversations import text_of_messages
from ..documents import FirstPlaces, text_key
from .reader import Reader, Source, open_source
from .recent import RecentTexts

COUNTED = ("read", "empty", "duplicate", "in_eval", "train", "train_bytes")
"""Documents, and bytes, that are counted; as in `documents.Corpus.report`."""


@dataclass(frozen=True)
class TextSources:
    """The training text of a stream, opened but not read."""

    config: DataConfig
    seed: int
    """Of the mixture."""
    sources: Sequence[Source]
    """In the order of `config.train`."""
    places: FirstPlaces = field(default_factory=FirstPlaces)
    """Of the first document of each kind: all are of one kind."""

    @classmethod
    def of(cls, config: DataConfig, seed: int) -> "TextSources":
        """Open the sources of a run.

        Raises:
            UserError: one of them is not there.
        """
        return cls(config, seed, [open_source(config, name) for name in config.train])

    @property
    def weights(self) -> list[float] | None:
        """Weights of the sources; None: they are read in turn."""
        mixture = self.config.mixture
        return None if mixture is None else [mixture[name] for name in self.config.train]


class TextStream:
    """Documents of a stream, without end.

    Args:
        held_out: `documents.text_key` of documents that are never learned from.
        once: sources of a mixture that have ended are drawn from no more.

    Attributes:
        counts: of documents so far, by `COUNTED`.
        readers: one for each source.
    """

    def __init__(self, text: TextSources, held_out: Collection[bytes] = (), *, once: bool = False) -> None:
        config = text.config
        named = zip(text.sources, config.train, strict=True)
        self.config = config
        self.readers = [Reader(config, source, name, text.places) for source, name in named]
        self.counts = dict.fromkeys(COUNTED, 0)
        self.drawn = 0
        self._text = text
        self._held_out = held_out
        self._once = once
        self._empty_blocks = 0
        self._recent = RecentTexts(config.remembered_documents) if config.deduplicate else None

    @property
    def passes(self) -> int:
        """Passes over the text that are done: those of the source that was read least often."""
        return min(reader.passes for reader in self.readers)

    def block(self, size: int) -> Iterator[str]:
        """Yield documents of so many bytes; fewer where every source comes to its end meanwhile.

        Raises:
            UserError: a document cannot be read, or there are none to learn from.
        """
        begun = [reader.passes for reader in self.readers]
        end = self.counts["train_bytes"] + size
        first = self.counts["train"]
        while self.counts["train_bytes"] < end:
            text = self._draw()
            if text is not None:
                yield text

            passes = [reader.passes for reader in self.readers]
            if all(now > before for now, before in zip(passes, begun, strict=True)):
                break

        # Otherwise it would be read for ever. The first of two may have begun in the middle of a source.
        self._empty_blocks = 0 if self.counts["train"] > first else self._empty_blocks + 1
        if self._empty_blocks > 1:
            counted = ", ".join(f"{name} {number:,}" for name, number in self.counts.items())
            raise UserError(
                f"{', '.join(self.config.train)}: nothing to learn from in a whole pass over the text ({counted}). "
                "Expected documents that are neither empty nor held out nor copies of one another."
            )

    def _draw(self) -> str | None:
        """Return the next document; None where it is left out."""
        reader = self.readers[self._source()]
        passes = reader.passes
        text = reader.take()
        self.drawn += 1

        self.counts["read"] += 1
        if reason := self._reason_to_leave_out(text, passes):
            self.counts[reason] += 1
            return None

        self.counts["train"] += 1
        is_conversation = self._text.places.conversation is not None
        spoken = text_of_messages(text) if is_conversation else text
        self.counts["train_bytes"] += len(spoken.encode())
        return text

    def _reason_to_leave_out(self, text: str, passes: int) -> str | None:
        """Return why a document is not learned from, as it is counted; None: it is."""
        if not text.strip():
            return "empty"
        if text_key(text) in self._held_out:
            return "in_eval"
        if self._recent is not None and self._recent.add(text, passes):
            return "duplicate"
        return None

    def _source(self) -> int:
        """Return the number of the source that the next document is drawn from."""
        weights = self._text.weights
        if weights is None:
            # In turn: the first one that has been read less often than those before it.
            return [reader.passes for reader in self.readers].index(self.passes)

        if self._once:
            weights = [0.0 if reader.passes else weight for weight, reader in zip(weights, self.readers, strict=True)]
        digest = blake2b(f"{self._text.seed} {self.drawn}".encode(), digest_size=8).digest()
        chosen = int.from_bytes(digest, "big") / 2**64 * sum(weights)
        bounds = accumulate(weights)
        return next((number for number, bound in enumerate(bounds) if chosen < bound), len(weights) - 1)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next documents depend on, as a checkpoint holds it."""
        return {
            "readers": [reader.state_dict() for reader in self.readers],
            "counts": dict(self.counts),
            "drawn": self.drawn,
            "recent": None if self._recent is None else self._recent.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a stream of the same text was."""
        for reader, saved in zip(self.readers, state["readers"], strict=True):
            reader.load_state_dict(saved)
        self.counts = dict(state["counts"])
        self.drawn = state["drawn"]
        if self._recent is not None:
            self._recent.load_state_dict(state["recent"])
