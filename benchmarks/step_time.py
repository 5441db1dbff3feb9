"""Cost of a whole step beside the two models alone; and a forecast of it on Kaggle's cards.

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

TEACHER_VOCABULARY = 151_936
STUDENT_VOCABULARY = 49_152
PIECES = (0.92, 0.06, 0.02)
"""Share of the teacher's tokens that are one, two and three tokens of the student."""
BYTES_A_TOKEN = 2
"""Of a student token of random text."""
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ----------------------------------------------------------------------------- models and text


@dataclass(frozen=True)
class Body:
    """Sizes of a model, all but its vocabulary."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    inner: int
    """Width between the two layers of an MLP."""

    def config(self, kind: type[PretrainedConfig], vocabulary: int) -> PretrainedConfig:
        """Return the config of a model of these sizes, with tied embeddings."""
        return kind(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            intermediate_size=self.inner,
            vocab_size=vocabulary,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        )


QWEN_1_5B = Body(width=1536, layers=28, heads=12, key_value_heads=2, inner=8960)
TINY_TEACHER = Body(width=512, layers=2, heads=8, key_value_heads=2, inner=1024)
STUDENTS = {
    "tiny": Body(width=576, layers=2, heads=9, key_value_heads=3, inner=1536),
    "smollm2-135m": Body(width=576, layers=30, heads=9, key_value_heads=3, inner=1536),
    "smollm2-360m": Body(width=960, layers=32, heads=15, key_value_heads=5, inner=2560),
}


def shapes(name: str, teacher_vocabulary: int, student_vocabulary: int) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Return the configs of (teacher, student) for the name of a student."""
    teacher = TINY_TEACHER if name == "tiny" else QWEN_1_5B
    return (
        teacher.config(Qwen2Config, teacher_vocabulary),
        STUDENTS[name].config(LlamaConfig, student_vocabulary),
    )


def vocabulary_map(teacher: int, student: int) -> VocabularyMap:
    """Return a map that spells every teacher token in one to three random student tokens.

    Args:
        teacher, student: tokens of the vocabularies.
    """
    random = np.random.default_rng(0)
    spellings = random.integers(0, student, (teacher, len(PIECES)))
    lengths = random.choice(len(PIECES), teacher, p=PIECES) + 1

    # -1 pads the spellings that are shorter than the longest one.
    is_piece = np.arange(len(PIECES)) < lengths[:, None]
    return VocabularyMap.from_segments(np.where(is_piece, spellings, -1), student)


def random_windows(vocabulary: VocabularyMap, batch: int, length: int) -> list[dict]:
    """Return windows of random teacher tokens, which the student spells in at most `length` tokens."""
    random = np.random.default_rng(1)

    windows = []
    for _ in range(batch):
        # As many of the teacher's tokens as the student's window has room for.
        teacher_ids = random.integers(0, len(vocabulary.segments), length)
        lengths = (vocabulary.segments[teacher_ids] >= 0).sum(1)
        fits = np.cumsum(lengths) <= length
        teacher_ids = teacher_ids[fits]
        lengths = lengths[fits]

        spellings = vocabulary.segments[teacher_ids]
        student_ids = spellings[spellings >= 0]
        student_lengths = np.ones(len(student_ids), dtype=np.int64)

        windows.append(
            {
                "bytes": BYTES_A_TOKEN * len(student_ids),
                "documents": "",
                **_columns("student", student_ids, student_lengths),
                **_columns("teacher", teacher_ids, lengths),
            }
        )
    return windows


def _columns(side: str, ids: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Return one side of a window.

    Args:
        ids: [n] tokens.
        lengths: [n] student tokens that spell each.
    """
    sizes = BYTES_A_TOKEN * lengths
    ends = np.cumsum(sizes)
    is_first = np.arange(len(ids)) == 0
    return {
        f"{side}_ids": ids,
        f"{side}_starts": ends - sizes,
        f"{side}_ends": ends,
        # A window's first token is read only, nothing predicts it.
        f"{side}_roles": np.where(is_first, MARKER, TEXT),
    }


def random_batch(vocabulary: VocabularyMap, batch: int, length: int) -> PairedBatch:
    """Return `random_windows` as a batch."""
    collate = PairCollator(vocabulary, (None, None), LossConfig().max_depth)
    return collate(random_windows(vocabulary, batch, length))


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
    teacher_config, student_config = shapes(shape, teacher_vocabulary, student_vocabulary)
    with device:
        teacher = AutoModelForCausalLM.from_config(teacher_config, dtype=teacher_dtype)
        student = AutoModelForCausalLM.from_config(student_config, dtype=torch.float32)

    loss = LossConfig()
    terms = CurriculumConfig(kd=Term(0.7), lm=Term(0.3))
    return DistillationFramework(
        student=student.train(),
        teacher=FrozenTeacher(teacher, vocabulary),
        vocabulary=vocabulary,
        loss=loss,
        curriculum=CurriculumScheduler(terms, loss, 100),
    )


# ----------------------------------------------------------------------------- measurement


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
    """Measure both models alone, the step and, once more by itself, its teacher's part; return (runs, the batch)."""
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


def report_measured(measured: dict[str, list[Run]], batch: PairedBatch, clock: bool) -> tuple[str, dict]:
    """Return the table of measured works, and its content.

    Args:
        clock: seconds are those of the clock; otherwise CPU seconds.
    """
    times = {}
    for name, runs in measured.items():
        times[name] = np.array([run.wall if clock else run.seconds for run in runs])
    numbers = {name: summary(runs) for name, runs in measured.items()}

    # The ratio of each round, since all works of a round share the machine's noise.
    ratios = times["step"] / (times["teacher alone"] + times["student alone"])
    ratio = float(np.median(ratios))
    tokens = batch.counts["lm"]

    rows = []
    for name in measured:
        seconds = float(np.median(times[name]))
        is_step = name == "step"
        rows.append(
            [
                name,
                f"{seconds:.2f}",
                f"{ratio:.2f} ({ratios.min():.2f} to {ratios.max():.2f})" if is_step else "",
                f"{numbers[name]['peak'] / MB:,.0f}",
                f"{tokens / seconds:,.0f}" if is_step else "",
            ]
        )

    header = ["", "s, median", "over both alone (range)", "MB above models", "student tokens/s"]
    return table(header, rows), {**numbers, "ratio": ratio, "ratios": ratios.tolist(), "tokens": tokens}


# ----------------------------------------------------------------------------- forecast


@dataclass(frozen=True)
class Card:
    """Paper figures of a card, and the share of each that is assumed to be reached."""

    half: float
    """FLOP/s of products of half-precision factors."""
    single: float
    """FLOP/s of products of float32 factors."""
    bytes: float
    """Bytes of memory a second."""
    half_share: float
    single_share: float = 0.8
    bytes_share: float = 0.75
    rows: int = GPU_ROWS
    """Rows of logits at once."""


CARDS = {
    # A P100 multiplies half-precision factors in float32.
    "P100": Card(half=9.3e12, single=9.3e12, bytes=732e9, half_share=0.8, rows=PASCAL_ROWS),
    # A T4 sustains less than half of its tensor cores' figure.
    "T4": Card(half=65e12, single=8.1e12, bytes=320e9, half_share=0.4),
}
PCIE = 12e9 * 0.75
"""Bytes a second between two cards, through the host."""
BYTES_OF_OUTCOME = 12
"""Of each of a position's top k between two cards: an id and a log-probability."""
BYTES_OF_POSITION = 16
"""Beside its top k."""


@dataclass
class Costs:
    """Costs of a series of operations."""

    ops: list[tuple[float, float]] = field(default_factory=list)
    """(FLOP, bytes moved) of each operation."""

    @property
    def flop(self) -> float:
        """Floating-point operations in all."""
        return sum(flop for flop, _ in self.ops)

    @property
    def bytes(self) -> float:
        """Bytes moved in all."""
        return sum(moved for _, moved in self.ops)

    def seconds(self, card: Card) -> float:
        """Return the time on a card: each operation takes as long as the slower of computing and moving."""
        rate = card.half * card.half_share
        speed = card.bytes * card.bytes_share
        return sum(max(flop / rate, moved / speed) for flop, moved in self.ops)


class _Count(TorchDispatchMode):
    """Counts the costs of all operations inside: each reads its arguments and writes its results, once each."""

    FREE = ("empty", "new_empty", "detach", "_unsafe_view", "alias", "lift_fresh")
    """Beginnings of the names of operations that move nothing, as views do."""

    def __init__(self) -> None:
        super().__init__()
        self.costs = Costs()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)

        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(self.FREE):
            return out

        flop = 0
        if counter := flop_registry.get(func.overloadpacket):
            flop = counter(*args, **kwargs, out_val=out)
        # torch knows the FLOP of attention for the kernels of GPUs, not for the one that fake tensors on a CPU take.
        if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
            flop = _attention_flop(args, is_backward="backward" in name)

        # A tensor that is argument and result, or two arguments, is moved once.
        tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.costs.ops.append((flop, moved))
        return out


def _attention_flop(args: tuple, is_backward: bool) -> float:
    """Return the FLOP of attention over all pairs of positions, from the arguments of the operation."""
    # Forward: queries and keys. Backward has (gradient, queries, keys, values): keys and values are taken, by which
    # query heads that share keys are counted once.
    first = 2 if is_backward else 0
    readers = args[first]
    read = args[first + 1]

    windows, heads, positions, width = readers.shape
    products = 2  # of queries with keys, and of probabilities with values
    flop = products * 2 * windows * heads * positions * read.shape[2] * width

    # Backward computes the probabilities again, and two products for each of the forward's.
    return 2.5 * flop if is_backward else flop


def _counted(work: Callable[[], object]) -> Costs:
    """Return the costs of a work."""
    with _Count() as count:
        work()
    return count.costs


def _body(model: nn.Module, ids: Tensor, backward: bool) -> Costs:
    """Return the costs of a model's body, forward or forward and backward."""

    def work() -> None:
        with torch.set_grad_enabled(backward):
            states = body_states(model, ids)
            if backward:
                states.backward(torch.empty_like(states))

    return _counted(work)


def _teacher_head(model: nn.Module, tokens: int, top_k: int, rows: int) -> Costs:
    """Return the costs of the head in `FrozenTeacher.signal`, every position an anchor at depth 0."""
    head = model.get_output_embeddings()
    states = torch.empty(tokens, head.weight.shape[1], dtype=head.weight.dtype)
    realised = torch.zeros(tokens, dtype=torch.long)

    def work() -> None:
        for part in torch.arange(tokens).split(rows):
            logits = head(states[: len(part)]).float()
            # The realised tokens, the largest, and the sum of all others, in the logits' own memory.
            logits.gather(1, realised[: len(part), None])
            _, columns = exact_top_k(logits, top_k)
            logits.sub_(logits[:, :1]).exp_().scatter_(1, columns, 0.0).sum(1)

    with torch.no_grad():
        return _counted(work)


def _student_head(model: nn.Module, tokens: int, top_k: int, rows: int) -> Costs:
    """Return the costs of the student's head with LM and KD at every position, forward and backward."""
    head = model.get_output_embeddings()
    states = torch.empty(tokens, head.weight.shape[1], dtype=head.weight.dtype, requires_grad=True)

    # Values do not matter: the tensors are fake.
    ids = torch.zeros(tokens, top_k, dtype=torch.long)
    probs = torch.empty(tokens, top_k)
    target = HeadTarget(
        SparseTarget(ids, probs, tail=probs[:, 0], valid=ids[:, 0] == 0),
        rows=None,
        temperature=1.0,
        kind="forward_kl",
        tail="bucket",
        skew=0.1,
    )

    def work() -> None:
        labels = torch.zeros(tokens, dtype=torch.long)
        losses = head_losses(
            states,
            head,
            labels,
            lm_weight=0.3 / tokens,
            kd_weight=0.7 / tokens,
            target=target,
            computation=HeadComputation(chunk=rows),
        )
        losses.loss.backward()

    return _counted(work)


@dataclass(frozen=True)
class StepCosts:
    """Costs of the four parts of a step on one card."""

    teacher_body: Costs
    student_body: Costs
    teacher_head: Costs
    student_head: Costs

    @property
    def parts(self) -> tuple[Costs, ...]:
        """All parts."""
        return (self.teacher_body, self.student_body, self.teacher_head, self.student_head)


def count_step(shape: str, batch: int, length: int) -> dict[str, StepCosts]:
    """Count the operations of a step of true vocabularies; return its costs by card.

    Args:
        batch: windows.
        length: tokens of each.
    """
    top_k = LossConfig().top_k
    tokens = batch * length
    teacher_config, student_config = shapes(shape, TEACHER_VOCABULARY, STUDENT_VOCABULARY)

    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher = AutoModelForCausalLM.from_config(teacher_config, dtype=torch.float16)
        student = AutoModelForCausalLM.from_config(student_config, dtype=torch.float16)
        ids = torch.zeros(batch, length, dtype=torch.long)
        teacher_body = _body(teacher, ids, backward=False)
        student_body = _body(student, ids, backward=True)

        # Only the heads depend on the card, by the rows of logits that it has at once.
        costs = {}
        for name, card in CARDS.items():
            costs[name] = StepCosts(
                teacher_body=teacher_body,
                student_body=student_body,
                teacher_head=_teacher_head(teacher, tokens, top_k, card.rows),
                student_head=_student_head(student, tokens, top_k, card.rows),
            )
    return costs


def forecast(shape: str, batch: int, length: int) -> tuple[list[list], dict]:
    """Return the rows of the table, one a card and one for two T4, and their numbers."""
    tokens = batch * length
    rows = []
    numbers = {}
    for name, costs in count_step(shape, batch, length).items():
        card = CARDS[name]
        flop = sum(part.flop for part in costs.parts)
        moved = sum(part.bytes for part in costs.parts)
        first_cells = [shape, f"{batch} x {length}", f"{flop / 1e12:.2f}", f"{moved / 1e9:,.0f}"]

        teacher = costs.teacher_body.seconds(card) + costs.teacher_head.seconds(card)
        body = costs.student_body.seconds(card)
        head = costs.student_head.seconds(card)
        total = teacher + body + head

        split = f"teacher {teacher * 1e3:,.0f}, body {body * 1e3:,.0f}, head {head * 1e3:,.0f}"
        rows.append([*first_cells, name, f"{total * 1e3:,.0f} ({split})", f"{tokens / total:,.0f}"])
        numbers[f"{shape} {batch}x{length} {name}"] = {
            "flop": flop,
            "bytes": moved,
            "teacher": teacher,
            "student body": body,
            "student head": head,
            "step": total,
        }

        # Two T4: the teacher on one of them sends its top k to the other.
        if name == "T4":
            signal = tokens * (LossConfig().top_k * BYTES_OF_OUTCOME + BYTES_OF_POSITION) / PCIE
            least = max(teacher, body + head) + signal
            most = total + signal
            times = f"{least * 1e3:,.0f} (both work at once) to {most * 1e3:,.0f} (one after the other)"
            rows.append([*first_cells, "T4 x2", times, f"{tokens / most:,.0f} to {tokens / least:,.0f}"])
            numbers[f"{shape} {batch}x{length} T4 x2"] = {"least": least, "most": most}
    return rows, numbers


# ----------------------------------------------------------------------------- command


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", "smollm2-135m", "smollm2-360m"], default="tiny")
    parser.add_argument("--teacher-vocabulary", type=int, default=TEACHER_VOCABULARY)
    parser.add_argument("--student-vocabulary", type=int, default=STUDENT_VOCABULARY)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=DTYPES, default="no", help="student's autocast and teacher's weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds, after one that is not")
    parser.add_argument("--forecast", action="store_true", help="only the forecast")
    parser.add_argument("--json", type=Path, default=Path("step-time.json"))
    return parser.parse_args()


def print_measured(args: argparse.Namespace, facts: dict) -> dict:
    """Measure, and print the machine, the sizes and the table; return the table's content."""
    measured, batch = run_measured(args)

    # CPU seconds would add up the threads; a GPU has none.
    uses_clock = args.threads > 1 or torch.device(args.device).type == "cuda"
    text, numbers = report_measured(measured, batch, clock=uses_clock)

    sizes = f"{args.shape}, {args.batch} x {args.length} tokens, precision {args.precision}"
    sizes += f", vocabularies {args.teacher_vocabulary:,} and {args.student_vocabulary:,}"
    print(f"{describe(facts)}\n{sizes}\n\n{text}\n")
    return numbers


def print_forecast() -> dict:
    """Print the forecast for both students at two sizes; return the table's content."""
    rows = []
    numbers = {}
    for shape in ("smollm2-135m", "smollm2-360m"):
        for batch, length in ((2, 512), (8, 1024)):
            new_rows, new_numbers = forecast(shape, batch, length)
            rows += new_rows
            numbers |= new_numbers

    print("FORECAST from counted operations; nothing here was measured. Teacher: Qwen2.5-1.5B, fp16; no optimizer.\n")
    print(table(["student", "tokens", "TFLOP", "GB moved", "card", "ms a step", "student tokens/s"], rows))
    return numbers


def main() -> None:
    """Print the tables that the command line asks for, and write their content."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)

    content = {
        "machine": machine(torch.device(args.device), args.threads),
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
    }
    if not args.forecast:
        content["measured"] = print_measured(args, content["machine"])
    content["forecast"] = print_forecast()

    write(args.json, content)


if __name__ == "__main__":
    main()
