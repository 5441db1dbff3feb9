"""Memory, tokens per second and time to the first step of `train.py` on a large text, as a stream and as a whole.

    python -m benchmarks.streaming                                   2 GB of text; as a whole it takes an hour or two
    python -m benchmarks.streaming --only stream                     some minutes on one core
    python -m benchmarks.streaming --megabytes 100 --steps 100

The text is put together from stories, no document of it twice, and written to a temporary folder. Every run is the
real program on a tiny pair with different tokenizers of a few thousand tokens, in a process of its own. Peak memory is
that of the largest process, as the system counted it; pages of files that are mapped into memory are part of it.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import describe, machine, table, write
from utils.data.stories import write_stories
from utils.logs.records import read_metrics
from utils.run import quickstart

ROOT = Path(__file__).resolve().parent.parent
STOCK = 1000
"""Stories that documents are put together from."""
STORIES = 6
"""Of a document."""
KINDS = ("stream", "whole")
BATCH = 16
"""Windows of an optimizer step."""
VOCABULARIES = {"student": 1024, "teacher": 4096}
WIDTH = 32
CONTEXT = 512
"""Tokens of a window."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run with and without streaming, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--block-megabytes", type=float, default=4)
    parser.add_argument("--workers", type=int, default=0, help="data.num_workers")
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--json", type=Path, default=Path("streaming.json"))
    args = parser.parse_args(argv)

    facts = machine(torch.device("cpu"), 1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.jsonl")
        documents = write_text(text, args.megabytes * 1_000_000)
        pair = write_pair(Path(folder))
        print(f"{describe(facts)}\n{documents:,} documents, {text.stat().st_size / 1e6:,.0f} MB\n", flush=True)

        for kind in [args.only] if args.only else KINDS:
            words = command(pair, Path(folder, kind), text, kind, args)
            rows.append({"run": kind, **run(words, Path(folder, kind, "metrics.jsonl"))})
            print(rows[-1], flush=True)

    print(f"\n{table(list(rows[0]), [list(row.values()) for row in rows])}")
    write(args.json, {"machine": facts, "megabytes": args.megabytes, "steps": args.steps, "runs": rows})


def write_text(file: Path, size: int) -> int:
    """Write documents of this many bytes in all, or just above; return their number."""
    written = 0
    count = 0
    with file.open("w", encoding="utf-8") as stream:
        for document in texts():
            line = json.dumps({"text": document}) + "\n"
            stream.write(line)
            written += len(line)
            count += 1
            if written >= size:
                break
    return count


def texts() -> Iterator[str]:
    """Yield documents without end, each of them once."""
    stories = write_stories(STOCK)
    rng = random.Random(0)
    number = 0
    while True:
        number += 1
        yield f"Book {number}.\n" + "\n".join(rng.choices(stories, k=STORIES))


def write_pair(folder: Path) -> dict[str, Path]:
    """Write a teacher and a student with random weights and tokenizers of the text; return the folder of each."""
    documents = [document for _, document in zip(range(STOCK), texts(), strict=False)]
    folders = {}
    for role, vocabulary in VOCABULARIES.items():
        folders[role] = folder / role
        tokenizer = quickstart.train_tokenizer(documents, vocabulary)
        tokenizer.save_pretrained(folders[role])

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
        )
        LlamaForCausalLM(config).save_pretrained(folders[role])
    return folders


def command(pair: dict[str, Path], output: Path, text: Path, kind: str, args: argparse.Namespace) -> list[str]:
    """Return `python train.py` on the tiny pair."""
    settings = {
        "teacher.name": pair["teacher"],
        "student.name": pair["student"],
        "data.train": text,
        "data.max_length": CONTEXT,
        "data.num_workers": args.workers,
        "output_dir": output,
    }
    # Every step is logged, and there is little beside the steps.
    settings |= {
        "training.max_steps": args.steps,
        "training.batch_size": BATCH,
        "training.gradient_accumulation_steps": 1,
        "logging.every": 1,
        "evaluation.max_windows": 8,
        "evaluation.samples": 0,
        "evaluation.generation": 0,
    }

    if kind == "stream":
        settings |= {"data.streaming": "true", "data.block_bytes": round(args.block_megabytes * 1e6)}
    return [sys.executable, "train.py", "--set", *(f"{key}={value}" for key, value in settings.items())]


def run(words: Sequence[str], metrics: Path) -> dict[str, float]:
    """Run a command to its end; return what it took."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # Windows that an earlier run has cut would be taken as they are.
    environment["HF_DATASETS_CACHE"] = str(metrics.parents[1] / "cache")
    log = metrics.parents[1] / f"{metrics.parent.name}.log"

    begun = time.monotonic()
    first_step = 0.0
    with log.open("w") as stream:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
        while process.poll() is None and not first_step:
            time.sleep(0.2)
            if metrics.exists() and any("terms" in record for record in read_metrics(metrics)):
                first_step = time.monotonic() - begun
        _, status, usage = os.wait4(process.pid, 0) if process.returncode is None else (0, process.returncode, None)
    if status or usage is None:
        sys.exit(f"{' '.join(words)} ended with {status}:\n{log.read_text()[-2000:]}")

    speeds = [record["tokens_per_second"] for record in read_metrics(metrics) if "terms" in record]
    return {
        "seconds to the first step": round(first_step, 1),
        "seconds in all": round(time.monotonic() - begun, 1),
        "tokens/s": round(sorted(speeds)[len(speeds) // 2]),
        "peak memory MB": round(usage.ru_maxrss / 1000),
    }


if __name__ == "__main__":
    main()
