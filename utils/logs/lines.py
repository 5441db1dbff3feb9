"""Lines of the log about a step, an evaluation and a sample: one row each, with a tag in front to filter by."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from ..errors import shorten
from .terminal import printable

ROUTER_TERMS = ("feat", "rel", "attn", "layer", "contr")
"""Terms on hidden states, in the order in which they are shown."""

FIRST_LEFT_OUT = ("memory", "norm", "lr", "speed")
"""Parts of a step's line that a narrow console lacks, in this order, and then terms; metrics.jsonl has them all."""

SHOWN_PROMPT = 24
"""Characters of a prompt's end that are shown on the console."""


def in_percent(share: float) -> str:
    """Return a share in percent, with the digits that it needs: one of 0.0001 is 0.01 %, not 0 %."""
    return f"{100 * share:.6g} %"


def learned_lines(
    ids: Sequence[int], learned: Sequence[bool], decode: Callable[[list[int]], str], most: int = 10, width: int = 160
) -> list[str]:
    """Return lines that show which tokens of a window are learned and which are only read.

    Args:
        ids: tokens of the window.
        learned: by token.
        decode: tokens -> text.
        most: runs of tokens that are shown, after a head line.
        width: characters of a run's text; the middle of a longer one is left out.
    """
    flags = [bool(flag) for flag in learned]
    lines = [f"what is learned from: {sum(flags)} of {len(ids)} tokens of the student's first window"]

    runs = []
    for is_learned, pairs in groupby(zip(flags, ids, strict=True), key=itemgetter(0)):
        runs.append((is_learned, [token for _, token in pairs]))

    for is_learned, tokens in runs[:most]:
        # Line ends and the like as escapes, without the quotes around them.
        text = repr(decode(tokens))[1:-1]
        if len(text) > width:
            text = f"{text[: width // 2]} ... {text[-width // 2 :]}"
        tag = "[learned]" if is_learned else "[read]   "
        lines.append(f"{tag} {text}")

    if len(runs) > most:
        lines.append(f"and {len(runs) - most} more such parts")
    return lines


def training_line(
    record: Mapping[str, Any], total_steps: int, seconds_left: float | None = None, columns: int | None = None
) -> str:
    """Return the [TOTAL] line of a logged step: loss, the terms that are on, rate, norm, speed, memory, time left.

    Args:
        record: of metrics.jsonl.
        total_steps: of the run.
        seconds_left: of the whole command; None: unknown.
        columns: of the line, at most; what matters least is left out where there are fewer. None: no limit.
    """
    parts = {
        "step": f"[TOTAL] step {record['step']}/{total_steps}",
        "loss": f"loss {compact_number(record['loss'])}",
    }
    for name, term in record["terms"].items():
        if term["weight"] or term["weighted"]:
            parts[name] = f"{name} {compact_number(term['raw'])}"

    parts["lr"] = f"lr {record['lr']:.1e}"
    if record.get("grad_norm") is not None:
        parts["norm"] = f"norm {compact_number(record['grad_norm'])}"
    if record.get("tokens_per_second") is not None:
        parts["speed"] = f"{thousands(record['tokens_per_second'])} tok/s"
    if record.get("peak_memory_mb") is not None:
        parts["memory"] = memory(record["peak_memory_mb"])
    if seconds_left:
        parts["left"] = f"{clock_time(seconds_left)} left"
    return _fitted(parts, columns)


def _fitted(parts: Mapping[str, str], columns: int | None) -> str:
    """Return the parts in one line of so many columns, without those that matter least where there are fewer."""
    fitting = dict(parts)
    terms = [name for name in parts if name not in ("step", "loss", "left", *FIRST_LEFT_OUT)]
    for name in (*FIRST_LEFT_OUT, *reversed(terms), "left"):
        if columns is None or len(" ".join(fitting.values())) <= columns:
            break
        fitting.pop(name, None)
    return " ".join(fitting.values())


def evaluation_line(record: Mapping[str, Any]) -> str:
    """Return the [Eval] line."""
    return (
        f"[Eval] step {record['step']} bits/byte {record['bits_per_byte']:.4f}"
        f" perplexity {compact_number(record['perplexity'])} loss {compact_number(record['loss'])}"
    )


def own_text_line(record: Mapping[str, Any], columns: int | None = None) -> str:
    """Return the [own text] line: figures of the texts that the student wrote to learn from them.

    Args:
        columns: of the line, at most; what matters least is left out where there are fewer. None: no limit.
    """
    parts = {
        "texts": f"[own text] step {record['step']} {record['texts']} texts",
        "ended": f"{record['ended']:.0%} end",
        "given": f"given {record['given_ended']:.0%}",
        "tokens": f"{record['tokens']:.0f} tokens",
        "longest": f"95 % below {record['tokens_95']:.0f}",
    }
    for name in ("empty", "broken"):
        if record.get(name):
            parts[name] = f"{record[name]:.0%} {name}"
    if record["repeated_4grams"] is not None:
        parts["repeated"] = f"repeated 4-grams {record['repeated_4grams']:.1%}"
    if record["teacher_bits_per_byte"] is not None:
        parts["teacher"] = f"teacher {record['teacher_bits_per_byte']:.3f} bits/byte"
    if record["kl_nats_per_token"] is not None:
        parts["kl"] = f"KL {compact_number(record['kl_nats_per_token'])}"
    if record["seconds"] is not None:
        parts["seconds"] = f"written in {record['seconds']:.1f} s"

    for name in ("seconds", "longest", "repeated", "given", "kl"):
        if columns is None or len(", ".join(parts.values())) <= columns:
            break
        parts.pop(name, None)
    return ", ".join(parts.values())


def sample_line(sample: Mapping[str, str], columns: int | None = None) -> str:
    """Return the [sample] line: the end of a prompt, and the text with which the student goes on.

    Args:
        columns: of the line, at most; None: prompt and text are whole.
    """
    # escapes are longer than what they stand for, and count towards the columns
    prompt = printable(" ".join(sample["prompt"].split()))
    text = printable(" ".join(sample["text"].split()))
    if columns is None:
        return f"[sample] {prompt} | {text}"

    if len(prompt) > SHOWN_PROMPT:
        prompt = f"...{prompt[3 - SHOWN_PROMPT :]}"
    return shorten(f"[sample] {prompt} | {text}", columns)


def compact_number(value: float | int | None) -> str:
    """Return a number in about five characters; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    if abs(value) >= 1e4:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:.1f}"
    return f"{value:#.4g}" if abs(value) >= 1 else f"{value:.3f}"


def thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def memory(megabytes: float) -> str:
    """Return an amount of memory, as `13.2 GB` or `758 MB`."""
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"


def clock_time(seconds: float) -> str:
    """Return seconds as `3:34:59` or `14:39`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"
