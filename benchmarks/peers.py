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
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS = {"temperature": 1.0, "kind": "forward_kl", "tail": "bucket", "skew": 0.1}
BLOCK = 128
"""Rows of the float64 reference at once."""


class Problem:
    """The tensors: the same in every process. Logits of student and teacher have a standard deviation of 2.5."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.tokens, self.windows = args.tokens, args.windows
        self.precision = args.precision
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=random).mul_(scale).to(self.device)

        self.states = normal(args.tokens, args.width).requires_grad_()
        self.weight = nn.Parameter(normal(args.vocabulary, args.width, scale=2.5 / args.width**0.5))
        self.labels = torch.randint(args.vocabulary, (args.tokens,), generator=random).to(self.device)
        self.teacher_states = normal(args.tokens, args.teacher_width)
        self.teacher_weight = normal(args.vocabulary, args.teacher_width, scale=2.5 / args.teacher_width**0.5)
        parts = []
        for rows in self.teacher_states.split(BLOCK):
            parts.append((rows @ self.teacher_weight.t()).softmax(1).topk(min(args.top_k, args.vocabulary)))
        probs, ids = (torch.cat(column) for column in zip(*parts, strict=True))
        everywhere = torch.ones(args.tokens, dtype=torch.bool, device=self.device)
        self.target = SparseTarget(ids, probs, 1 - probs.sum(1), everywhere)

    def autocast(self) -> AbstractContextManager:
        """Return the autocast in which a training computes its forward."""
        if self.precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.precision])

    def teacher_logits(self) -> Tensor:
        return self.teacher_states @ self.teacher_weight.t()

    def double(self) -> "Problem":
        """The same in float64, with gradients of its own."""
        other = object.__new__(Problem)
        vars(other).update(vars(self))
        for name in ("states", "weight"):
            setattr(other, name, getattr(self, name).detach().double().requires_grad_())
        for name in ("teacher_states", "teacher_weight"):
            setattr(other, name, getattr(self, name).double())
        t = self.target
        other.target = SparseTarget(t.ids, t.probs.double(), t.tail.double(), t.valid)
        return other

    def rows(self, part: slice) -> "Problem":
        other = object.__new__(Problem)
        vars(other).update(vars(self))
        for name in ("states", "labels", "teacher_states"):
            setattr(other, name, getattr(self, name)[part])
        t = self.target
        other.target = SparseTarget(t.ids[part], t.probs[part], t.tail[part], t.valid[part])
        return other


# ----------------------------------------------------------------------------- losses in plain PyTorch, as sums


def _lm(logits: Tensor, p: Problem) -> Tensor:
    return next_token_loss(logits, p.labels)


def _sparse(logits: Tensor, p: Problem) -> Tensor:
    return LM * _lm(logits, p) + KD * kd_loss(logits, p.target, **OPTIONS)


def _kl(logits: Tensor, p: Problem, teacher: Tensor | None = None) -> Tensor:
    teacher = p.teacher_logits() if teacher is None else teacher
    return F.kl_div(logits.log_softmax(1), teacher.log_softmax(1), reduction="sum", log_target=True)


def _full(logits: Tensor, p: Problem, teacher: Tensor | None = None) -> Tensor:
    return LM * _lm(logits, p) + KD * _kl(logits, p, teacher)


LOSSES: dict[str, Callable[[Tensor, Problem], Tensor]] = {"sparse": _sparse, "full": _full, "kl": _kl, "lm": _lm}


def reference(loss: str, p: Problem) -> tuple[Tensor, Tensor] | None:
    """Gradient of states and weight in float64, block by block; None where memory does not suffice."""
    exact = p.double()
    if loss == "gold":  # only its own code says what it is
        need = 12 * 8 * p.tokens * len(p.weight)
        if need > psutil.virtual_memory().available:
            return None
        gold(exact)().backward()
    else:
        for first in range(0, p.tokens, BLOCK):
            part = exact.rows(slice(first, first + BLOCK))
            (LOSSES[loss](part.states @ part.weight.t(), part) / p.tokens).backward()
    return exact.states.grad, exact.weight.grad


# ----------------------------------------------------------------------------- variants: Problem -> what is measured


def plain(p: Problem) -> Callable[[], Tensor]:
    return lambda: _sparse(p.states @ p.weight.t(), p) / p.tokens


def plain_full(p: Problem) -> Callable[[], Tensor]:
    teacher = p.teacher_logits()
    return lambda: _full(p.states @ p.weight.t(), p, teacher) / p.tokens


def fused(p: Problem, compiled: bool = False) -> Callable[[], Tensor]:
    head = nn.Linear(*reversed(p.weight.shape), bias=False, device="meta")
    head.weight = p.weight
    options = {
        "lm_weight": LM / p.tokens,
        "kd_weight": KD / p.tokens,
        "target": HeadTarget(p.target, rows=None, **OPTIONS),
        "computation": HeadComputation(compiled=compiled),
    }
    return lambda: head_losses(p.states, head, p.labels, **options).loss


def bare(p: Problem) -> Callable[[], None]:
    """The three products, into memory that is there already."""
    dtype = PRECISIONS[p.precision]
    states, weight = p.states.detach().to(dtype), p.weight.detach().to(dtype)
    logits = torch.zeros(len(states), len(weight), device=p.device, dtype=dtype)
    out = torch.zeros_like(states), torch.zeros_like(weight)

    def products() -> None:
        torch.mm(states, weight.t(), out=logits)
        torch.mm(logits, weight, out=out[0])
        torch.mm(logits.t(), states, out=out[1])

    return products


def gkd(p: Problem) -> Callable[[], Tensor]:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    teacher, loss = p.teacher_logits()[None], GKDTrainer.generalized_jsd_loss
    return lambda: loss((p.states @ p.weight.t())[None], teacher, labels=p.labels[None], beta=0)


def trl_chunked(p: Problem) -> Callable[[], Tensor]:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    states, teacher = p.states, p.teacher_states[None]
    mask = torch.ones(1, p.tokens, device=p.device)
    return lambda: _chunked_divergence_loss(states[None], teacher, p.weight, p.teacher_weight, mask, beta=0.0)[0]


def gold(p: Problem) -> Callable[[], Tensor]:
    from benchmarks.quality import gold_loss

    loss, shape = gold_loss(LM, KD), (p.windows, p.tokens // p.windows)
    if shape[0] * shape[1] != p.tokens:
        raise ValueError(f"got {p.tokens} tokens in {p.windows} windows, expected a multiple")
    teacher = p.teacher_logits().unflatten(0, shape)
    ids = p.labels.view(shape)
    labels = ids.index_fill(1, torch.tensor([0], device=p.device), -100)  # what is first is read, not predicted
    start = torch.arange(shape[1], device=p.device)
    offsets = torch.stack([start, start + 1], 1).expand(*shape, 2)
    both = (labels, labels, ids, ids, offsets, offsets)
    return lambda: loss((p.states @ p.weight.t()).unflatten(0, shape), teacher, *both)


def liger(p: Problem, chunk: int) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(LM, KD, beta=0.0, compiled=False, chunk_size=chunk)
    return lambda: loss(p.states, p.weight, p.teacher_states, p.teacher_weight, p.labels)


def torch_lce(p: Problem) -> Callable[[], Tensor]:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(p.states, p.weight, p.labels, options=options)


@dataclass(frozen=True)
class Variant:
    title: str
    computes: str
    prepare: Callable[[Problem], Callable[[], Tensor | None]]
    loss: str = ""
    """Whose gradient it has to be; empty: none."""


OURS = "LM + KD on top k and bucket"
GIVEN, TOO = "given the teacher's logits", "computes the teacher's logits"
VARIANTS = {
    "bare": Variant("bare products", "forward, dH, dW; no loss", bare),
    "plain": Variant("plain PyTorch", OURS, plain, "sparse"),
    "fused": Variant("**fused head**", OURS, fused, "sparse"),
    "fused-compiled": Variant("fused head, compiled passes", OURS, partial(fused, compiled=True), "sparse"),
    "plain-full": Variant("plain PyTorch, full KL", f"LM + KL on all tokens; {GIVEN}", plain_full, "full"),
    "gkd": Variant("TRL GKD, beta 0", f"KL on all tokens, no LM; {GIVEN}", gkd, "kl"),
    "trl-chunked": Variant("TRL chunked divergence", f"KL on all tokens, no LM; {TOO}, twice", trl_chunked, "kl"),
    "liger-128": Variant(
        "Liger JSD, beta 0, chunk 128", f"LM + KL on all tokens; {TOO}", partial(liger, chunk=128), "full"
    ),
    "liger-1024": Variant(
        "Liger JSD, beta 0, chunk 1,024", f"LM + KL on all tokens; {TOO}", partial(liger, chunk=1024), "full"
    ),
    "torch-lce": Variant("torch linear_cross_entropy, auto chunks", "LM alone", torch_lce, "lm"),
    "gold": Variant("TRL GOLD", f"LM + L1 of sorted probabilities (ULD); {GIVEN}", gold, "gold"),
}


class Work:
    """Forward and backward of a variant; what it answers to a question."""

    def __init__(self, variant: Variant, problem: Problem, folder: Path) -> None:
        self.variant, self.problem, self.folder = variant, problem, folder
        self.loss = variant.prepare(problem)

    def clear(self) -> None:
        self.problem.states.grad = self.problem.weight.grad = None

    def __call__(self) -> None:
        with self.problem.autocast():
            loss = self.loss()
        if loss is not None:
            loss.backward()

    def answer(self, _: str) -> dict:
        """The gradient's error, relative to its norm, states and weight apart; the reference is computed once."""
        name = self.variant.loss
        file = self.folder / f"{name}.pt"
        if name and not file.exists():
            torch.save(reference(name, self.problem), file)
        exact = torch.load(file) if name else None
        if exact is None:
            return {}
        grads = self.problem.states.grad, self.problem.weight.grad
        errors = [float((g.double() - e).norm() / e.norm()) for g, e in zip(grads, exact, strict=True)]
        return {"states": errors[0], "weight": errors[1]}


def compare(args: argparse.Namespace) -> dict[str, dict]:
    """Variant -> seconds, peak and errors, or why it was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        shape = [f"--{k}={getattr(args, k.replace('-', '_'))}" for k in SHAPE]
        workers = {
            name: Worker(["-m", "benchmarks.peers", "--worker", name, "--folder", folder, *shape], args.threads)
            for name in args.variants
        }
        interleave(workers, args.repeats, args.limit)
        found = {}
        for name, worker in workers.items():
            errors = {} if worker.skipped or not args.error else worker.ask("error")
            if not worker.skipped and "skipped" in errors:
                print(f"no gradient error of {name}: {errors.pop('skipped')}", file=sys.stderr)
            worker.close()
            found[name] = {"skipped": worker.skipped} if worker.skipped else {**summary(worker.runs), "error": errors}
    returned = 4 * args.width * (args.tokens + args.vocabulary)
    for name, row in found.items():
        if "peak" in row:
            row["above"] = max(0, row["peak"] - (returned if VARIANTS[name].loss else 0))
    return found


def report(found: dict[str, dict]) -> str:
    base, whole = found.get("bare", {}).get("seconds"), found.get("plain", {}).get("above")
    rows, notes = [], []
    for name, row in found.items():
        variant = VARIANTS[name]
        if row.get("skipped"):
            notes.append(f"not run: {variant.title}: {row['skipped']}")
            continue
        error = [f"{row['error'][k]:.1e}" if row["error"] else "" for k in ("states", "weight")]
        rows.append(
            [
                variant.title,
                variant.computes,
                f"{row['seconds']:.2f} ({row['least']:.2f} to {row['most']:.2f}; {row['runs']})",
                f"{row['kernel']:.2f}",
                f"{row['seconds'] / base:.2f}" if base else "",
                f"{row['above'] / MB:,.0f}" if variant.loss else "",
                f"{row['above'] / whole:.1%}" if whole and variant.loss else "",
                *error,
            ]
        )
    header = ["variant", "computes", "CPU s, median (range; runs)", "of these kernel", "x bare", "MB", "of plain"]
    return "\n".join([table([*header, "error dH", "error dW"], rows), *([""] if notes else []), *notes])


SHAPE = ("tokens", "width", "vocabulary", "top-k", "teacher-width", "windows", "device", "threads", "precision")


def parser(doc: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--width", type=int, default=576, help="of the student's states")
    p.add_argument("--vocabulary", type=int, default=49152)
    p.add_argument("--top-k", type=int, default=256)
    p.add_argument("--teacher-width", type=int, default=16)
    p.add_argument("--windows", type=int, default=8, help="GOLD only: so many texts; fewer take longer")
    p.add_argument("--device", default="cpu")
    p.add_argument("--precision", choices=PRECISIONS, default="no", help="of autocast, and of the bare products")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    p.add_argument("--repeats", type=int, default=5, help="measured rounds, after one that is not")
    p.add_argument("--limit", type=float, default=40, help="a variant that took so many seconds runs no more")
    p.add_argument("--no-error", dest="error", action="store_false", help="without the float64 references")
    p.add_argument("--json", type=Path, default=Path("peers.json"))
    p.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return p


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:

        def prepare() -> tuple[Work, Callable[[], None]]:
            work = Work(VARIANTS[args.worker], Problem(args), args.folder)
            return work, work.clear

        return serve(prepare, torch.device(args.device))
    where = machine(torch.device(args.device), args.threads)
    found = compare(args)
    shape = f"N = {args.tokens:,} tokens, width {args.width}, V = {args.vocabulary:,}, top {args.top_k}"
    shape += f", precision {args.precision}"
    print(f"{describe(where)}\n{shape}\n\n{report(found)}")
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "worker", "folder")}
    write(args.json, {"machine": where, "settings": settings, "variants": found})


if __name__ == "__main__":
    main()
