"""Two tokenisations of one text -> anchors and spans.

Everything is done on byte offsets. Student position j has read tokens 0..j and is about to predict token
j + 1, which starts at byte x. Let a be the last start of a teacher token at or before x. If a student token
starts at a as well, the *anchor* of j is the teacher position about to predict the token at a, and the *depth*
is the number of student tokens between a and x. Both models have read the same bytes at a.

A *span* is the text between two consecutive common boundaries.

Equal tokenizers give a text the same ids. These are aligned one by one whatever bytes they stand for, so that unknown
and dropped text has anchors too.
"""

from dataclasses import dataclass, replace

import numpy as np

from .tokens import END, MARKER, MISMATCH, Reading
from .vocabulary import VocabularyMap


@dataclass(frozen=True)
class Alignment:
    """Anchored student positions (N rows) and spans of one window."""

    student: np.ndarray  # [N] student position j
    teacher: np.ndarray  # [N] its anchor, a teacher position
    depth: np.ndarray  # [N]
    prefix_lo: np.ndarray  # [N] ranks of the teacher tokens that begin with the `depth` student tokens read
    prefix_hi: np.ndarray  # [N]
    pieces: np.ndarray  # [N] teacher tokens, from the anchor's on, up to the end of token j + 1; 0: no common end
    student_spans: np.ndarray  # [S] index of the span that holds the token predicted at each position, or -1
    teacher_spans: np.ndarray  # [T]
    spans: int


def align(student: Reading, teacher: Reading, vocabulary: VocabularyMap, max_depth: int) -> Alignment:
    """Anchor every student position of a window that can be anchored.

    A position has no anchor where the last teacher boundary is no student boundary, where a normaliser or an
    unknown token changed the bytes, deeper than `max_depth`, and where no teacher token (or not the real one)
    begins with what the student has read.
    """
    s_next, t_next = _predicted(student), _predicted(teacher)
    if not (len(s_next) and len(t_next)):
        s_next = t_next = np.zeros(0, dtype=np.int64)
    s = Reading(*(column[s_next] for column in student))
    t = Reading(*(column[t_next] for column in teacher))
    if vocabulary.equal_tokenizers and _same_tokens(s, t):
        match = _one_by_one(len(s.ids), len(vocabulary.order))
    else:
        match = _by_bytes(s, t, vocabulary, max_depth)

    student_spans, teacher_spans = np.full(len(student.ids), -1), np.full(len(teacher.ids), -1)
    student_spans[s_next - 1] = match.student_spans
    teacher_spans[t_next - 1] = match.teacher_spans
    return replace(
        match,
        student=s_next[match.student] - 1,
        teacher=t_next[match.teacher] - 1,
        student_spans=student_spans,
        teacher_spans=teacher_spans,
    )


def _predicted(reading: Reading) -> np.ndarray:
    """Indices of the tokens that are predicted."""
    tokens = np.flatnonzero(reading.roles != MARKER)
    return tokens[tokens > 0]


def _same_tokens(s: Reading, t: Reading) -> bool:
    """Whether both sides predict the same ids; each ends a text with its own token."""
    if len(s.ids) != len(t.ids):
        return False
    s_ends, t_ends = s.roles == END, t.roles == END
    return bool((s_ends == t_ends).all() and (s.ids == t.ids)[~s_ends].all())


def _one_by_one(tokens: int, teacher_vocabulary: int) -> Alignment:
    """Every predicted token with its like, a span of its own; token for token, not position for position."""
    token, zero = np.arange(tokens), np.zeros(tokens, dtype=np.int64)
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


def _by_bytes(s: Reading, t: Reading, vocabulary: VocabularyMap, max_depth: int) -> Alignment:
    """Predicted tokens of both sides that start at the same bytes; token for token, not position for position."""
    row, at, depth = _anchor(s, t, max_depth)
    lo, hi, known = _prefix_ranges(s.ids, t.ids, row, at, depth, vocabulary)
    row, at, depth = row[known], at[known], depth[known]
    student_spans, teacher_spans, spans = _spans(s, t)
    return Alignment(
        student=row,
        teacher=at,
        depth=depth,
        prefix_lo=lo[known],
        prefix_hi=hi[known],
        pieces=_pieces(s, t, row, at),
        student_spans=student_spans,
        teacher_spans=teacher_spans,
        spans=spans,
    )


def _anchor(s: Reading, t: Reading, max_depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(student token, teacher token, depth) of every predicted student token with an anchor."""
    row = np.arange(len(s.ids))
    at = np.searchsorted(t.starts, s.starts, side="right") - 1
    inside = (at >= 0) & (s.roles != MISMATCH)
    row, at = row[inside], at[inside]
    inside = (s.starts[row] < t.ends[at]) & (t.roles[at] != MISMATCH)
    row, at = row[inside], at[inside]
    first = np.searchsorted(s.starts, t.starts[at])
    depth = row - first
    common = (depth >= 0) & (depth <= max_depth)
    common[common] = s.starts[first[common]] == t.starts[at[common]]
    return row[common], at[common], depth[common]


def _prefix_ranges(
    s_ids: np.ndarray, t_ids: np.ndarray, row: np.ndarray, at: np.ndarray, depth: np.ndarray, vocabulary: VocabularyMap
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks [lo, hi) of the teacher tokens that begin with the student tokens read, and where the real one does."""
    node = np.zeros(len(row), dtype=np.int64)
    for step in range(int(depth.max(initial=0))):
        deeper = np.flatnonzero(depth > step)
        node[deeper] = vocabulary.descend(node[deeper], s_ids[row[deeper] - depth[deeper] + step])
    lo, hi = vocabulary.node_lo[node], vocabulary.node_hi[node]
    rank = vocabulary.rank[t_ids[at]]
    return lo, hi, (node >= 0) & (((lo <= rank) & (rank < hi)) | (depth == 0))


def _pieces(s: Reading, t: Reading, row: np.ndarray, at: np.ndarray) -> np.ndarray:
    """How many teacher tokens, from the anchor's on, end where the student's token ends (0: none does)."""
    if not len(row):
        return np.zeros(0, dtype=np.int64)
    last = np.minimum(np.searchsorted(t.ends, s.ends[row]), len(t.ends) - 1)
    breaks = np.cumsum((t.roles == MISMATCH) | (np.append(t.starts[:1], t.ends[:-1]) != t.starts))
    unbroken = (last >= at) & (t.ends[last] == s.ends[row]) & (breaks[last] == breaks[at])
    return np.where(unbroken, last - at + 1, 0)


def _spans(s: Reading, t: Reading) -> tuple[np.ndarray, np.ndarray, int]:
    """Span index of every predicted token of both sides; -1 where the two sides do not cover the same bytes."""
    common = np.union1d(np.intersect1d(s.starts, t.starts), np.intersect1d(s.ends, t.ends))
    if len(common) < 2:
        return np.full(len(s.ids), -1), np.full(len(t.ids), -1), 0
    index, whole = [], np.ones(len(common) - 1, dtype=bool)
    for side in (s, t):
        of = np.searchsorted(common, side.starts, side="right") - 1
        index.append(np.where((of >= 0) & (of < len(whole)), of, -1))
        held = index[-1] >= 0
        covered = np.bincount(of[held], (side.ends - side.starts)[held], minlength=len(whole))
        wrong = np.bincount(of[held], side.roles[held] == MISMATCH, minlength=len(whole))
        whole &= (wrong == 0) & (covered == np.diff(common))
    number = np.append(np.where(whole, np.cumsum(whole) - 1, -1), -1)
    return number[index[0]], number[index[1]], int(whole.sum())


def paired_tokens(student: Reading, teacher: Reading) -> tuple[np.ndarray, np.ndarray]:
    """(teacher tokens, student tokens) that start at the same byte: what the channel is counted on."""
    s, t = ((r.roles != MARKER) & (r.roles != MISMATCH) for r in (student, teacher))
    _, i, j = np.intersect1d(teacher.starts[t], student.starts[s], return_indices=True)
    return teacher.ids[t][i], student.ids[s][j]
