"""A sentence as two tokenizers cut it, what the student learns there, and how much of a text that covers.

    python -m benchmarks.alignment                                        # the quickstart's models; needs no network
    python -m benchmarks.alignment --teacher Qwen/Qwen2.5-1.5B --student HuggingFaceTB/SmolLM2-360M --text my_texts.txt

Without `--teacher` and `--student` it takes the tokenizers that `python train.py` makes where there is no GPU.
`--picture` draws the sentence, and the target of one position inside a teacher token; it needs the teacher's weights
(after `python train.py` those of the quickstart are there). `--text` counts how often each case occurs, in windows of
512 tokens.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import table
from models.distillation import Distillation
from models.teacher.frozen import FrozenTeacher
from models.teacher.projection import Projection
from models.text.tokens import TEXT
from models.text.vocabulary import VocabularyMap
from models.text.windows import PairEncoder
from models.types import PairedBatch
from utils.config.settings import DataConfig
from utils.data.documents import load_documents
from utils.run import quickstart

SENTENCE = "Ben wore a red scarf and carried a basket full of cherries."
COLOURS = {"same": "#B8D4EA", "inside": "#F6C892", "none": "#DDDDDD", "teacher": "#B5DFC8"}
MOST_BARS = 6
LEAST_SHOWN = 5e-4
"""Probability of a bar."""


@dataclass
class Piece:
    """A token of the sentence: bytes [start, end), and for the student's its depth; None: no anchor."""

    start: int
    end: int
    depth: int | None = 0


@dataclass
class Setting:
    """A pair of tokenizers and a sentence that both have read."""

    pair: Distillation
    sentence: str
    window: dict
    batch: PairedBatch

    @classmethod
    def of(cls, teacher: str | Path, student: str | Path, sentence: str) -> "Setting":
        """Let the tokenizers of two models, by name or folder, read a sentence."""
        student_tokenizer = AutoTokenizer.from_pretrained(student)
        teacher_tokenizer = AutoTokenizer.from_pretrained(teacher)
        pair = Distillation(
            encoder=PairEncoder(student_tokenizer, teacher_tokenizer, 512),
            vocabulary=VocabularyMap.build(student_tokenizer, teacher_tokenizer),
        )
        window = pair.windows([sentence])[0]
        return cls(pair, sentence, window, pair.collate([window]))

    def pieces(self, side: str) -> list[Piece]:
        """Return the tokens of the sentence, without markers."""
        starts, ends, roles = (self.window[f"{side}_{column}"] for column in ("starts", "ends", "roles"))
        depth_of_token = dict(zip((self.batch.row_student + 1).tolist(), self.batch.depth.tolist(), strict=True))

        pieces = []
        for token in np.flatnonzero(roles == TEXT):
            depth = depth_of_token.get(token) if side == "student" else 0
            # a window's first byte is kept for the space that some tokenizers put before a text
            pieces.append(Piece(max(0, int(starts[token]) - 1), int(ends[token]) - 1, depth))
        return pieces

    def drawing(self) -> str:
        """Draw the two readings one above the other, and the depth below each student token, for ASCII sentences."""
        # 1. Columns: a letter has one, and so has each place where a tokenizer cuts.
        sides = {side: self.pieces(side) for side in ("teacher", "student")}
        edges = set()
        for piece in [*sides["teacher"], *sides["student"]]:
            edges |= {piece.start, piece.end}
        column = {byte: byte + sum(edge < byte for edge in edges) for byte in range(max(edges) + 1)}
        width = column[max(edges)] + 1

        # 2. The sentence in every line, with bars where the line's tokenizer cuts.
        lines = {name: [" "] * width for name in ("text", *sides)}
        for byte, letter in enumerate(self.sentence):
            position = column[byte]
            if byte in edges:
                position += 1  # behind the bar
            for line in lines.values():
                line[position] = letter
        for side, pieces in sides.items():
            for piece in pieces:
                lines[side][column[piece.start]] = "|"
                lines[side][column[piece.end]] = "|"

        # 3. Below each student token its depth.
        lines["depth"] = [" "] * width
        for piece in sides["student"]:
            lines["depth"][column[piece.start] + 1] = "-" if piece.depth is None else str(piece.depth)

        return "\n".join(f"{name:<8} {''.join(line).rstrip()}" for name, line in lines.items())


def coverage(setting: Setting, text: str) -> dict[str, str]:
    """Count the student's tokens in a text by how they are anchored, as shares."""
    documents = load_documents(DataConfig(train=[text], eval_fraction=0.01)).train
    batches = [setting.pair.collate([window]) for window in setting.pair.encoder.windows(list(documents))]

    total = sum(batch.counts["lm"] for batch in batches)
    anchored, same = (sum(batch.counts[name] for batch in batches) for name in ("kd", "depth0"))
    several = sum(int((batch.pieces[batch.depth == 0] > 1).sum()) for batch in batches)
    counts = {
        "same bytes read": same,
        "inside a teacher token": anchored - same,
        "no anchor": total - anchored,
        "spans several teacher tokens": several,
    }
    shares = {name: f"{count / total:.1%}" for name, count in counts.items()}
    return {"text": Path(text).name, "student tokens": f"{total:,}", **shares}


# -------------------------------------------------------------------------------------------- the picture


def draw(setting: Setting, model: str | Path, file: Path) -> None:
    """Draw the sentence, and one position inside a teacher token: the teacher there, restricted, and as the target."""
    titles_and_bars = target_inside_a_token(setting, model)

    with matplotlib.rc_context({"svg.hashsalt": "alignment", "font.size": 9}):
        figure = Figure(figsize=(11, 4.6), facecolor="white", layout="constrained")
        grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.25))
        _draw_sentence(figure.add_subplot(grid[0, :]), setting)
        for column, (title, (names, probabilities)) in enumerate(titles_and_bars.items()):
            axes = figure.add_subplot(grid[1, column])
            axes.set_title(title, loc="left", fontsize=10)
            _draw_bars(axes, names, probabilities, COLOURS["teacher" if column < 2 else "inside"])

        # without the date, the same drawing is the same file
        metadata = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, metadata=metadata, dpi=110)


def target_inside_a_token(setting: Setting, model: str | Path) -> dict[str, tuple[list[str], list[float]]]:
    """Return title -> (names, probabilities) of three distributions at the first position inside a teacher token."""
    vocabulary, batch = setting.pair.vocabulary, setting.batch
    teacher = FrozenTeacher(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), vocabulary)
    restricted = teacher.signal(batch, 256)
    target = Projection(vocabulary, "none", 0.0)(restricted, batch)

    # the row inside the token, and that of its anchor
    row = int((batch.depth > 0).nonzero()[0])
    is_anchor = (batch.depth == 0) & (batch.row_teacher == batch.row_teacher[row])
    anchor = int(is_anchor.nonzero()[0])

    # what the student has read of the token
    student_tokens, teacher_tokens = setting.pair.encoder.tables
    last = int(batch.row_student[row])
    first = last - int(batch.depth[row]) + 1
    read = "".join(shown(student_tokens.bytes[i]) for i in setting.window["student_ids"][first : last + 1])

    at_anchor = named(restricted.ids[anchor], restricted.log_probs[anchor], teacher_tokens)
    inside = named(restricted.ids[row], restricted.log_probs[row], teacher_tokens)
    learned = named(target.ids[row], target.probs[row].log(), student_tokens)
    return {
        "the teacher where the word begins": at_anchor,
        f"restricted to “{read}...”, renormalised": inside,
        f"the target: what follows “{read}”": learned,
    }


def _draw_bars(axes: Axes, names: list[str], probabilities: list[float], colour: str) -> None:
    """Draw a distribution as bars with their figures."""
    axes.barh(range(len(names)), probabilities, color=colour, edgecolor="#666666", linewidth=0.6)
    axes.set_yticks(range(len(names)), names, family="monospace")
    axes.set_ylim(MOST_BARS + 0.6, -0.6)
    axes.set_xlim(0, 1.15)
    for y, probability in enumerate(probabilities):
        axes.text(probability + 0.02, y, f"{probability:.3f}", va="center")
    axes.spines[["top", "right"]].set_visible(False)


def named(ids: torch.Tensor, log_probs: torch.Tensor, tokens) -> tuple[list[str], list[float]]:
    """Return the most probable tokens and "any other", as text and probability."""
    probs = torch.where(ids >= 0, log_probs.exp(), 0)
    best = [i for i in probs.argsort(descending=True)[:MOST_BARS].tolist() if probs[i] >= LEAST_SHOWN]
    names = [f"“{shown(tokens.bytes[int(ids[i])])}”" for i in best]
    values = [float(probs[i]) for i in best]

    other = 1 - float(probs[best].sum())
    if other >= LEAST_SHOWN:
        return [*names, "any other"], [*values, other]
    return names, values


def shown(token: bytes | None) -> str:
    """Return a token's bytes as text, its blanks visible."""
    return (token or b"").decode(errors="replace").replace(" ", "·").replace("\n", "\\n")


def _draw_sentence(axes: Axes, setting: Setting) -> None:
    """Draw both readings as boxes, the depth of each student token, and where both have read the same bytes."""
    rows = {"teacher": 1.0, "student": 0.0}
    readings = {side: setting.pieces(side) for side in rows}

    both_read = {piece.start for piece in readings["teacher"]} & {piece.start for piece in readings["student"]}
    for byte in sorted(both_read):
        axes.plot([byte, byte], [-0.55, 1.75], color="#999999", linestyle=":", linewidth=0.9, zorder=0)

    for side, y in rows.items():
        for piece in readings[side]:
            _draw_piece(axes, setting.sentence, side, piece, y)

    for y, name in ((1.31, "teacher"), (0.31, "student"), (-0.3, "depth")):
        axes.text(-0.6, y, name, ha="right", va="center")
    axes.set_xlim(-6, len(setting.sentence.encode()) + 0.5)
    axes.set_ylim(-0.65, 1.85)
    axes.axis("off")
    axes.set_title("One sentence, two tokenisations; dotted: both models have read the same bytes", loc="left")


def _draw_piece(axes: Axes, sentence: str, side: str, piece: Piece, y: float) -> None:
    """Draw one token as a box in the row `y`."""
    kind = "teacher"
    if side == "student":
        kind = {None: "none", 0: "same"}.get(piece.depth, "inside")
    box = matplotlib.patches.FancyBboxPatch(
        (piece.start + 0.06, y),
        piece.end - piece.start - 0.12,
        0.62,
        boxstyle="round,pad=0,rounding_size=0.15",
        facecolor=COLOURS[kind],
        edgecolor="#666666",
        linewidth=0.7,
    )
    axes.add_patch(box)

    middle = (piece.start + piece.end) / 2
    options = {"ha": "center", "va": "center", "family": "monospace"}
    axes.text(middle, y + 0.31, shown(sentence.encode()[piece.start : piece.end]), **options)
    if side == "student":
        axes.text(middle, y - 0.3, "-" if piece.depth is None else str(piece.depth), **options)


def main() -> None:
    """Print, count and draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="tokenizer: hub id or folder; for --picture with weights")
    parser.add_argument("--student", help="tokenizer: hub id or folder")
    parser.add_argument("--sentence", default=SENTENCE)
    parser.add_argument("--text", nargs="*", default=[], help="texts to count the cases in, as for train.py")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it: .svg or .png")
    args = parser.parse_args()
    if (args.teacher is None) != (args.student is None):
        parser.error("got one of --teacher and --student, expected both or none")

    teacher, student, weights = args.teacher, args.student, args.teacher
    if teacher is None:
        material = quickstart.material()
        teacher, student = material.teacher, material.student
        weights = newest_teacher(material)

    setting = Setting.of(teacher, student, args.sentence)
    print(setting.drawing())
    if args.text:
        rows = [coverage(setting, text) for text in args.text]
        print("\n" + table(list(rows[0]), [list(row.values()) for row in rows]))
    if args.picture:
        if weights is None:
            parser.error("there is no trained quickstart teacher yet: run `python train.py --config quickstart` first")
        draw(setting, weights, args.picture)
        print(f"\nwritten: {args.picture}")


def newest_teacher(material: quickstart.Material) -> Path | None:
    """Return the folder of the quickstart teacher that was trained last; None: none was."""
    folders = material.trained_teacher.parent.glob("trained-teacher-*")
    trained = [folder for folder in folders if (folder / "config.json").is_file()]
    return max(trained, key=lambda folder: folder.stat().st_mtime, default=None)


if __name__ == "__main__":
    main()
