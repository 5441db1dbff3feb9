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

from benchmarks.measure import MB, describe, machine, table, write
from benchmarks.peers import compare, parser
from models.losses.chunk_size import chunk_rows

PLAIN_COPIES = 8
"""Float32 copies of all logits that the plain version holds, rounded up: to know what will fit."""
TITLES = {"plain": "plain PyTorch", "fused": "fused head"}


def room(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    p.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 49_152, 151_936])
    p.add_argument("--width", type=int, default=576)
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--json", type=Path, default=Path("loss-memory.json"))
    args = p.parse_args()
    device = torch.device(args.device)
    where, rows, results = machine(device, args.threads), [], []
    for vocabulary in args.vocabularies:
        for tokens in args.tokens:
            need = {"plain": 4 * PLAIN_COPIES * tokens * vocabulary, "fused": 0}
            fits = [name for name in TITLES if need[name] < 0.8 * room(device)]
            job = parser("").parse_args(["--no-error", "--variants", *fits])
            vars(job).update(vars(args) | {"tokens": tokens, "vocabulary": vocabulary})
            found = compare(job)
            above = {name: row["above"] for name, row in found.items() if "above" in row}
            results.append({"tokens": tokens, "vocabulary": vocabulary, "bytes": above, "needed": need})
            plain, fused = above.get("plain"), above.get("fused")
            cells = [f"{vocabulary:,}", f"{tokens:,}"]
            cells.append(f"{plain / MB:,.0f}" if plain else f"not run (up to {need['plain'] / 1e9:.0f} GB)")
            cells += [f"{fused / MB:,.0f}" if fused else "not run", f"{fused / plain:.1%}" if plain and fused else ""]
            rows.append([*cells, min(tokens, chunk_rows(vocabulary, device)[0])])
    header = ["V", "N", "plain, MB", "fused, MB", "of plain", "rows at once"]
    print(f"{describe(where)}\nwidth {args.width}, top 256, float32\n\n{table(header, rows)}")
    write(args.json, {"machine": where, "width": args.width, "results": results})


if __name__ == "__main__":
    main()
