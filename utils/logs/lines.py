"""The tagged lines of a logged step."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

ROUTER_TERMS = ("feat", "rel", "attn", "layer", "contr")


def learned_lines(
    ids: Sequence[int], learned: Sequence[bool], decode: Callable[[list[int]], str], most: int = 10, width: int = 160
) -> list[str]:
    """What is learned from, of one window: a head line, and a line for each run of tokens that are learned or only
    read, at most `most` of them, each with the first and last characters of its text."""
    lines = [f"what is learned from: {sum(map(bool, learned))} of {len(ids)} tokens of the student's first window"]
    runs = [
        (key, [i for _, i in run]) for key, run in groupby(zip(map(bool, learned), ids, strict=True), itemgetter(0))
    ]
    for key, run in runs[:most]:
        text = repr(decode(run))[1:-1]
        text = text if len(text) <= width else f"{text[: width // 2]} ... {text[-width // 2 :]}"
        lines.append(f"{'[learned]' if key else '[read]   '} {text}")
    if len(runs) > most:
        lines.append(f"and {len(runs) - most} more such parts")
    return lines


def training_lines(
    record: Mapping[str, Any], total_steps: int, weights: Mapping[str, float] | None = None
) -> list[str]:
    """The tagged lines of a logged step, one string each."""
    terms = record["terms"]
    step = f"step {record['step']}"
    weights = weights if weights is not None else {name: term["weight"] for name, term in terms.items()}
    lines = [
        f"[CURRICULUM] {step}/{total_steps} progress {record['progress']:.1%} epoch {_number(record['epoch'])}"
        + "".join(f" {name} {weight:.3f}" for name, weight in weights.items())
    ]
    if "kd" in terms:
        coverage = record.get("coverage") or {}
        lines.append(
            f"[KD] {step} {_term(terms['kd'])} nats/token {_number(record.get('kd_nats_per_token'))}"
            f" temperature {_number(record.get('temperature'))} top-k {_number(record.get('top_k'))}"
            f" coverage {_share(coverage.get('anchored'))} depth0 {_share(coverage.get('depth0'))}"
        )
    if "span" in terms:
        lines.append(f"[KD] {step} span {_term(terms['span'])}")
    if routed := [f"{name} {_term(terms[name])}" for name in ROUTER_TERMS if name in terms]:
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
    """The [Eval] line."""
    return (
        f"[Eval] step {record['step']} {record.get('split', 'eval')} loss {_number(record['loss'])}"
        f" perplexity {_number(record['perplexity'], 2)} bits/byte {_number(record['bits_per_byte'])}"
        f" tokens {record['tokens']} bytes {record['bytes']}"
    )


def _term(term: Mapping[str, Any]) -> str:
    gradient = f" grad_norm {_number(term['grad_norm'])}" if "grad_norm" in term else ""
    return f"raw {_number(term['raw'])} weight {term['weight']:.3f} weighted {_number(term['weighted'])}{gradient}"


def _number(value: float | int | None, digits: int = 4) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3e}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
