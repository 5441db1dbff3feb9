"""What a whole step costs beside the two models alone; and what it would cost on Kaggle's cards, as a forecast.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --device cuda --precision bf16 --shape smollm2-135m --batch 8 --length 1024
    python -m benchmarks.step_time --forecast

Measured: random weights with the vocabulary sizes of Qwen2.5 (151,936) and SmolLM2 (49,152), random text; the student
spells 8 % of the teacher's tokens in two or three. "Step" is forward and backward of the framework: teacher, top-k,
projection, student, LM and KD; "its teacher" is the part of `FrozenTeacher.signal`, measured once more by itself.
"Alone" is the teacher's forward and the student's forward and backward, logits and all, of the transformers models
themselves, given the gradient of the student's logits: no loss is computed. Neither has an optimizer or a data loader.
Runs alternate in one process. On a CPU with one thread seconds are CPU seconds, else those of the clock.

Forecast: the operations of both bodies and heads are run on fake tensors, and each one's floating-point operations and
bytes are counted. It is charged what takes longer, computing or moving, at the shares of a card's paper figures that
`CARDS` states. Nothing of it was measured on such a card.
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from benchmarks.measure import MB, Run, alternate, describe, machine, summary, table, write
from models.config import CurriculumConfig, LossConfig, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.language_model import body_states
from models.losses.chunk_size import GPU_ROWS, PASCAL_ROWS
from models.losses.fused_head import HeadComputation, HeadTarget, head_losses
from models.teacher.frozen import FrozenTeacher
from models.teacher.top_k import exact_top_k
from models.text.collate import PairCollator
from models.text.tokens import MARKER, TEXT
from models.text.vocabulary import VocabularyMap
from models.types import PairedBatch, SparseTarget, TeacherSignal

TEACHER_VOCABULARY, STUDENT_VOCABULARY = 151_936, 49_152
PIECES = (0.92, 0.06, 0.02)
"""Share of the teacher's tokens that are one, two and three tokens of the student."""
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _llama(width: int, layers: int, heads: int, groups: int, inner: int, vocabulary: int, kind: type = LlamaConfig):
    return kind(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )


def shapes(name: str, teacher_vocabulary: int, student_vocabulary: int) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Configs of (teacher, student)."""
    if name == "tiny":
        teacher = _llama(512, 2, 8, 2, 1024, teacher_vocabulary, Qwen2Config)
        return teacher, _llama(576, 2, 9, 3, 1536, student_vocabulary)
    teacher = _llama(1536, 28, 12, 2, 8960, teacher_vocabulary, Qwen2Config)  # Qwen2.5-1.5B
    if name == "smollm2-135m":
        return teacher, _llama(576, 30, 9, 3, 1536, student_vocabulary)
    return teacher, _llama(960, 32, 15, 5, 2560, student_vocabulary)


def vocabulary_map(teacher: int, student: int) -> VocabularyMap:
    """Every teacher token spelt in one to three random student tokens."""
    random = np.random.default_rng(0)
    segments = random.integers(0, student, (teacher, len(PIECES)))
    pieces = random.choice(len(PIECES), teacher, p=PIECES) + 1
    return VocabularyMap.from_segments(np.where(np.arange(len(PIECES)) < pieces[:, None], segments, -1), student)


def random_windows(vocabulary: VocabularyMap, batch: int, length: int) -> list[dict]:
    """Windows of random teacher tokens, spelt for the student in at most `length` tokens of two bytes each."""
    random, windows = np.random.default_rng(1), []
    for _ in range(batch):
        ids = random.integers(0, len(vocabulary.segments), length)
        pieces = (vocabulary.segments[ids] >= 0).sum(1)
        ids = ids[np.cumsum(pieces) <= length]
        spelt, pieces = vocabulary.segments[ids], pieces[: len(ids)]
        window = {"bytes": 2 * int(pieces.sum()), "documents": ""}
        for side, tokens, sizes in (
            ("student", spelt[spelt >= 0], np.ones(int(pieces.sum()), dtype=np.int64)),
            ("teacher", ids, pieces),
        ):
            ends = 2 * np.cumsum(sizes)
            roles = np.where(np.arange(len(tokens)) == 0, MARKER, TEXT)
            columns = {"ids": tokens, "starts": ends - 2 * sizes, "ends": ends, "roles": roles}
            window |= {f"{side}_{column}": values for column, values in columns.items()}
        windows.append(window)
    return windows


def random_batch(vocabulary: VocabularyMap, batch: int, length: int) -> PairedBatch:
    """`random_windows` collated."""
    return PairCollator(vocabulary, (None, None), LossConfig().max_depth)(random_windows(vocabulary, batch, length))


def random_framework(
    shape: str,
    vocabulary: VocabularyMap,
    *,
    teacher_vocabulary: int,
    student_vocabulary: int,
    teacher_dtype: torch.dtype,
    device: torch.device,
) -> DistillationFramework:
    """Return a framework of LM and KD between two models of known shapes with random weights."""
    configs = shapes(shape, teacher_vocabulary, student_vocabulary)
    with device:
        teacher = AutoModelForCausalLM.from_config(configs[0], dtype=teacher_dtype)
        student = AutoModelForCausalLM.from_config(configs[1], dtype=torch.float32)

    loss, terms = LossConfig(), CurriculumConfig(kd=Term(0.7), lm=Term(0.3))
    frozen, scheduler = FrozenTeacher(teacher, vocabulary), CurriculumScheduler(terms, loss, 100)
    return DistillationFramework(student.train(), frozen, vocabulary, loss, scheduler)


@dataclass
class StepWorks:
    """The works that are compared: a micro-batch of the framework, and its two models by themselves.

    The models alone are given no mask, as in the step: they never see the padding behind a text, and with a mask
    attention would take another kernel.
    """

    framework: DistillationFramework
    batch: PairedBatch
    precision: str
    """`no`, `fp16` or `bf16`: of the student's autocast."""

    def __post_init__(self) -> None:
        with self.autocast(), torch.no_grad():
            logits = self._student_logits()
        self.logit_gradient = torch.full_like(logits, 1e-4)

    @property
    def loss_scale(self) -> float:
        """Factor that keeps the gradients of float16 from vanishing."""
        return 65536.0 if self.precision == "fp16" else 1.0

    def autocast(self) -> AbstractContextManager:
        """Return the autocast in which the student computes."""
        if self.precision == "no":
            return nullcontext()
        return torch.autocast(self.batch.student_ids.device.type, DTYPES[self.precision])

    def teacher_alone(self) -> Tensor:
        """Return the teacher's logits, computed by its own forward."""
        with torch.no_grad():
            return self.framework.teacher.model(input_ids=self.batch.teacher_ids, use_cache=False).logits

    def student_alone(self) -> None:
        """Run the student forward, and backward from a given gradient of its logits."""
        with self.autocast():
            logits = self._student_logits()
        logits.backward(self.logit_gradient)

    def step(self) -> None:
        """Run the framework forward and backward."""
        with self.autocast():
            output = self.framework(self.batch, 0)
        (output.loss * self.loss_scale).backward()

    def signal(self) -> TeacherSignal:
        """Return what the framework asks of the teacher in a step."""
        return self.framework.teacher.signal(self.batch, LossConfig().top_k)

    def clear(self) -> None:
        """Drop the gradients of the run before."""
        self.framework.zero_grad(set_to_none=True)

    def _student_logits(self) -> Tensor:
        return self.framework.student(input_ids=self.batch.student_ids, use_cache=False).logits


def run_measured(args: argparse.Namespace) -> tuple[dict[str, list[Run]], PairedBatch]:
    """(runs of each model alone, of the step and, once more by itself, of its teacher's part; the batch)."""
    device = torch.device(args.device)
    torch.manual_seed(0)

    vocabulary = vocabulary_map(args.teacher_vocabulary, args.student_vocabulary)
    framework = random_framework(
        args.shape,
        vocabulary,
        teacher_vocabulary=args.teacher_vocabulary,
        student_vocabulary=args.student_vocabulary,
        teacher_dtype=DTYPES[args.precision],
        device=device,
    )
    batch = random_batch(vocabulary, args.batch, args.length).to(device)

    works = StepWorks(framework, batch, args.precision)
    named = {
        "teacher alone": works.teacher_alone,
        "student alone": works.student_alone,
        "step": works.step,
        "its teacher": works.signal,
    }
    return alternate(named, device, args.repeats, before=works.clear), batch


def report_measured(found: dict[str, list[Run]], batch: PairedBatch, clock: bool) -> tuple[str, dict]:
    times = {name: np.array([r.wall if clock else r.seconds for r in runs]) for name, runs in found.items()}
    median = {name: float(np.median(t)) for name, t in times.items()}
    alone = times["teacher alone"] + times["student alone"]
    ratio = times["step"] / alone  # of each round, whose noise they share
    tokens = batch.counts["lm"]
    rows = [[name, f"{median[name]:.2f}", "", f"{summary(found[name])['peak'] / MB:,.0f}", ""] for name in found]
    row = rows[list(found).index("step")]
    row[2] = f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
    row[4] = f"{tokens / median['step']:,.0f}"
    header = ["", "s, median", "over both alone (range)", "MB above models", "student tokens/s"]
    numbers = {name: summary(runs) for name, runs in found.items()}
    numbers |= {"ratio": float(np.median(ratio)), "ratios": ratio.tolist(), "tokens": tokens}
    return table(header, rows), numbers


# ----------------------------------------------------------------------------- forecast


@dataclass(frozen=True)
class Card:
    """Paper figures, and which share of them is assumed to be reached."""

    half: float  # products of half-precision factors, FLOP/s
    single: float  # products of float32 factors
    bytes: float  # a second
    half_share: float
    single_share: float = 0.8
    bytes_share: float = 0.75
    rows: int = GPU_ROWS


CARDS = {
    # a P100 multiplies half-precision factors in float32; a T4 sustains less than half of its tensor cores' figure
    "P100": Card(9.3e12, 9.3e12, 732e9, half_share=0.8, rows=PASCAL_ROWS),
    "T4": Card(65e12, 8.1e12, 320e9, half_share=0.4),
}
PCIE = 12e9 * 0.75
"""Bytes a second between two cards, through the host."""


@dataclass
class Costs:
    """Operations: (FLOP, bytes)."""

    ops: list[tuple[float, float]] = field(default_factory=list)

    @property
    def flop(self) -> float:
        return sum(flop for flop, _ in self.ops)

    @property
    def bytes(self) -> float:
        return sum(moved for _, moved in self.ops)

    def seconds(self, card: Card) -> float:
        rate, speed = card.half * card.half_share, card.bytes * card.bytes_share
        return sum(max(flop / rate, moved / speed) for flop, moved in self.ops)


class _Count(TorchDispatchMode):
    """Counts what passes: every operation reads its arguments and writes its results, once each."""

    def __init__(self) -> None:
        super().__init__()
        self.costs = Costs()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view", "alias", "lift_fresh")):
            return out
        counter = flop_registry.get(func.overloadpacket)
        flop = counter(*args, **(kwargs or {}), out_val=out) if counter else 0
        if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
            q, k = (args[2], args[3]) if "backward" in name else (args[0], args[1])  # after grad_out, q comes
            flop = 2 * 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
            flop *= 2.5 if "backward" in name else 1
        tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        self.costs.ops.append((flop, sum(t.numel() * t.element_size() for t in tensors.values())))
        return out


def _counted(work: Callable[[], object]) -> Costs:
    with _Count() as count:
        work()
    return count.costs


def _body(model: nn.Module, ids: Tensor, backward: bool) -> Costs:
    def work() -> None:
        with torch.set_grad_enabled(backward):
            states = body_states(model, ids)
            if backward:
                states.backward(torch.empty_like(states))

    return _counted(work)


def _teacher_head(model: nn.Module, tokens: int, top_k: int, rows: int) -> Costs:
    """As `FrozenTeacher.signal` does it, every position an anchor at depth 0."""
    head = model.get_output_embeddings()
    states = torch.empty(tokens, head.weight.shape[1], dtype=head.weight.dtype)
    at = torch.zeros(tokens, dtype=torch.long)

    def work() -> None:
        for part in torch.arange(tokens).split(rows):
            logits = head(states[: len(part)]).float()
            logits.gather(1, at[: len(part), None])
            _, columns = exact_top_k(logits, top_k)
            logits.sub_(logits[:, :1]).exp_().scatter_(1, columns, 0.0).sum(1)

    with torch.no_grad():
        return _counted(work)


def _student_head(model: nn.Module, tokens: int, top_k: int, rows: int) -> Costs:
    head = model.get_output_embeddings()
    states = torch.empty(tokens, head.weight.shape[1], dtype=head.weight.dtype, requires_grad=True)
    ids, probs = torch.zeros(tokens, top_k, dtype=torch.long), torch.empty(tokens, top_k)
    distribution = SparseTarget(ids, probs, probs[:, 0], ids[:, 0] == 0)
    divergence = {"temperature": 1.0, "kind": "forward_kl", "tail": "bucket", "skew": 0.1}
    options = {
        "lm_weight": 0.3 / tokens,
        "kd_weight": 0.7 / tokens,
        "target": HeadTarget(distribution, rows=None, **divergence),
        "computation": HeadComputation(chunk=rows),
    }

    def work() -> None:
        labels = torch.zeros(tokens, dtype=torch.long)
        head_losses(states, head, labels, **options).loss.backward()

    return _counted(work)


def forecast(shape: str, batch: int, length: int) -> tuple[list[list], dict]:
    """Rows of the table, one a card."""
    loss = LossConfig()
    configs = shapes(shape, TEACHER_VOCABULARY, STUDENT_VOCABULARY)
    rows, numbers = [], {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher, student = (AutoModelForCausalLM.from_config(c, dtype=torch.float16) for c in configs)
        ids = torch.zeros(batch, length, dtype=torch.long)
        tokens = batch * length
        bodies = [_body(teacher, ids, False), _body(student, ids, True)]
        kinds = {card.rows for card in CARDS.values()}
        heads = {
            rows: [_teacher_head(teacher, tokens, loss.top_k, rows), _student_head(student, tokens, loss.top_k, rows)]
            for rows in kinds
        }
    for name, card in CARDS.items():
        costs = [*bodies, *heads[card.rows]]
        teacher_body, body, teacher_head, head = (c.seconds(card) for c in costs)
        taught = teacher_body + teacher_head
        flop, moved = sum(c.flop for c in costs), sum(c.bytes for c in costs)
        split = f"teacher {taught * 1e3:,.0f}, body {body * 1e3:,.0f}, head {head * 1e3:,.0f}"
        total = taught + body + head
        row = [shape, f"{batch} x {length}", f"{flop / 1e12:.2f}", f"{moved / 1e9:,.0f}"]
        rows.append([*row, name, f"{total * 1e3:,.0f} ({split})", f"{tokens / total:,.0f}"])
        result = {"flop": flop, "bytes": moved, "teacher": taught, "student body": body, "student head": head}
        numbers[f"{shape} {batch}x{length} {name}"] = result | {"step": total}
        if name == "T4":
            signal = tokens * (loss.top_k * 12 + 16) / PCIE
            least, most = max(taught, body + head) + signal, total + signal
            times = f"{least * 1e3:,.0f} (both work at once) to {most * 1e3:,.0f} (one after the other)"
            rows.append([*row, "T4 x2", times, f"{tokens / most:,.0f} to {tokens / least:,.0f}"])
            numbers[f"{shape} {batch}x{length} T4 x2"] = {"least": least, "most": most}
    return rows, numbers


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=["tiny", "smollm2-135m", "smollm2-360m"], default="tiny")
    p.add_argument("--teacher-vocabulary", type=int, default=TEACHER_VOCABULARY)
    p.add_argument("--student-vocabulary", type=int, default=STUDENT_VOCABULARY)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--device", default="cpu")
    p.add_argument("--precision", choices=DTYPES, default="no", help="student's autocast and teacher's weights")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeats", type=int, default=5, help="measured rounds, after one that is not")
    p.add_argument("--forecast", action="store_true", help="only the forecast")
    p.add_argument("--json", type=Path, default=Path("step-time.json"))
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    content = {
        "machine": machine(device, args.threads),
        "settings": {k: v for k, v in vars(args).items() if k != "json"},
    }
    if not args.forecast:
        found, batch = run_measured(args)
        text, content["measured"] = report_measured(found, batch, args.threads > 1 or device.type == "cuda")
        what = f"{args.shape}, {args.batch} x {args.length} tokens, precision {args.precision}"
        what += f", vocabularies {args.teacher_vocabulary:,} and {args.student_vocabulary:,}"
        print(f"{describe(content['machine'])}\n{what}\n\n{text}\n")
    rows, content["forecast"] = [], {}
    for shape in ("smollm2-135m", "smollm2-360m"):
        for sizes in ((2, 512), (8, 1024)):
            new, numbers = forecast(shape, *sizes)
            rows += new
            content["forecast"] |= numbers
    print("FORECAST from counted operations; nothing here was measured. Teacher: Qwen2.5-1.5B, fp16; no optimizer.\n")
    print(table(["student", "tokens", "TFLOP", "GB moved", "card", "ms a step", "student tokens/s"], rows))
    write(args.json, content)


if __name__ == "__main__":
    main()
