"""Lines of the log about a step: one a group of terms, with a tag in front by which they can be filtered."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

ROUTER_TERMS = ("feat", "rel", "attn", "layer", "contr")
"""Terms on hidden states, in the order of the [ROUTING] line."""


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


def training_lines(
    record: Mapping[str, Any], total_steps: int, weights: Mapping[str, float] | None = None
) -> list[str]:
    """Return the tagged lines of a logged step: one a group of terms that were measured.

    Args:
        record: of metrics.jsonl.
        total_steps: of the run.
        weights: of all terms; None: of those in the record.
    """
    terms = record["terms"]
    step = f"step {record['step']}"
    if weights is None:
        weights = {name: term["weight"] for name, term in terms.items()}

    lines = [
        f"[CURRICULUM] {step}/{total_steps} progress {record['progress']:.1%} epoch {_number(record['epoch'])}"
        + "".join(f" {name} {weight:.3f}" for name, weight in weights.items())
    ]
    if "kd" in terms:
        lines.append(f"[KD] {step} {_kd(record)}")
    if "span" in terms:
        lines.append(f"[KD] {step} span {_term(terms['span'])}")

    routed = [f"{name} {_term(terms[name])}" for name in ROUTER_TERMS if name in terms]
    if routed:
        lines.append(f"[ROUTING] {step} " + "; ".join(routed))
    if "lm" in terms:
        lines.append(f"[LM] {step} {_term(terms['lm'])} tokens {terms['lm']['count']}")

    lines.append(
        f"[TOTAL] {step} loss {_number(record['loss'])} lr {record['lr']:.2e}"
        f" grad_norm {_number(record.get('grad_norm'))} tokens/s {_number(record.get('tokens_per_second'), 0)}"
        f" memory {_number(record.get('peak_memory_mb'), 0)} MB"
    )
    return lines


def evaluation_line(record: Mapping[str, Any]) -> str:
    """Return the [Eval] line."""
    return (
        f"[Eval] step {record['step']} {record.get('split', 'eval')} loss {_number(record['loss'])}"
        f" perplexity {_number(record['perplexity'], 2)} bits/byte {_number(record['bits_per_byte'])}"
        f" tokens {record['tokens']} bytes {record['bytes']}"
    )


def _kd(record: Mapping[str, Any]) -> str:
    """Return what the [KD] line says after the step."""
    coverage = record.get("coverage") or {}
    return (
        f"{_term(record['terms']['kd'])} nats/token {_number(record.get('kd_nats_per_token'))}"
        f" temperature {_number(record.get('temperature'))} top-k {_number(record.get('top_k'))}"
        f" coverage {_share(coverage.get('anchored'))} depth0 {_share(coverage.get('depth0'))}"
    )


def _term(term: Mapping[str, Any]) -> str:
    gradient = f" grad_norm {_number(term['grad_norm'])}" if "grad_norm" in term else ""
    return f"raw {_number(term['raw'])} weight {term['weight']:.3f} weighted {_number(term['weighted'])}{gradient}"


def _number(value: float | int | None, digits: int = 4) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    # What diverges must not fill the line. NaN is no less than 1e6 either, and is written the same in both ways.
    if abs(value) < 1e6:
        return f"{value:.{digits}f}"
    return f"{value:.3e}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
