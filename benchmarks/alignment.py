"""How two tokenizers cut one sentence, what the student learns there, and how much of a text that covers.

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
from models.teacher.frozen import FrozenTeacher
from models.teacher.projection import Projection
from models.text.collate import PairCollator
from models.text.tokens import TEXT
from models.text.vocabulary import VocabularyMap
from models.text.windows import PairEncoder
from models.types import PairedBatch
from utils.config.settings import DataConfig
from utils.data.documents import load_documents
from utils.run import quickstart

SENTENCE = "The method raises an exception if the argument is negative."
COLOURS = {"same": "#B8D4EA", "inside": "#F6C892", "none": "#DDDDDD", "teacher": "#B5DFC8"}
MOST_BARS = 6


@dataclass
class Piece:
    """A token of the sentence: bytes [start, end), and for the student's its depth; None: no anchor."""

    start: int
    end: int
    depth: int | None = 0


@dataclass
class Setting:
    """A pair of tokenizers and a sentence that both have read."""

    encoder: PairEncoder
    vocabulary: VocabularyMap
    collate: PairCollator
    sentence: str
    window: dict
    batch: PairedBatch

    @classmethod
    def of(cls, teacher: str | Path, student: str | Path, sentence: str) -> "Setting":
        tokenizers = [AutoTokenizer.from_pretrained(name) for name in (student, teacher)]
        encoder, vocabulary = PairEncoder(*tokenizers, 512), VocabularyMap.build(*tokenizers)
        collate = PairCollator(vocabulary, encoder.end_of_text, max_depth=16)
        window = encoder.windows([sentence])[0]
        return cls(encoder, vocabulary, collate, sentence, window, collate([window]))

    def pieces(self, side: str) -> list[Piece]:
        """The tokens of the sentence, without markers."""
        depth = dict(zip((self.batch.row_student + 1).tolist(), self.batch.depth.tolist(), strict=True))
        starts, ends, roles = (self.window[f"{side}_{column}"] for column in ("starts", "ends", "roles"))
        return [  # a window's first byte is kept for the space that some tokenizers put before a text
            Piece(max(0, int(starts[i]) - 1), int(ends[i]) - 1, depth.get(i) if side == "student" else 0)
            for i in np.flatnonzero(roles == TEXT)
        ]

    def drawing(self) -> str:
        """The two readings one above the other, and the depth below each student token, for ASCII sentences."""
        sides = {side: self.pieces(side) for side in ("teacher", "student")}
        cuts = sorted({edge for pieces in sides.values() for piece in pieces for edge in (piece.start, piece.end)})
        column = {byte: byte + sum(cut < byte for cut in cuts) for byte in range(cuts[-1] + 1)}
        lines = {"text": [" "] * (column[cuts[-1]] + 1), **{side: [" "] * (column[cuts[-1]] + 1) for side in sides}}
        for byte, letter in enumerate(self.sentence):
            where = column[byte] + (byte in cuts)
            for line in lines.values():
                line[where] = letter
        for side, pieces in sides.items():
            for piece in pieces:
                lines[side][column[piece.start]] = lines[side][column[piece.end]] = "|"
        lines["depth"] = [" "] * len(lines["text"])
        for piece in sides["student"]:
            lines["depth"][column[piece.start] + 1] = "-" if piece.depth is None else str(piece.depth)
        return "\n".join(f"{name:<8} {''.join(line).rstrip()}" for name, line in lines.items())


def coverage(setting: Setting, text: str) -> dict[str, str]:
    """Shares of the student's tokens in a text, by how they are anchored."""
    documents = load_documents(DataConfig(train=[text], eval_fraction=0.01)).train
    windows = setting.encoder.windows(documents)
    batches = [setting.collate([window]) for window in windows]
    total = sum(batch.counts["lm"] for batch in batches)
    anchored, same = (sum(batch.counts[name] for batch in batches) for name in ("kd", "depth0"))
    several = sum(int((batch.pieces[batch.depth == 0] > 1).sum()) for batch in batches)
    shares = {"same bytes read": same, "inside a teacher token": anchored - same, "no anchor": total - anchored}
    shares["spans several teacher tokens"] = several
    return {"text": Path(text).name, "student tokens": f"{total:,}"} | {
        name: f"{count / total:.1%}" for name, count in shares.items()
    }


# -------------------------------------------------------------------------------------------- the picture


def draw(setting: Setting, model: str | Path, file: Path) -> None:
    """The sentence, and one position inside a teacher token: the teacher there, restricted, and as the target."""
    teacher = FrozenTeacher(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), setting.vocabulary)
    batch, student, theirs = setting.batch, *setting.encoder.tables
    restricted = teacher.signal(batch, 256)
    target = Projection(setting.vocabulary, "none", 0.0)(restricted, batch)
    row = int((batch.depth > 0).nonzero()[0])
    at_anchor = int(((batch.depth == 0) & (batch.row_teacher == batch.row_teacher[row])).nonzero()[0])
    read = int(batch.row_student[row])
    first = read - int(batch.depth[row]) + 1
    before = "".join(shown(student.bytes[i]) for i in setting.window["student_ids"][first : read + 1])
    bars = [
        (
            "the teacher where the word begins",
            *named(restricted.ids[at_anchor], restricted.log_probs[at_anchor], theirs),
        ),
        (f"restricted to “{before}...”, renormalised", *named(restricted.ids[row], restricted.log_probs[row], theirs)),
        (f"the target: what follows “{before}”", *named(target.ids[row], target.probs[row].log(), student)),
    ]
    with matplotlib.rc_context({"svg.hashsalt": "alignment", "font.size": 9}):
        figure = Figure(figsize=(11, 4.6), facecolor="white", layout="constrained")
        grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.25))
        _draw_sentence(figure.add_subplot(grid[0, :]), setting)
        for column, (title, names, probs) in enumerate(bars):
            axes = figure.add_subplot(grid[1, column])
            colour = COLOURS["teacher" if column < 2 else "inside"]
            axes.barh(range(len(names)), probs, color=colour, edgecolor="#666666", linewidth=0.6)
            axes.set_yticks(range(len(names)), names, family="monospace")
            axes.set_ylim(MOST_BARS + 0.6, -0.6)
            axes.set_xlim(0, 1.15)
            axes.set_title(title, loc="left", fontsize=10)
            for y, p in enumerate(probs):
                axes.text(p + 0.02, y, f"{p:.3f}", va="center")
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=110)


def named(ids: torch.Tensor, log_probs: torch.Tensor, tokens) -> tuple[list[str], list[float]]:
    """The most probable tokens and "any other", as text and probability."""
    probs = torch.where(ids >= 0, log_probs.exp(), 0)
    best = [i for i in probs.argsort(descending=True)[:MOST_BARS].tolist() if probs[i] >= 5e-4]
    names = [f"“{shown(tokens.bytes[int(ids[i])])}”" for i in best]
    values, other = [float(probs[i]) for i in best], 1 - float(probs[best].sum())
    return ([*names, "any other"], [*values, other]) if other >= 5e-4 else (names, values)


def shown(token: bytes | None) -> str:
    return (token or b"").decode(errors="replace").replace(" ", "·").replace("\n", "\\n")


def _draw_sentence(axes: Axes, setting: Setting) -> None:
    rows = {"teacher": 1.0, "student": 0.0}
    readings = {side: setting.pieces(side) for side in rows}
    common = {p.start for p in readings["teacher"]} & {p.start for p in readings["student"]}
    for byte in sorted(common):
        axes.plot([byte, byte], [-0.55, 1.75], color="#999999", linestyle=":", linewidth=0.9, zorder=0)
    for side, y in rows.items():
        for piece in readings[side]:
            kind = "teacher" if side == "teacher" else {None: "none", 0: "same"}.get(piece.depth, "inside")
            width = piece.end - piece.start - 0.12
            axes.add_patch(
                matplotlib.patches.FancyBboxPatch(
                    (piece.start + 0.06, y), width, 0.62, boxstyle="round,pad=0,rounding_size=0.15",
                    facecolor=COLOURS[kind], edgecolor="#666666", linewidth=0.7,
                )
            )  # fmt: skip
            text = setting.sentence.encode()[piece.start : piece.end]
            options = {"ha": "center", "va": "center", "family": "monospace"}
            axes.text((piece.start + piece.end) / 2, y + 0.31, shown(text), **options)
            if side == "student":
                depth = "-" if piece.depth is None else str(piece.depth)
                axes.text((piece.start + piece.end) / 2, y - 0.3, depth, **options)
    for y, name in ((1.31, "teacher"), (0.31, "student"), (-0.3, "depth")):
        axes.text(-0.6, y, name, ha="right", va="center")
    axes.set_xlim(-6, len(setting.sentence.encode()) + 0.5)
    axes.set_ylim(-0.65, 1.85)
    axes.axis("off")
    axes.set_title("One sentence, two tokenisations; dotted: both models have read the same bytes", loc="left")


def main() -> None:
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
        found = quickstart.material()
        teacher, student = found.teacher, found.student
        trained = [
            path for path in found.trained_teacher.parent.glob("trained-teacher-*") if (path / "config.json").is_file()
        ]
        weights = max(trained, key=lambda path: path.stat().st_mtime, default=None)
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


if __name__ == "__main__":
    main()
