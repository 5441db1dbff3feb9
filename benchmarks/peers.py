"""The fused head beside its peers: seconds, peak memory and gradient error on the same tensors.

    python -m benchmarks.peers
    python -m benchmarks.peers --vocabulary 151936 --variants bare plain fused
    PYTHONPATH=trl-folder:liger-folder TRL_EXPERIMENTAL_SILENCE=1 python -m benchmarks.peers

Peers are measured where they can be imported, and nothing is installed into the project:

    pip install --no-deps --target trl-folder trl
    pip install --no-deps --target liger-folder liger-kernel

The work: from final hidden states [N, H] and the weight of the head [V, H] to the gradient of both. Every variant is
measured in a process of its own, in rounds in which each runs once. Its gradient is compared with that of the same
loss in float64. A peer that computes another loss says so in the table. The teacher is given in the form that a
variant asks for, as top-k probabilities, as logits, or as states and head; its states are only --teacher-width wide,
so that those who compute its logits themselves pay little for it.

Peak memory: above the inputs and the two gradients that every variant returns. Seconds: CPU seconds, glibc's malloc
as it is; the share of the kernel, which hands out fresh pages for every large temporary, is in a column of its own.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import MB, Worker, describe, interleave, machine, serve, summary, table, write
from models.losses.fused_head import HeadComputation, HeadTarget, head_losses
from models.losses.losses import kd_loss, next_token_loss
from models.types import SparseTarget

LM, KD = 0.3, 0.7
"""Weights of the two terms."""
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS = {"temperature": 1.0, "kind": "forward_kl", "tail": "bucket", "skew": 0.1}
"""Of the KD term."""
BLOCK = 128
"""Rows of the float64 reference at once."""
IGNORED = -100
"""Label of a position that predicts nothing, in other libraries."""

Loss = Callable[[], Tensor]
"""A variant's forward."""


class Problem:
    """The tensors: the same in every process. Logits of student and teacher have a standard deviation of 2.5.

    Shapes: N tokens, H the student's width, T the teacher's width, V vocabulary.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.tokens = args.tokens
        self.windows = args.windows
        self.precision = args.precision
        random = torch.Generator().manual_seed(0)

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return torch.randn(rows, columns, generator=random).mul_(scale).to(self.device)

        # Every tensor continues the same stream of random numbers: their order is part of the problem.
        self.states = normal(args.tokens, args.width).requires_grad_()
        self.weight = nn.Parameter(normal(args.vocabulary, args.width, scale=2.5 / args.width**0.5))
        self.labels = torch.randint(args.vocabulary, (args.tokens,), generator=random).to(self.device)
        self.teacher_states = normal(args.tokens, args.teacher_width)
        self.teacher_weight = normal(args.vocabulary, args.teacher_width, scale=2.5 / args.teacher_width**0.5)
        self.target = self._sparse_target(min(args.top_k, args.vocabulary))

    def _sparse_target(self, top_k: int) -> SparseTarget:
        """Return the teacher's top k at every position."""
        probs = []
        ids = []
        for rows in self.teacher_states.split(BLOCK):
            logits = rows @ self.teacher_weight.t()
            largest = logits.softmax(1).topk(top_k)
            probs.append(largest.values)
            ids.append(largest.indices)

        all_probs = torch.cat(probs)
        return SparseTarget(
            ids=torch.cat(ids),
            probs=all_probs,
            tail=1 - all_probs.sum(1),
            valid=torch.ones(self.tokens, dtype=torch.bool, device=self.device),
        )

    def autocast(self) -> AbstractContextManager:
        """Return the autocast in which a training computes its forward."""
        if self.precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.precision])

    def logits(self) -> Tensor:
        """Return the student's logits [N, V]."""
        return self.states @ self.weight.t()

    def teacher_logits(self) -> Tensor:
        """Return the teacher's logits [N, V]."""
        return self.teacher_states @ self.teacher_weight.t()

    def double(self) -> "Problem":
        """Return the same in float64, with gradients of its own."""
        other = copy.copy(self)
        other.states = self.states.detach().double().requires_grad_()
        other.weight = self.weight.detach().double().requires_grad_()
        other.teacher_states = self.teacher_states.double()
        other.teacher_weight = self.teacher_weight.double()
        other.target = SparseTarget(
            ids=self.target.ids,
            probs=self.target.probs.double(),
            tail=self.target.tail.double(),
            valid=self.target.valid,
        )
        return other

    def rows(self, part: slice) -> "Problem":
        """Return the same for some of the positions; gradients go to those of the whole."""
        other = copy.copy(self)
        other.states = self.states[part]
        other.labels = self.labels[part]
        other.teacher_states = self.teacher_states[part]
        other.target = self.target.rows(part)
        return other


# ----------------------------------------------------------------------------- losses in plain PyTorch, as sums


def _lm(logits: Tensor, problem: Problem) -> Tensor:
    """Sum the next-token losses."""
    return next_token_loss(logits, problem.labels)


def _sparse(logits: Tensor, problem: Problem) -> Tensor:
    """Sum LM and KD on the top k and the bucket."""
    return LM * _lm(logits, problem) + KD * kd_loss(logits, problem.target, **OPTIONS)


def _kl(logits: Tensor, problem: Problem, teacher_logits: Tensor | None = None) -> Tensor:
    """Sum the KL divergences on all tokens; the teacher's logits are computed unless they are given."""
    if teacher_logits is None:
        teacher_logits = problem.teacher_logits()
    return F.kl_div(logits.log_softmax(1), teacher_logits.log_softmax(1), reduction="sum", log_target=True)


def _full(logits: Tensor, problem: Problem, teacher_logits: Tensor | None = None) -> Tensor:
    """Sum LM and KL on all tokens."""
    return LM * _lm(logits, problem) + KD * _kl(logits, problem, teacher_logits)


LOSSES: dict[str, Callable[[Tensor, Problem], Tensor]] = {"sparse": _sparse, "full": _full, "kl": _kl, "lm": _lm}


def reference(loss: str, problem: Problem) -> tuple[Tensor, Tensor] | None:
    """Return the gradients of (states, weight) in float64; None where memory does not suffice."""
    exact = problem.double()

    # Only GOLD's own code defines its loss, which needs all logits at once, about a dozen times over.
    if loss == "gold":
        need = 12 * 8 * problem.tokens * len(problem.weight)
        if need > psutil.virtual_memory().available:
            return None
        gold(exact)().backward()
        return exact.states.grad, exact.weight.grad

    # All others are sums over positions: block by block, since float64 logits of all would not fit.
    for first in range(0, problem.tokens, BLOCK):
        part = exact.rows(slice(first, first + BLOCK))
        total = LOSSES[loss](part.logits(), part)
        (total / problem.tokens).backward()
    return exact.states.grad, exact.weight.grad


# ----------------------------------------------------------------------------- variants: Problem -> forward to measure
#
# What a variant is given is prepared before it is measured; other libraries are imported only by their variants.


def plain(problem: Problem) -> Loss:
    """Prepare LM and KD from all logits at once."""
    return lambda: _sparse(problem.logits(), problem) / problem.tokens


def plain_full(problem: Problem) -> Loss:
    """Prepare LM and KL on all tokens from all logits at once."""
    teacher_logits = problem.teacher_logits()
    return lambda: _full(problem.logits(), problem, teacher_logits) / problem.tokens


def fused(problem: Problem, compiled: bool = False) -> Loss:
    """Prepare this project's head."""
    vocabulary, width = problem.weight.shape
    head = nn.Linear(width, vocabulary, bias=False, device="meta")
    head.weight = problem.weight

    target = HeadTarget(problem.target, rows=None, **OPTIONS)
    computation = HeadComputation(compiled=compiled)

    def forward() -> Tensor:
        losses = head_losses(
            problem.states,
            head,
            problem.labels,
            lm_weight=LM / problem.tokens,
            kd_weight=KD / problem.tokens,
            target=target,
            computation=computation,
        )
        return losses.loss

    return forward


def bare(problem: Problem) -> Callable[[], None]:
    """Prepare the three products of any head, into memory that is there already."""
    dtype = PRECISIONS[problem.precision]
    states = problem.states.detach().to(dtype)
    weight = problem.weight.detach().to(dtype)

    logits = torch.zeros(len(states), len(weight), device=problem.device, dtype=dtype)
    states_gradient = torch.zeros_like(states)
    weight_gradient = torch.zeros_like(weight)

    def products() -> None:
        torch.mm(states, weight.t(), out=logits)
        torch.mm(logits, weight, out=states_gradient)
        torch.mm(logits.t(), states, out=weight_gradient)

    return products


def gkd(problem: Problem) -> Loss:
    """Prepare the loss of TRL's GKD trainer."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    # Looked up before it is measured: a version without it is left out of the table.
    loss = GKDTrainer.generalized_jsd_loss
    teacher_logits = problem.teacher_logits()[None]

    def forward() -> Tensor:
        logits = problem.logits()[None]
        return loss(logits, teacher_logits, labels=problem.labels[None], beta=0)

    return forward


def trl_chunked(problem: Problem) -> Loss:
    """Prepare the chunked loss of TRL's distillation trainer."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    teacher_states = problem.teacher_states[None]
    mask = torch.ones(1, problem.tokens, device=problem.device)

    def forward() -> Tensor:
        outputs = _chunked_divergence_loss(
            problem.states[None],
            teacher_states,
            problem.weight,
            problem.teacher_weight,
            mask,
            beta=0.0,
        )
        return outputs[0]

    return forward


def gold(problem: Problem) -> Loss:
    """Prepare the loss of TRL's GOLD trainer, for two tokenizers that cut alike."""
    from benchmarks.quality import gold_loss

    loss = gold_loss(LM, KD)
    windows = problem.windows
    length = problem.tokens // windows
    if windows * length != problem.tokens:
        raise ValueError(f"got {problem.tokens} tokens in {problem.windows} windows, expected a multiple")

    # Nothing predicts a window's first token.
    ids = problem.labels.view(windows, length)
    labels = ids.index_fill(1, torch.tensor([0], device=problem.device), IGNORED)

    # Every token is one byte long.
    start = torch.arange(length, device=problem.device)
    offsets = torch.stack([start, start + 1], 1).expand(windows, length, 2)
    teacher_logits = problem.teacher_logits().unflatten(0, (windows, length))

    def forward() -> Tensor:
        logits = problem.logits().unflatten(0, (windows, length))
        # Student and teacher, in this order: labels, ids and offsets of each.
        return loss(logits, teacher_logits, labels, labels, ids, ids, offsets, offsets)

    return forward


def liger(problem: Problem, chunk: int) -> Loss:
    """Prepare Liger's fused divergence with so many rows at once."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(LM, KD, beta=0.0, compiled=False, chunk_size=chunk)

    def forward() -> Tensor:
        return loss(
            problem.states,
            problem.weight,
            problem.teacher_states,
            problem.teacher_weight,
            problem.labels,
        )

    return forward


def torch_lce(problem: Problem) -> Loss:
    """Prepare torch's own cross-entropy of a linear head, which torch has from some version on."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(problem.states, problem.weight, problem.labels, options=options)


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    title: str
    computes: str
    """The loss and the form of the teacher, in words."""
    prepare: Callable[[Problem], Callable[[], Tensor | None]]
    loss: str = ""
    """Name of the loss whose gradient it has to have, as `reference` knows it; empty: none."""


OURS = "LM + KD on top k and bucket"
GIVEN = "given the teacher's logits"
TOO = "computes the teacher's logits"
VARIANTS = {
    "bare": Variant(
        title="bare products",
        computes="forward, dH, dW; no loss",
        prepare=bare,
    ),
    "plain": Variant(
        title="plain PyTorch",
        computes=OURS,
        prepare=plain,
        loss="sparse",
    ),
    "fused": Variant(
        title="**fused head**",
        computes=OURS,
        prepare=fused,
        loss="sparse",
    ),
    "fused-compiled": Variant(
        title="fused head, compiled passes",
        computes=OURS,
        prepare=partial(fused, compiled=True),
        loss="sparse",
    ),
    "plain-full": Variant(
        title="plain PyTorch, full KL",
        computes=f"LM + KL on all tokens; {GIVEN}",
        prepare=plain_full,
        loss="full",
    ),
    "gkd": Variant(
        title="TRL GKD, beta 0",
        computes=f"KL on all tokens, no LM; {GIVEN}",
        prepare=gkd,
        loss="kl",
    ),
    "trl-chunked": Variant(
        title="TRL chunked divergence",
        computes=f"KL on all tokens, no LM; {TOO}, twice",
        prepare=trl_chunked,
        loss="kl",
    ),
    "liger-128": Variant(
        title="Liger JSD, beta 0, chunk 128",
        computes=f"LM + KL on all tokens; {TOO}",
        prepare=partial(liger, chunk=128),
        loss="full",
    ),
    "liger-1024": Variant(
        title="Liger JSD, beta 0, chunk 1,024",
        computes=f"LM + KL on all tokens; {TOO}",
        prepare=partial(liger, chunk=1024),
        loss="full",
    ),
    "torch-lce": Variant(
        title="torch linear_cross_entropy, auto chunks",
        computes="LM alone",
        prepare=torch_lce,
        loss="lm",
    ),
    "gold": Variant(
        title="TRL GOLD",
        computes=f"LM + L1 of sorted probabilities (ULD); {GIVEN}",
        prepare=gold,
        loss="gold",
    ),
}


# ----------------------------------------------------------------------------- measurement


class Work:
    """Forward and backward of a variant, and the error of the gradient that they leave behind."""

    def __init__(self, variant: Variant, problem: Problem, folder: Path) -> None:
        self.variant = variant
        self.problem = problem
        self.folder = folder
        """Of the float64 references, which the processes share."""
        self.loss = variant.prepare(problem)

    def clear(self) -> None:
        """Drop the gradients of the run before."""
        self.problem.states.grad = None
        self.problem.weight.grad = None

    def __call__(self) -> None:
        with self.problem.autocast():
            loss = self.loss()
        if loss is not None:
            loss.backward()

    def answer(self, _: str) -> dict:
        """Return the errors of the gradients of states and weight, relative to their norms; empty: no reference."""
        exact = self._reference()
        if exact is None:
            return {}

        states, weight = exact
        return {
            "states": _relative_error(self.problem.states.grad, states),
            "weight": _relative_error(self.problem.weight.grad, weight),
        }

    def _reference(self) -> tuple[Tensor, Tensor] | None:
        """Return the variant's reference, which the first process that asks for it computes."""
        name = self.variant.loss
        if not name:
            return None

        file = self.folder / f"{name}.pt"
        if not file.exists():
            torch.save(reference(name, self.problem), file)
        return torch.load(file)


def _relative_error(gradient: Tensor, exact: Tensor) -> float:
    """Return the distance of a gradient from the exact one, over the norm of that."""
    return float((gradient.double() - exact).norm() / exact.norm())


SHAPE = ("tokens", "width", "vocabulary", "top-k", "teacher-width", "windows", "device", "threads", "precision")
"""Arguments of the command that its worker processes are given, too."""


def compare(args: argparse.Namespace) -> dict[str, dict]:
    """Measure variants; return seconds, peak and errors of each by its name, or the reason why it was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        workers = {name: start_worker(name, folder, args) for name in args.variants}
        interleave(workers, args.repeats, args.limit)

        # One after the other: a reference takes more memory than a variant.
        results = {}
        for name, worker in workers.items():
            errors = gradient_error(name, worker) if args.error else {}
            worker.close()
            if worker.skipped:
                results[name] = {"skipped": worker.skipped}
            else:
                results[name] = {**summary(worker.runs), "error": errors}

    # Every loss returns gradients of states and weight in float32: they are not its own memory.
    returned = 4 * args.width * (args.tokens + args.vocabulary)
    for name, row in results.items():
        if "peak" in row:
            expected = returned if VARIANTS[name].loss else 0
            row["above"] = max(0, row["peak"] - expected)
    return results


def start_worker(name: str, folder: str, args: argparse.Namespace) -> Worker:
    """Start the process of a variant."""
    command = ["-m", "benchmarks.peers", "--worker", name, "--folder", folder]
    for flag in SHAPE:
        value = getattr(args, flag.replace("-", "_"))
        command.append(f"--{flag}={value}")
    return Worker(command, args.threads)


def gradient_error(name: str, worker: Worker) -> dict[str, float]:
    """Return the errors of a variant's gradients; empty where there are none."""
    if worker.skipped:
        return {}

    errors = worker.ask("error")
    # A process that ends over its reference has been measured all the same.
    if "skipped" in errors:
        print(f"no gradient error of {name}: {errors.pop('skipped')}", file=sys.stderr)
    return errors


def serve_variant(args: argparse.Namespace) -> None:
    """Measure one variant in this process, on request."""

    def prepare() -> tuple[Work, Callable[[], None]]:
        work = Work(VARIANTS[args.worker], Problem(args), args.folder)
        return work, work.clear

    serve(prepare, torch.device(args.device))


# ----------------------------------------------------------------------------- report and command


def report(results: dict[str, dict]) -> str:
    """Return the table of what was measured, and below it what was not and why."""
    bare_seconds = results.get("bare", {}).get("seconds")
    plain_bytes = results.get("plain", {}).get("above")

    rows = []
    notes = []
    for name, result in results.items():
        variant = VARIANTS[name]
        if result.get("skipped"):
            notes.append(f"not run: {variant.title}: {result['skipped']}")
            continue

        seconds = f"{result['seconds']:.2f} ({result['least']:.2f} to {result['most']:.2f}; {result['runs']})"
        times_bare = f"{result['seconds'] / bare_seconds:.2f}" if bare_seconds else ""

        # The bare products write into memory that they are given.
        megabytes = f"{result['above'] / MB:,.0f}" if variant.loss else ""
        of_plain = f"{result['above'] / plain_bytes:.1%}" if plain_bytes and variant.loss else ""

        errors = ["", ""]
        if result["error"]:
            errors = [f"{result['error'][side]:.1e}" for side in ("states", "weight")]

        rows.append(
            [
                variant.title,
                variant.computes,
                seconds,
                f"{result['kernel']:.2f}",
                times_bare,
                megabytes,
                of_plain,
                *errors,
            ]
        )

    header = ["variant", "computes", "CPU s, median (range; runs)", "of these kernel", "x bare", "MB", "of plain"]
    lines = [table([*header, "error dH", "error dW"], rows)]
    if notes:
        lines += ["", *notes]
    return "\n".join(lines)


def parser(doc: str) -> argparse.ArgumentParser:
    """Return the parser of the command line; other benchmarks take its defaults, without the description."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    # The problem.
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=576, help="of the student's states")
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--teacher-width", type=int, default=16)
    parser.add_argument("--windows", type=int, default=8, help="GOLD only: so many texts; fewer take longer")

    # The machine.
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="no", help="of autocast, and of the bare products")
    parser.add_argument("--threads", type=int, default=1)

    # The measurement.
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds, after one that is not")
    parser.add_argument("--limit", type=float, default=40, help="a variant that took so many seconds runs no more")
    parser.add_argument("--no-error", dest="error", action="store_false", help="without the float64 references")
    parser.add_argument("--json", type=Path, default=Path("peers.json"))

    # Given to the processes of the variants.
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Compare the variants, print the table and write it; with `--worker`, be the process of one of them."""
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        serve_variant(args)
        return

    facts = machine(torch.device(args.device), args.threads)  # first: the load in it is that before the measurement
    results = compare(args)

    shape = f"N = {args.tokens:,} tokens, width {args.width}, V = {args.vocabulary:,}, top {args.top_k}"
    shape += f", precision {args.precision}"
    print(f"{describe(facts)}\n{shape}\n\n{report(results)}")

    internal = ("json", "worker", "folder")
    settings = {name: value for name, value in vars(args).items() if name not in internal}
    write(args.json, {"machine": facts, "settings": settings, "variants": results})


if __name__ == "__main__":
    main()
