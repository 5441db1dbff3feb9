"""Scenarios on a GPU, pretended or real, in a process of its own; what it found is printed as JSON.

python -m tests.gpu.scenarios NAME '{"argument": ...}'
"""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.gpu import pretended

IS_REAL = os.environ.get("GPU_TESTS") == "1"
MEMORY = ("peak_memory_mb", "reserved_memory_mb")
"""Of the record of a step on a GPU."""
MOST_PLACES = 5
"""So many places where the host waits are named."""


def start() -> Any:
    """The device: real where that is asked for."""
    if not IS_REAL:
        return pretended.install()
    from tests.gpu.real import RealDevice

    return RealDevice()


# --------------------------------------------------------------------------------------------- runs of train.py


def run_training(device: Any, arguments: list[str], log: Path) -> dict[str, Any]:
    """One run of train.py from its command line to its report, every step watched."""
    from accelerate.state import AcceleratorState

    import train
    from utils.machine import kernels
    from utils.training.loop import TrainingLoop

    kernels._launch = lambda *_: None  # starts another Python, which would not pretend
    AcceleratorState._reset_state(reset_partial_state=True)
    advance, steps, update = TrainingLoop.advance, [], {}

    def watched(loop, batches):
        is_logged = loop.logger.due(loop.step + 1)
        with device.watched() as waits:
            advanced = advance(loop, batches)
        steps.append((is_logged, waits))
        update.update({name: loop.engine.optimizer.defaults[name] for name in ("fused", "foreach")})
        return advanced

    TrainingLoop.advance = watched
    held_before = [device.held(index) for index in range(2)]
    for index in range(2):
        device.reset_peak(index)
    try:
        code = train.main(arguments)
    finally:
        TrainingLoop.advance = advance

    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    metrics = log.parent / "metrics.jsonl"
    records = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    logged = [json.loads(record) for record in records]
    # a real card compiles the passes of the student's head in its first step
    watched_steps = steps[1:] if IS_REAL else steps
    unlogged = [waits for is_logged, waits in watched_steps if not is_logged]
    return {
        "code": code,
        "steps": len(steps),
        "update": update,
        "waits": [len(waits) for waits in unlogged],
        "where": Counter(f"{why} at {line}" for waits in unlogged for why, line in waits).most_common(MOST_PLACES),
        "memory": [[record[name] for name in MEMORY] for record in logged if "tokens_per_second" in record],
        "peak": [device.peak(index) - before for index, before in enumerate(held_before)],
        "kernels": dict(device.kernels),
        "errors": [line[:300] for line in lines if " CRITICAL " in line or " ERROR " in line],
        "warnings": [line[:300] for line in lines if " WARNING " in line],
        "teacher": [line[:300] for line in lines if "teacher on " in line],
    }


def leave_out_what_needs_no_gpu() -> None:
    """Draw no curves, and measure the models for the forecast once, not in each run of this process."""
    from utils.forecast import step_memory
    from utils.report import report

    report.draw_curves = lambda path, *_: path.touch()
    report.curves_as_svg = lambda *_: []

    measure_body, measured = step_memory.measure_body, {}

    def measure_once(config, run):
        key = (config.to_json_string(use_diff=False), run)
        if key not in measured:
            measured[key] = measure_body(config, run)
        return measured[key]

    step_memory.measure_body = measure_once


def runs(device: Any, variants: list[dict[str, Any]]) -> dict[str, Any]:
    """`run_training` of each variant: `name`, `card`, `count`, `arguments`, `output`."""
    results = {}
    for variant in variants:
        try:
            device.become(variant["card"], variant["count"])
        except Exception as error:
            results[variant["name"]] = {"skipped": str(error)}
            continue
        results[variant["name"]] = run_training(device, variant["arguments"], Path(variant["output"]) / "train.log")
    return results


def resume(device: Any, card: str, arguments: list[str], output: str) -> dict[str, Any]:
    """A run in one go, then again from its last checkpoint but one: are the weights the same, bit for bit?"""
    folder = Path(output)
    device.become(card)
    whole = run_training(device, arguments, folder / "train.log")
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    weights = (newest / "module.safetensors").read_bytes()

    for path in (newest, folder / "student"):
        shutil.rmtree(path)
    again = run_training(device, arguments, folder / "train.log")
    is_equal = (newest / "module.safetensors").read_bytes() == weights
    return {"whole": whole, "again": again, "is_equal": is_equal}


def out_of_memory(device: Any, card: str, arguments: list[str], output: str, share: float) -> dict[str, Any]:
    """A run that from its fourth step on has but a share of what its third one took beside the models."""
    from utils.training.loop import TrainingLoop

    device.become(card)
    advance, known = TrainingLoop.advance, {}

    def tight(loop, batches):
        if loop.step == 2 and "base" not in known:
            device.reset_peak(0)
            known["base"] = device.held(0)
        if loop.step == 3 and "limit" not in known:
            known["limit"] = device.held(0) + int(share * (known["peak"] - known["base"]))
            device.limit(known["limit"])
        advanced = advance(loop, batches)
        if loop.step == 3 and "peak" not in known:
            known["peak"] = device.peak(0)
        return advanced

    TrainingLoop.advance = tight
    result = run_training(device, arguments, Path(output) / "train.log")
    return {**result, "is_exported": (Path(output) / "student" / "config.json").exists(), "limit": known.get("limit")}


def one_of_two_processes(device: Any, arguments: list[str], output: str) -> dict[str, Any]:
    """One process of a run on two GPUs; RANK and the like say which."""
    import torch

    device.become("T4", 2)
    collectives: dict[str, int] = {}
    if not IS_REAL:
        from tests.gpu.carried_group import CALLS, replace_nccl

        replace_nccl()
        collectives = CALLS
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    result = run_training(device, arguments, Path(output) / "train.log")
    return {**result, "collectives": dict(collectives)}


def forecasts(device: Any, cases: list[tuple[str, str, int, int]]) -> list[dict[str, Any]]:
    """Peaks and forecasts of (card, precision, windows, tokens of each)."""
    from tests.gpu.true_shapes import Case, measure

    results = []
    for card, *case in cases:
        results.append({"case": [card, *case], **measure(device, card, Case(*case))})
    return results


def main() -> None:
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    device = start()

    import torch

    torch.set_num_threads(1)
    leave_out_what_needs_no_gpu()
    result = SCENARIOS[name](device, **arguments)
    print("\n" + json.dumps(result))


SCENARIOS = {
    "runs": runs,
    "resume": resume,
    "out_of_memory": out_of_memory,
    "one_of_two_processes": one_of_two_processes,
    "forecasts": forecasts,
}

if __name__ == "__main__":
    main()
