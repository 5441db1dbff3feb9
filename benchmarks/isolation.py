"""Documents that share a window, packed and isolated: time and memory of a step, bits per byte of teacher and student.

    python -m benchmarks.isolation

A small Llama learns from a GPT-Neo of 3 million parameters on beginnings of TinyStories; the windows hold the same
documents in both ways. Steps are interleaved, in CPU seconds. Both students of a seed see the same windows in the same
order; all are scored in both ways. About 2 minutes of one core.
"""

import argparse
import copy
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import alternate, describe, machine, summary, table, write
from benchmarks.quality import DATA, stories, window_order
from models.distillation import Distillation

STUDENT = "models/stories260k-llama"
TEACHER = "models/tinystories-neo-chat-3m"
WAYS = {"packed": False, "isolated": True}
"""Title of a row -> `isolate_documents`."""
LEARNING_RATE = 5e-4
"""At the first step; it falls to 0."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="of each student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--unseen", type=int, default=150, help="stories to score on")
    parser.add_argument("--sentences", type=int, default=3, help="of each story, its first; 0: all")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("isolation.json"))
    return parser.parse_args()


@torch.no_grad()
def bits_per_byte(model: nn.Module, pair: Distillation, windows: Sequence[dict], side: str) -> float:
    """Measure a model on windows, as the student or the teacher of a pair."""
    nats = 0.0
    num_bytes = 0
    model.eval()
    for window in windows:
        batch = pair.collate([window])
        inputs, labels = batch.scored(side)
        logits = model(**inputs, use_cache=False).logits.float()
        nats += nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        num_bytes += int(batch.bytes.sum())
    return nats / num_bytes / math.log(2)


def beginning(text: str, sentences: int) -> str:
    """Return the first sentences of a text; 0: all."""
    parts = re.split(r"(?<=[.!?])\s+", text)
    return " ".join(parts[:sentences]) if sentences else text


def step_of(pair: Distillation, student: nn.Module, windows: Sequence[dict]) -> Callable[[], object]:
    """Return forward and backward of a batch, teacher included."""
    framework = pair.framework(10, student=copy.deepcopy(student))
    batch = pair.collate(windows)

    def step() -> None:
        framework.zero_grad()
        framework(batch, 0).loss.backward()

    return step


def trained(pair: Distillation, student: nn.Module, windows: Sequence[dict], args: argparse.Namespace, seed: int):
    """Return a copy of the student that has learned for some steps."""
    student = copy.deepcopy(student).train()
    framework = pair.framework(args.steps, student=student)
    optimizer = torch.optim.AdamW(framework.parameters(), lr=LEARNING_RATE)
    order = window_order(len(windows), args.batch_size, seed)
    for step, chosen in zip(range(args.steps), order, strict=False):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / args.steps)
        optimizer.zero_grad()
        framework(pair.collate([windows[i] for i in chosen]), step).loss.backward()
        optimizer.step()
    return student


def _differences(bits: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return, for each way of scoring, what isolation adds to the student's bits per byte: mean, least and most."""
    cells = []
    for scored in WAYS:
        packed, isolated = (bits[f"student, learned {way}"][scored] for way in WAYS)
        pairs = [other - one for one, other in zip(packed, isolated, strict=True)]
        cells.append(f"{mean(pairs):+.5f} ({min(pairs):+.5f} to {max(pairs):+.5f})")
    return cells


def main() -> None:
    """Time both ways, train a student in each, print the tables and write all figures."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    facts = machine(device, args.threads)

    names = {"student": DATA / STUDENT, "teacher": DATA / TEACHER}
    tokenizers = {role: AutoTokenizer.from_pretrained(name) for role, name in names.items()}
    student, teacher = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in names.values())
    train, unseen = ([beginning(text, args.sentences) for text in texts] for texts in stories(share=1 / 4))

    pairs = {}
    windows = {}
    held_out = {}
    for way, isolates in WAYS.items():
        pair = Distillation.from_models(student, teacher, tokenizers, args.max_length, isolate_documents=isolates)
        pairs[way] = pair
        windows[way] = pair.windows(train)
        held_out[way] = pair.windows(unseen[: args.unseen])

    # 1. Time and memory of the same step.
    full = [way_windows[-args.batch_size :] for way_windows in windows.values()]
    works = {way: step_of(pairs[way], student, batch) for way, batch in zip(WAYS, full, strict=True)}
    costs = {way: summary(runs) for way, runs in alternate(works, device, args.repeats).items()}

    # 2. Bits per byte: rows are ways to learn, columns ways to be scored.
    bits: dict[str, dict[str, list[float]]] = {"teacher": {}, "student before": {}}
    for scored in WAYS:
        bits["teacher"][scored] = [bits_per_byte(teacher, pairs[scored], held_out[scored], "teacher")]
        bits["student before"][scored] = [bits_per_byte(student, pairs[scored], held_out[scored], "student")]
    for way in WAYS:
        row: dict[str, list[float]] = {scored: [] for scored in WAYS}
        for seed in range(args.seeds):
            model = trained(pairs[way], student, windows[way], args, seed)
            for scored in WAYS:
                row[scored].append(bits_per_byte(model, pairs[scored], held_out[scored], "student"))
        bits[f"student, learned {way}"] = row

    print(describe(facts))
    _print_costs(costs, windows)
    _print_bits(bits)
    write(args.json, {"machine": facts, "costs": costs, "bits": bits})


def _print_costs(costs: dict[str, dict], windows: dict[str, list[dict]]) -> None:
    """Print time and memory of a step."""
    costs_rows = []
    for way, cost in costs.items():
        documents = sum(window["documents"].count(",") + 1 for window in windows[way]) / len(windows[way])
        seconds = f"{1000 * cost['seconds']:.0f} ({1000 * cost['least']:.0f} to {1000 * cost['most']:.0f})"
        costs_rows.append([way, len(windows[way]), f"{documents:.2f}", seconds, f"{cost['peak'] / 2**20:.0f}"])
    print(table(["documents", "windows", "documents a window", "ms a step", "peak MiB"], costs_rows))


def _print_bits(bits: dict[str, dict[str, list[float]]]) -> None:
    """Print bits per byte, and what isolation adds to them."""
    bits_rows = []
    for name, row in bits.items():
        bits_rows.append([name, *(f"{median(values):.4f}" for values in row.values())])
    print()
    print(table(["bits per byte", *(f"scored {way}" for way in WAYS)], bits_rows))
    print()
    print(table(["learned isolated less packed, by seed", *WAYS], [["bits per byte", *_differences(bits)]]))


if __name__ == "__main__":
    main()
