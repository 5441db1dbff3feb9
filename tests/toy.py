"""A small module with the step protocol, its data, and one call to train it: what tests of the loop share."""

import hashlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.config.build import build
from utils.config.settings import TrainingConfig
from utils.logs.step_logger import StepLogger
from utils.machine.stop_signals import StopSignal
from utils.parallel.accelerator import build_accelerator
from utils.training.loop import fit
from utils.training.options import LoopOptions

VOCABULARY, WIDTH, LENGTH = 12, 8, 6


class ToyModule(nn.Module):
    """Tied embedding and head, dropout, a norm; two terms, of which `kd` rises and `span` weighs nothing."""

    couples_windows = False

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.dropout = nn.Dropout(dropout)
        self.to(dtype)

    def forward(
        self, batch: "ToyBatch", step: int, *, counts: dict[str, int], measure: bool = False, term_graphs: bool = False
    ):
        logits = self.head(self.norm(self.dropout(torch.tanh(self.hidden(self.embed(batch.ids))))))
        labels = batch.labels.flatten()
        lm = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum")
        kd = (torch.log_softmax(logits, -1)[..., 0] ** 2)[batch.labels != -100].sum()
        weights = {"lm": 1.0, "kd": 0.05 * step, "span": 0.0}
        terms = {"lm": _term(lm, batch.counts["lm"]), "kd": _term(kd, batch.counts["kd"])}
        loss = sum(weights[name] * term.sum / max(counts[name], 1) for name, term in terms.items())
        if measure:  # draws random numbers that an unlogged step does not draw
            terms["span"] = _term(torch.rand(()).detach(), batch.counts["kd"])
        return SimpleNamespace(loss=loss, terms=terms, weights=weights, scalars={"temperature": 2.0, "top_k": 4})


def _term(value: Tensor, count: int) -> SimpleNamespace:
    return SimpleNamespace(sum=value, count=count)


@dataclass
class ToyBatch:
    ids: Tensor
    labels: Tensor
    counts: dict[str, int]
    documents: list[str] = field(default_factory=list)

    def to(self, device, non_blocking: bool = False) -> "ToyBatch":
        return ToyBatch(self.ids.to(device), self.labels.to(device), self.counts, self.documents)


def toy_windows(count: int = 11) -> list[dict]:
    """Windows with different numbers of supervised positions, so that a mean of means is wrong."""
    random = np.random.default_rng(7)
    windows = []
    for index in range(count):
        ids = random.integers(0, VOCABULARY, LENGTH + 1)
        labels = ids[1:].copy()
        labels[: index % LENGTH] = -100
        windows.append({"ids": ids[:-1], "labels": labels, "documents": f"d{index}"})
    return windows


def toy_collate(windows: list[dict]) -> ToyBatch:
    labels = torch.from_numpy(np.stack([window["labels"] for window in windows]))
    supervised = int((labels != -100).sum())
    return ToyBatch(
        ids=torch.from_numpy(np.stack([window["ids"] for window in windows])),
        labels=labels,
        counts={"lm": supervised, "kd": supervised, "span": 0, "depth0": supervised // 2},
        documents=[window["documents"] for window in windows],
    )


def toy_config(**values) -> TrainingConfig:
    defaults = {
        "batch_size": 1,
        "gradient_accumulation_steps": 4,
        "epochs": 2,
        "learning_rate": 0.05,
        "save_every": 1000,
    }
    return build(TrainingConfig, defaults | values, source="test")


def train(module: nn.Module, config: TrainingConfig, folder=None, *, windows=None, total: int = 0, every=1, **options):
    """`fit` on the CPU, logging every step by default; `total` only matters for what the logger calls the last step."""
    logger = StepLogger(folder, total or 10**6, every, main_process=folder is not None)
    try:
        return fit(
            module,
            toy_windows() if windows is None else windows,
            toy_collate,
            config,
            accelerator=build_accelerator("no", cpu=True),
            options=LoopOptions(logger=logger, **options),
        )
    finally:
        logger.close()


class StopAfter(StopSignal):
    """Asks for a stop at a step boundary, as a signal would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def requested(self) -> str | None:
        self.left -= 1
        return "SIGTERM" if self.left < 0 else None


def digest(module: nn.Module) -> str:
    """Hash of all weights, bit for bit."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
