"""Memory of the student's head and losses, plain and fused, over tokens N and vocabulary V.

    python -m benchmarks.loss_memory
    python -m benchmarks.loss_memory --tokens 256 1024 --vocabularies 49152

The work is that of `benchmarks.peers`: LM + KD on the top 256 and the bucket, forward and backward, each variant in a
process of its own. Bytes are those at the peak above inputs and gradients. What does not fit into the machine's free
memory is not run, and the table says so.
"""

import argparse
from pathlib import Path

import psutil
import torch

from benchmarks import peers
from benchmarks.measure import MB, describe, machine, table, write
from models.losses.chunk_size import chunk_rows

PLAIN_COPIES = 8
"""Float32 copies of all logits that the plain version holds, rounded up: to know what will fit."""
FREE_SHARE = 0.8
"""Share of the free memory that a variant may need: other programs want some, too."""
TITLES = {"plain": "plain PyTorch", "fused": "fused head"}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 49_152, 151_936])
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("loss-memory.json"))
    return parser.parse_args()


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def needed_memory(tokens: int, vocabulary: int) -> dict[str, int]:
    """Return the bytes that each variant may need; 0: so few that it always fits."""
    bytes_of_logits = 4 * tokens * vocabulary
    return {"plain": PLAIN_COPIES * bytes_of_logits, "fused": 0}


def measure_size(args: argparse.Namespace, tokens: int, vocabulary: int) -> dict[str, int]:
    """Return the bytes at the peak of each variant that fits, above inputs and gradients."""
    need = needed_memory(tokens, vocabulary)
    free = free_memory(torch.device(args.device))
    variants = [name for name in TITLES if need[name] < FREE_SHARE * free]

    # The settings of `peers`, under those of this command line, with one size in place of its lists.
    settings = peers.parser("").parse_args(["--no-error", "--variants", *variants])
    vars(settings).update(vars(args) | {"tokens": tokens, "vocabulary": vocabulary})
    rows = peers.compare(settings)

    # A variant that its process could not run has no figure.
    return {name: row["above"] for name, row in rows.items() if "above" in row}


def row_of(tokens: int, vocabulary: int, peaks: dict[str, int], device: torch.device) -> list[object]:
    """Return a row of the table."""
    plain = peaks.get("plain")
    fused = peaks.get("fused")

    plain_cell = f"{plain / MB:,.0f}" if plain else ""
    if not plain:
        need = needed_memory(tokens, vocabulary)["plain"]
        plain_cell = f"not run (up to {need / 1e9:.0f} GB)"

    return [
        f"{vocabulary:,}",
        f"{tokens:,}",
        plain_cell,
        f"{fused / MB:,.0f}" if fused else "not run",
        f"{fused / plain:.1%}" if plain and fused else "",
        min(tokens, chunk_rows(vocabulary, device)[0]),
    ]


def main() -> None:
    """Measure every size, print the table and write the bytes."""
    args = parse_arguments()
    device = torch.device(args.device)
    facts = machine(device, args.threads)  # first: the load in it is that before the measurement

    rows = []
    results = []
    for vocabulary in args.vocabularies:
        for tokens in args.tokens:
            peaks = measure_size(args, tokens, vocabulary)
            need = needed_memory(tokens, vocabulary)
            results.append({"tokens": tokens, "vocabulary": vocabulary, "bytes": peaks, "needed": need})
            rows.append(row_of(tokens, vocabulary, peaks, device))

    header = ["V", "N", "plain, MB", "fused, MB", "of plain", "rows at once"]
    print(f"{describe(facts)}\nwidth {args.width}, top 256, float32\n\n{table(header, rows)}")
    write(args.json, {"machine": facts, "width": args.width, "results": results})


if __name__ == "__main__":
    main()
