"""Two tokenisations of one text -> anchors and spans.

Everything is done on byte offsets. Student position j has read tokens 0..j and is about to predict token
j + 1, which starts at byte x. Let a be the last start of a teacher token at or before x. If a student token
starts at a as well, the *anchor* of j is the teacher position about to predict the token at a, and the *depth*
is the number of student tokens between a and x. Both models have read the same bytes at a.

A *span* is the text between two consecutive common boundaries.

Equal tokenizers give a text the same ids. These are aligned one by one whatever bytes they stand for, so that unknown
and dropped text has anchors too.

Shapes: S student tokens of a window, T teacher tokens, N anchored student positions.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .tokens import END, MARKER, MISMATCH, Reading
from .vocabulary import VocabularyMap


@dataclass(frozen=True)
class Alignment:
    """Anchored student positions (N rows) and spans of one window."""

    student: np.ndarray
    """[N] student position j."""
    teacher: np.ndarray
    """[N] its anchor, a teacher position."""
    depth: np.ndarray
    """[N] student tokens between the anchor and the position."""
    prefix_lo: np.ndarray
    """[N] first rank of the teacher tokens that begin with the `depth` student tokens read."""
    prefix_hi: np.ndarray
    """[N] their last rank, plus 1."""
    pieces: np.ndarray
    """[N] teacher tokens, from the anchor's on, up to the end of token j + 1; 0: no common end."""
    student_spans: np.ndarray
    """[S] index of the span that holds the token predicted at each position, or -1."""
    teacher_spans: np.ndarray
    """[T] the same for the teacher."""
    spans: int
    """Number of spans."""

    def rows(self, index: np.ndarray) -> "Alignment":
        """Return some of the rows, and all spans."""
        return replace(
            self,
            student=self.student[index],
            teacher=self.teacher[index],
            depth=self.depth[index],
            prefix_lo=self.prefix_lo[index],
            prefix_hi=self.prefix_hi[index],
            pieces=self.pieces[index],
        )


def align(
    student: Reading,
    teacher: Reading,
    vocabulary: VocabularyMap,
    max_depth: int,
) -> Alignment:
    """Anchor every student position of a window that can be anchored.

    A position has no anchor where the last teacher boundary is no student boundary, where a normaliser or an
    unknown token changed the bytes, deeper than `max_depth`, and where no teacher token (or not the real one)
    begins with what the student has read.
    """
    # Where one side predicts nothing, nothing is compared.
    student_tokens = _predicted(student)
    teacher_tokens = _predicted(teacher)
    if not (len(student_tokens) and len(teacher_tokens)):
        student_tokens = teacher_tokens = np.zeros(0, dtype=np.int64)

    # Both ways of matching count tokens among the predicted ones.
    student_text = student.select(student_tokens)
    teacher_text = teacher.select(teacher_tokens)
    if vocabulary.equal_tokenizers and _same_tokens(student_text, teacher_text):
        match = _one_by_one(len(student_text.ids), len(vocabulary.order))
    else:
        match = _by_bytes(student_text, teacher_text, vocabulary, max_depth)

    # The position that predicts a token is the one before it.
    student_spans = np.full(len(student.ids), -1)
    teacher_spans = np.full(len(teacher.ids), -1)
    student_spans[student_tokens - 1] = match.student_spans
    teacher_spans[teacher_tokens - 1] = match.teacher_spans
    return replace(
        match,
        student=student_tokens[match.student] - 1,
        teacher=teacher_tokens[match.teacher] - 1,
        student_spans=student_spans,
        teacher_spans=teacher_spans,
    )


def _predicted(reading: Reading) -> np.ndarray:
    """Return the indices of the tokens that are predicted."""
    tokens = np.flatnonzero(reading.roles != MARKER)
    return tokens[tokens > 0]  # nothing stands before the first token to predict it from


def _same_tokens(student: Reading, teacher: Reading) -> bool:
    """Return whether both sides predict the same ids; ends of text may differ, since each side has its own."""
    if len(student.ids) != len(teacher.ids):
        return False

    student_ends = student.roles == END
    teacher_ends = teacher.roles == END
    if not (student_ends == teacher_ends).all():
        return False

    is_text = ~student_ends
    return bool((student.ids[is_text] == teacher.ids[is_text]).all())


def _one_by_one(tokens: int, teacher_vocabulary: int) -> Alignment:
    """Match every predicted token with its like, as a span of its own; rows are tokens, not positions."""
    # at depth 0 nothing is read since the anchor: the range of ranks is the whole vocabulary
    token = np.arange(tokens)
    zero = np.zeros(tokens, dtype=np.int64)
    return Alignment(
        student=token,
        teacher=token,
        depth=zero,
        prefix_lo=zero,
        prefix_hi=np.full(tokens, teacher_vocabulary),
        pieces=np.ones(tokens, dtype=np.int64),
        student_spans=token,
        teacher_spans=token,
        spans=tokens,
    )


class _Anchors(NamedTuple):
    """Predicted student tokens with an anchor."""

    student: np.ndarray
    """[N] index of the student's token."""
    teacher: np.ndarray
    """[N] index of the teacher's token that starts at the anchor."""
    depth: np.ndarray
    """[N] student tokens between the two starts."""

    def select(self, rows: np.ndarray) -> "_Anchors":
        return _Anchors(
            student=self.student[rows],
            teacher=self.teacher[rows],
            depth=self.depth[rows],
        )


def _by_bytes(
    student: Reading,
    teacher: Reading,
    vocabulary: VocabularyMap,
    max_depth: int,
) -> Alignment:
    """Match predicted tokens of both sides that start at the same bytes; rows are tokens, not positions."""
    anchors = _anchors(student, teacher, max_depth)
    prefix = _prefix_ranks(student.ids, teacher.ids, anchors, vocabulary)
    anchors = anchors.select(prefix.holds_teacher)
    spans = _spans(student, teacher)
    return Alignment(
        student=anchors.student,
        teacher=anchors.teacher,
        depth=anchors.depth,
        prefix_lo=prefix.lo[prefix.holds_teacher],
        prefix_hi=prefix.hi[prefix.holds_teacher],
        pieces=_pieces(student, teacher, anchors),
        student_spans=spans.student,
        teacher_spans=spans.teacher,
        spans=spans.number,
    )


def _anchors(student: Reading, teacher: Reading, max_depth: int) -> _Anchors:
    """Find the anchor of every predicted student token that has one."""
    # The last teacher token that starts at or before the student token.
    row = np.arange(len(student.ids))
    teacher_token = np.searchsorted(teacher.starts, student.starts, side="right") - 1
    is_text = (teacher_token >= 0) & (student.roles != MISMATCH)
    row = row[is_text]
    teacher_token = teacher_token[is_text]

    # It must reach to the student token: behind it there may be text that the teacher does not read.
    reaches = student.starts[row] < teacher.ends[teacher_token]
    reaches &= teacher.roles[teacher_token] != MISMATCH
    row = row[reaches]
    teacher_token = teacher_token[reaches]

    # A student token must start where the teacher's does; the depth is counted from it.
    anchor_bytes = teacher.starts[teacher_token]
    first = np.searchsorted(student.starts, anchor_bytes)
    depth = row - first
    is_anchored = (depth >= 0) & (depth <= max_depth)
    # indexed by the mask, since `first` may lie behind the last token elsewhere
    is_anchored[is_anchored] = student.starts[first[is_anchored]] == anchor_bytes[is_anchored]
    return _Anchors(row, teacher_token, depth).select(is_anchored)


class _PrefixRanks(NamedTuple):
    """Teacher tokens that begin with the student tokens read since the anchor, as ranks in the vocabulary map."""

    lo: np.ndarray
    """[N] first rank."""
    hi: np.ndarray
    """[N] last rank, plus 1."""
    holds_teacher: np.ndarray
    """[N] true where the token that the teacher reads is among them."""


def _prefix_ranks(
    student_ids: np.ndarray, teacher_ids: np.ndarray, anchors: _Anchors, vocabulary: VocabularyMap
) -> _PrefixRanks:
    """Walk down the tree of spellings, one student token since the anchor after another."""
    node = np.zeros(len(anchors.student), dtype=np.int64)
    first = anchors.student - anchors.depth
    deepest = int(anchors.depth.max(initial=0))
    for step in range(deepest):
        deeper = np.flatnonzero(anchors.depth > step)
        token = student_ids[first[deeper] + step]
        node[deeper] = vocabulary.descend(node[deeper], token)

    lo = vocabulary.node_lo[node]
    hi = vocabulary.node_hi[node]
    rank = vocabulary.rank[teacher_ids[anchors.teacher]]
    # At depth 0 nothing is read since the anchor, so that every token of the teacher agrees with it.
    is_in_range = (lo <= rank) & (rank < hi)
    agrees = is_in_range | (anchors.depth == 0)
    return _PrefixRanks(
        lo=lo,
        hi=hi,
        holds_teacher=(node >= 0) & agrees,
    )


def _pieces(student: Reading, teacher: Reading, anchors: _Anchors) -> np.ndarray:
    """Count the teacher tokens, from the anchor's on, up to the end of the student's token.

    Returns:
        [N] 0 where no teacher token ends there, or where the teacher's tokens up to there leave bytes out.
    """
    if not len(anchors.student):
        return np.zeros(0, dtype=np.int64)
    first = anchors.teacher
    end = student.ends[anchors.student]
    last = np.searchsorted(teacher.ends, end)
    last = np.minimum(last, len(teacher.ends) - 1)

    # Two tokens with the same number of breaks up to them have none in between.
    ends_before = np.append(teacher.starts[:1], teacher.ends[:-1])
    is_break = (teacher.roles == MISMATCH) | (ends_before != teacher.starts)
    breaks = np.cumsum(is_break)
    is_unbroken = (last >= first) & (breaks[last] == breaks[first])
    ends_alike = teacher.ends[last] == end
    return np.where(is_unbroken & ends_alike, last - first + 1, 0)


class _Spans(NamedTuple):
    """Spans between common boundaries that both sides cover, byte for byte."""

    student: np.ndarray
    """Span of each predicted student token, or -1."""
    teacher: np.ndarray
    """Span of each predicted teacher token, or -1."""
    number: int


def _spans(student: Reading, teacher: Reading) -> _Spans:
    """Number the spans, and find that of every predicted token."""
    boundaries = np.union1d(
        np.intersect1d(student.starts, teacher.starts),
        np.intersect1d(student.ends, teacher.ends),
    )
    if len(boundaries) < 2:
        return _Spans(
            student=np.full(len(student.ids), -1),
            teacher=np.full(len(teacher.ids), -1),
            number=0,
        )

    # A stretch between two boundaries is a span if neither side leaves bytes of it out or changes them.
    stretches = []
    is_span = np.ones(len(boundaries) - 1, dtype=bool)
    for side in (student, teacher):
        stretch = np.searchsorted(boundaries, side.starts, side="right") - 1
        inside = (stretch >= 0) & (stretch < len(is_span))
        stretches.append(np.where(inside, stretch, -1))

        lengths = side.ends - side.starts
        is_changed = side.roles == MISMATCH
        covered = np.bincount(stretch[inside], lengths[inside], minlength=len(is_span))
        changed = np.bincount(stretch[inside], is_changed[inside], minlength=len(is_span))
        is_span &= covered == np.diff(boundaries)
        is_span &= changed == 0

    # The last entry is what index -1 finds: tokens of no stretch are in no span.
    numbers = np.where(is_span, np.cumsum(is_span) - 1, -1)
    numbers = np.append(numbers, -1)
    return _Spans(
        student=numbers[stretches[0]],
        teacher=numbers[stretches[1]],
        number=int(is_span.sum()),
    )


def paired_tokens(student: Reading, teacher: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Return (teacher tokens, student tokens) that start at the same byte: the channel is counted on them."""
    student_text = _unchanged_text(student)
    teacher_text = _unchanged_text(teacher)
    _, i, j = np.intersect1d(teacher_text.starts, student_text.starts, return_indices=True)
    return teacher_text.ids[i], student_text.ids[j]


def _unchanged_text(reading: Reading) -> Reading:
    """Return the tokens that are predicted and whose bytes are those of the text, ends of text included."""
    is_supervised = reading.roles != MARKER
    is_unchanged = reading.roles != MISMATCH
    return reading.select(is_supervised & is_unchanged)
