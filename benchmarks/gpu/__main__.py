"""Everything that a GPU has to say about this project, in ten minutes. docs/gpu.md says what each figure means.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --budget 1200 --data DIR
    python -m benchmarks.gpu --parts where step_bf16 head_bf16
    python -m benchmarks.gpu --toy --device cpu

Parts come in order of worth, each in a process of its own with a time limit; what no longer fits the budget is left
out and named. Needs no network: models and texts are made here, or come from DIR with tokenizers/ (qwen2.5, smollm),
models/ and corpora/. Results are written after every row, so that a command that is killed has said what it knew.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.gpu.parts import BY_NAME, Part
from benchmarks.gpu.report import MARKDOWN_NAME, write_results
from benchmarks.gpu.settings import ROOT, Bench, Skipped, choose_scale
from benchmarks.measure import machine

BUDGET = 560
"""Seconds in all, unless the user gives another number; the limits of the parts are made for it."""
LEAST = 15
"""Seconds that no part can do without: Python, torch and the device have to start."""
ROW = "row: "
"""Beginning of the lines of a part's output that are its rows."""
SKIPPED_STATUS = 75
"""Exit status of a part that cannot be measured here; the last line of its log says why."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--budget", type=float, default=BUDGET, help="seconds in all")
    add("--parts", nargs="+", choices=BY_NAME, default=list(BY_NAME), metavar="PART", help="only these")
    add("--data", type=Path, help="folder with tokenizers/, models/ and corpora/, each of which may lack")
    add("--pair", nargs=2, metavar=("TEACHER", "STUDENT"), help="names below DATA/models")
    add("--device", choices=["cuda", "cpu"], help="default: a GPU, if there is one")
    add("--toy", action="store_true", help="sizes that only show that everything runs")
    add("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")

    # For the process of a part.
    add("--run-part", choices=BY_NAME, help=argparse.SUPPRESS)
    add("--work", type=Path, help=argparse.SUPPRESS)
    add("--seconds", type=float, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Run the command and return its exit status: 0 if no part broke."""
    args = parser().parse_args()
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"

    if args.run_part:
        return run_part(args)
    return run_all(args)


# ------------------------------------------------------------------------------------------------- all parts


def run_all(args: argparse.Namespace) -> int:
    """Run the parts in order of worth, as far as the budget goes, and write what they say."""
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    results = _empty_results(args)

    def save() -> None:
        results["seconds"] = time.monotonic() - began
        write_results(args.out, results)

    # The process that is running is ended on the way out.
    def exit_at_signal(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, exit_at_signal)

    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as work:
        for part in [BY_NAME[name] for name in BY_NAME if name in args.parts]:
            seconds_left = args.budget - (time.monotonic() - began)

            # Written before it runs: a command that is killed has said in which part.
            record = {"title": part.title, "state": "interrupted", "why": "", "seconds": 0.0, "rows": []}
            results["parts"][part.name] = record
            save()

            if reason := _reason_to_skip(part, args, seconds_left):
                record.update(state="skipped", why=reason)
            else:
                # A larger budget stretches the limits of all parts.
                limit = min(seconds_left, part.limit * max(1.0, args.budget / BUDGET))
                print(f"{part.name}: {part.title} (at most {limit:.0f} s)", flush=True)
                _run_in_a_process(part, args, work=Path(work), limit=limit, record=record, save=save)
            save()
            _print(part, record)

    print(f"\n{results['seconds']:.0f} s in all; to paste: {args.out / MARKDOWN_NAME}")
    states = [record["state"] for record in results["parts"].values()]
    return 1 if "failed" in states else 0


def _empty_results(args: argparse.Namespace) -> dict:
    """Return the results before any part has run."""
    device = torch.device(args.device)
    scale = choose_scale(device, args.toy)
    return {
        "machine": machine(device, torch.get_num_threads()),
        "settings": {"budget": args.budget, "device": args.device, "data": args.data is not None},
        "scale": scale.name,
        "toy": scale.is_toy,
        "seconds": 0.0,
        "parts": {},
    }


def _reason_to_skip(part: Part, args: argparse.Namespace, seconds_left: float) -> str:
    """Return the reason why a part is not begun; empty where it is."""
    if obstacle := part.obstacle(args.device):
        return obstacle

    # About half of the limit is expected on a fast card.
    needed = LEAST if args.toy else max(LEAST, part.limit / 2)
    if seconds_left < needed:
        return f"{max(0.0, seconds_left):.0f} s were left of --budget {args.budget:.0f}, it needs about {needed:.0f}"
    return ""


def _run_in_a_process(
    part: Part,
    args: argparse.Namespace,
    *,
    work: Path,
    limit: float,
    record: dict,
    save: Callable[[], None],
) -> None:
    """Start a part, take its rows as they come, and end it when its time is over.

    Args:
        work: folder for models and runs.
        limit: seconds.
        record: the part's place in the results, which is filled in.
        save: writes the results.
    """
    began = time.monotonic()
    log = args.out / f"{part.name}.log"
    command = _command(part, args, work, limit)

    with log.open("w", encoding="utf-8") as errors, _started(command, errors) as process:
        is_over = threading.Event()

        def stop() -> None:
            is_over.set()
            _end(process)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith(ROW):
                    record["rows"].append(json.loads(line.removeprefix(ROW)))
                    record["seconds"] = time.monotonic() - began
                    save()
            status = process.wait()
        finally:
            timer.cancel()

    # The last line of the log is the reason for a skip, or the message of an exception.
    record["seconds"] = time.monotonic() - began
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last_line = lines[-1] if lines else ""
    if is_over.is_set():
        record.update(state="stopped", why=f"after {limit:.0f} s, its time limit")
    elif status == SKIPPED_STATUS:
        record.update(state="skipped", why=last_line)
    elif status:
        record.update(state="failed", why=f"status {status}: {last_line[:300]}; {log.name} has more")
    else:
        record.update(state="done")


def _command(part: Part, args: argparse.Namespace, work: Path, limit: float) -> list[str]:
    """Return the command that runs one part."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--run-part", part.name, "--device", args.device]
    command += ["--work", str(work), "--seconds", f"{limit:.0f}"]
    if args.toy:
        command.append("--toy")
    if args.data is not None:
        command += ["--data", str(args.data.resolve())]
    if args.pair is not None:
        command += ["--pair", *args.pair]
    return command


@contextmanager
def _started(command: list[str], errors: TextIO) -> Iterator[subprocess.Popen]:
    """Start a process in a group of its own; end it with all that it started, whatever happens meanwhile."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
        "CURRICULUM_DISTILLATION_CACHE": command[command.index("--work") + 1],
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    )

    # However the caller ends, by a signal too, nothing of the part stays on the card.
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """End a process and its group: its children have memory of the card, too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _print(part: Part, record: dict) -> None:
    """Print the state and the rows of a part."""
    reason = f" ({record['why']})" if record["why"] else ""
    print(f"{part.name}: {record['state']}{reason}, {record['seconds']:.0f} s", flush=True)
    for row in record["rows"]:
        cells = [f"{name} {_format(value)}" for name, value in row.items()]
        print("    " + ", ".join(cells), flush=True)


def _format(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -------------------------------------------------------------------------------------- one part, in its process


def run_part(args: argparse.Namespace) -> int:
    """Measure one part; rows go to the standard output, everything that libraries print there to the log."""
    rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    part = BY_NAME[args.run_part]
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    bench = Bench(
        device=device,
        scale=choose_scale(device, args.toy),
        work=args.work,
        data=args.data,
        pair=tuple(args.pair) if args.pair else None,
        seconds=args.seconds,
    )

    # Only the part's own module is imported: another one may need a package that is missing.
    module = importlib.import_module(f"benchmarks.gpu.{part.module}")
    measure = getattr(module, part.function)
    try:
        for row in measure(bench, **part.options):
            print(ROW + json.dumps(row, default=str), file=rows, flush=True)
    except Skipped as reason:
        print(reason, file=sys.stderr)
        return SKIPPED_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
