"""Memory that text takes on its way to windows, as a multiple of its bytes.

    python -m benchmarks.text_memory --megabytes 100
    python -m benchmarks.text_memory --megabytes 1000 --formats jsonl --documents small

Text is generated, read, divided and cut into windows, each format in a process of its own. Memory is RssAnon of
/proc/self/status, sampled, above that of the interpreter with everything imported: it leaves out pages of mapped files,
which the kernel takes back when it needs them. Linux only.

Windows of all the text are cut at bytes, without a tokenizer, which would take hours; `--tokenizer DIR` cuts
`--tokenised` megabytes of it with one, for both sides.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.measure import MB, STATUS, describe, machine, table
from models.text.windows import PairEncoder
from utils.config.settings import DataConfig
from utils.data.documents import load_documents
from utils.data.windows import make_windows

SIZES = {"small": 600, "large": 4_000_000}
"""Bytes of a document, about."""
WORDS = 20_000
"""Different words of the generated text."""
WORDS_AT_ONCE = 1_000_000
WINDOW = 2048
"""Bytes of a window that is cut without a tokenizer."""
SAMPLED_EVERY = 0.01
"""Seconds between two looks at the memory."""


# ------------------------------------------------------------------------------------------ the text


def _words(seed: int) -> Iterator[str]:
    """Yield words without end; some hold a character outside of Latin-1, as most text of the web does."""
    random = np.random.default_rng(seed)
    letters = random.integers(97, 123, (WORDS, 9), dtype=np.uint8)
    lengths = random.integers(2, 10, WORDS)
    vocabulary = [bytes(row[:length]).decode() for row, length in zip(letters, lengths, strict=True)]
    vocabulary[::100] = [f"{word}\u2019s" for word in vocabulary[::100]]

    while True:
        yield from (vocabulary[number] for number in random.integers(0, WORDS, WORDS_AT_ONCE))


def write_text(file: Path, size: int, total: int) -> None:
    """Write documents of about `size` bytes, `total` in all, in the format that the file's suffix says."""
    words = _words(seed=0)
    written = 0
    with file.open("w") as stream:
        while written < total:
            text = " ".join(next(words) for _ in range(size // 6))
            line = json.dumps({"text": text}, ensure_ascii=False) if file.suffix == ".jsonl" else f"{text}\n"
            stream.write(f"{line}\n")
            written += len(text.encode())


def cut_at_bytes(texts: list[str], names: list[str]) -> list[dict[str, Any]]:
    """Return windows as a tokenizer with one token for four bytes would give them."""
    windows = []
    for text, name in zip(texts, names, strict=True):
        content = text.encode()
        for start in range(0, len(content), WINDOW):
            ids = np.frombuffer(content[start : start + WINDOW], dtype=np.uint8)[::4].astype(np.int32)
            windows.append({"student_ids": ids, "teacher_ids": ids, "documents": name})
    return windows


# ------------------------------------------------------------------------------------------ the memory


def anonymous() -> int:
    """Return the bytes of this process that are pages of no file."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


class Peak:
    """Peaks of the memory in phases of a program, above what it took at first."""

    def __init__(self) -> None:
        self.base = anonymous()
        self.phases: dict[str, dict[str, float]] = {}
        self._highest = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self._highest = max(self._highest, anonymous())
            time.sleep(SAMPLED_EVERY)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase: megabytes at its peak and behind it, and its seconds."""
        self._highest = 0
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        after = anonymous()
        peak = max(self._highest, after)
        self.phases[name] = {
            "peak": (peak - self.base) / MB,
            "after": (after - self.base) / MB,
            "seconds": seconds,
        }


def measure(file: Path, tokenizer_folder: str | None, tokenised: float) -> dict[str, Any]:
    """Read a file and cut it into windows in this process; return the phases."""
    encoder = None
    if tokenizer_folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        encoder = PairEncoder(tokenizer, tokenizer, WINDOW // 4)
    # What is imported or allocated at the first use is no memory of the text.
    make_windows(["a text"], cut_at_bytes, "first use")

    peak = Peak()
    with peak.phase("reading and dividing"):
        corpus = load_documents(DataConfig(train=[str(file)]))
    with peak.phase("windows cut at bytes"):
        make_windows(corpus.train, cut_at_bytes, str(time.time()))

    if encoder is not None:
        share = min(1.0, tokenised * MB / corpus.report["train_bytes"])
        part = corpus.train[: max(1, round(share * len(corpus.train)))]
        with peak.phase("windows of a part, tokenised"):
            make_windows(part, encoder.windows, str(time.time()))
    return {"bytes": file.stat().st_size, "documents": len(corpus.train), "phases": peak.phases}


def measure_apart(file: Path, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return what `measure` finds in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.text_memory", "--measure", str(file)]
    if args.tokenizer is not None:
        command += ["--tokenizer", args.tokenizer, "--tokenised", str(args.tokenised)]
    environment = os.environ | {"HF_DATASETS_CACHE": folder}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(name: str, result: dict[str, Any]) -> list[Sequence[object]]:
    """Return a row of the table for each phase."""
    size = result["bytes"] / MB
    rows = []
    for phase, figures in result["phases"].items():
        peak = f"{figures['peak']:,.0f}"
        times = f"{figures['peak'] / size:.2f}"
        rows.append([name, f"{result['documents']:,}", phase, peak, times, f"{figures['seconds']:.0f}"])
    return rows


def main() -> None:
    """Measure every format and size of documents, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100.0, help="of text")
    parser.add_argument("--formats", nargs="+", choices=["txt", "jsonl"], default=["txt", "jsonl"])
    parser.add_argument("--documents", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tokenizer", help="folder of a tokenizer")
    parser.add_argument("--tokenised", type=float, default=4.0, help="megabytes of text")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.tokenizer, args.tokenised)))
        return

    rows: list[Sequence[object]] = []
    for size in args.documents:
        for suffix in args.formats:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / f"text.{suffix}"
                write_text(file, SIZES[size], round(args.megabytes * MB))
                rows += rows_of(f"{size} documents, {suffix}", measure_apart(file, args, folder))
    print(describe(machine(torch.device("cpu"), threads=1)))
    print(table(["text", "documents", "phase", "MB at the peak", "times the text", "seconds"], rows))


if __name__ == "__main__":
    main()
