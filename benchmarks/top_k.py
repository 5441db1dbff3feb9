"""The teacher's side of a chunk of logits, operation by operation: finding the largest, and summing the rest.

    python -m benchmarks.top_k
    python -m benchmarks.top_k --device cuda --rows 1024

Random logits [rows, vocabulary] in float32. Medians of interleaved repeats, in CPU seconds (on a GPU, or with several
threads, seconds of the clock).
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import alternate, describe, machine, table, write
from models.teacher.top_k import exact_top_k


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=256)
    p.add_argument("--vocabulary", type=int, default=151_936)
    p.add_argument("--top-k", type=int, default=256)
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeats", type=int, default=9)
    p.add_argument("--json", type=Path, default=Path("top-k.json"))
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    logits = 3 * torch.randn(args.rows, args.vocabulary, generator=torch.Generator().manual_seed(0)).to(device)
    peak, buffer = logits.amax(1, keepdim=True), torch.empty_like(logits)
    works = {
        "torch.topk": lambda: logits.topk(args.top_k),
        "exact_top_k (in use)": lambda: exact_top_k(logits, args.top_k),
        "log_softmax": lambda: logits.log_softmax(1),
        "exponentials and their sum, in memory that is there (in use)": lambda: (
            torch.sub(logits, peak, out=buffer).exp_().sum(1)
        ),
    }
    assert torch.equal(works["torch.topk"]()[0], works["exact_top_k (in use)"]()[0])
    clock = args.threads > 1 or device.type == "cuda"
    runs = alternate(works, device, args.repeats)
    found = {name: [run.wall if clock else run.seconds for run in of_work] for name, of_work in runs.items()}
    where = machine(device, args.threads)
    rows = [[name, f"{1e3 * np.median(t):.1f} ({1e3 * min(t):.1f} to {1e3 * max(t):.1f})"] for name, t in found.items()]
    header = [f"{args.rows} rows of {args.vocabulary:,}, top {args.top_k}", "ms, median (range)"]
    print(f"{describe(where)}\n\n{table(header, rows)}")
    write(args.json, {"machine": where, "settings": {**vars(args), "json": None}, "seconds": found})


if __name__ == "__main__":
    main()
