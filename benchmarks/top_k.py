"""The teacher's side of a chunk of logits, operation by operation: finding the largest, and summing the rest.

    python -m benchmarks.top_k
    python -m benchmarks.top_k --device cuda --rows 1024

Random logits [rows, vocabulary] in float32. Medians of interleaved repeats, in CPU seconds (on a GPU, or with several
threads, seconds of the clock).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import alternate, describe, machine, table, write
from models.teacher.top_k import exact_top_k


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("top-k.json"))
    return parser.parse_args()


def works_on(logits: Tensor, top_k: int) -> dict[str, Callable[[], object]]:
    """Return the operations to time, by their titles in the table.

    Args:
        logits: [rows, vocabulary] float32.
    """
    peak = logits.amax(1, keepdim=True)
    buffer = torch.empty_like(logits)

    def sum_exponentials() -> Tensor:
        # Into memory that is there: the kernel would have to hand out fresh pages for so large a temporary.
        return torch.sub(logits, peak, out=buffer).exp_().sum(1)

    return {
        "torch.topk": lambda: logits.topk(top_k),
        "exact_top_k (in use)": lambda: exact_top_k(logits, top_k),
        "log_softmax": lambda: logits.log_softmax(1),
        "exponentials and their sum, in memory that is there (in use)": sum_exponentials,
    }


def main() -> None:
    """Time the operations, print the table and write the seconds of every run."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    # Drawn on the CPU, so that every device works on the same values.
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(args.rows, args.vocabulary, generator=random).to(device)
    works = works_on(logits, args.top_k)

    # A faster search is worth nothing unless it is exact.
    expected, _ = works["torch.topk"]()
    values, _ = works["exact_top_k (in use)"]()
    assert torch.equal(expected, values)

    # CPU seconds would add up the threads; a GPU has none.
    uses_clock = args.threads > 1 or device.type == "cuda"
    seconds = {}
    for name, runs in alternate(works, device, args.repeats).items():
        seconds[name] = [run.wall if uses_clock else run.seconds for run in runs]

    facts = machine(device, args.threads)
    rows = []
    for name, times in seconds.items():
        median = 1e3 * np.median(times)
        least = 1e3 * min(times)
        most = 1e3 * max(times)
        rows.append([name, f"{median:.1f} ({least:.1f} to {most:.1f})"])

    header = [f"{args.rows} rows of {args.vocabulary:,}, top {args.top_k}", "ms, median (range)"]
    print(f"{describe(facts)}\n\n{table(header, rows)}")
    write(args.json, {"machine": facts, "settings": {**vars(args), "json": None}, "seconds": seconds})


if __name__ == "__main__":
    main()
