"""Captures of the tests' own: an encoder of DistillKit's format, written after its description, independent of ours.

Its curve is fitted in one of three ways: in float64, the best there is; in float32 as DistillKit does it, by torch,
whose result depends on the machine's library; or with the error that such a fit in float32 is allowed to make, which
is the same everywhere.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml

RECOMMENDED = {
    **{"k": 128, "exact_k": 16, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    **{"term_dtype": "float32", "residual_bins": [], "delta_encoding": False, "error_diffusion": False},
}
BUDGET = {**RECOMMENDED, "k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]}
QWEN = {
    **{**RECOMMENDED, "exact_k": 32, "exact_dtype": "float32", "polynomial_terms": [0, 1, 2]},
    "delta_encoding": True,
}
DEEPSEEK = {"k": 128, "exact_k": 32, "polynomial_degree": 8, "with_sqrt_term": False, "term_dtype": "float32"}
EXACT = {**RECOMMENDED, "k": 16, "exact_k": 16, "exact_dtype": "float32", "polynomial_terms": []}
PUBLISHED = {"recommended": RECOMMENDED, "budget": BUDGET, "Qwen3-235B": QWEN, "DeepSeek-V3": DEEPSEEK}


def sized(settings: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Settings for a vocabulary, under the name that their generation has for it."""
    return {"vocab_size" if "polynomial_degree" in settings else "d": vocabulary, **settings}


Fit = Literal["float64", "float32", "rounded"]


def fitted(design: np.ndarray, values: np.ndarray, fit: Fit) -> np.ndarray:
    """Least-squares coefficients [N, C] by singular values, of which those below 1e-5 are left out."""
    if fit == "rounded":
        # A backward stable algorithm solves for a matrix that is off by the rounding of its norm.
        error = np.random.default_rng(1).standard_normal(design.shape)
        design = design + np.finfo(np.float32).eps * np.linalg.norm(design, 2) * error / np.linalg.norm(error, 2)

    kind = torch.float32 if fit == "float32" else torch.float64
    u, s, vh = torch.linalg.svd(torch.from_numpy(design).to(kind), full_matrices=False)
    inverse = torch.where(s > 1e-5, 1 / s, 0)
    projected = torch.from_numpy(np.ascontiguousarray(values)).to(kind) @ u
    return ((projected * inverse) @ vh).float().numpy()


def as_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers [N, count] as bytes [N, width]; bfloat16 is rounded to the nearest."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
    if tensor.shape[1] == 0:
        return np.zeros((len(values), 0), np.uint8)
    return tensor.contiguous().view(torch.uint8).numpy()


def bits_of(values: np.ndarray, count: int) -> np.ndarray:
    """Whole numbers [N, k] as a string of bits, highest first, in bytes."""
    digits = [[int(digit) for value in row for digit in format(int(value), f"0{count}b")] for row in values]
    return np.packbits(np.array(digits, dtype=np.uint8), axis=1)


def encode(log_probs: np.ndarray, settings: dict[str, Any], fit: Fit = "float64") -> dict[str, np.ndarray]:
    """Columns of some positions [N, V], without bins of residuals."""
    k, exact = settings["k"], settings["exact_k"]
    ids = np.argsort(-log_probs, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(log_probs, ids, 1)

    if "vocab_size" in settings:
        ranks = np.arange(1, k - exact + 1, dtype=np.float64)
        design = np.stack([ranks**-power for power in range(settings["polynomial_degree"] + 1)], axis=1)
        bits = (settings["vocab_size"] - 1).bit_length()
        words = []
        for row in ids:
            of_row = []
            for begin in range(0, k, 64 // bits):
                part = row[begin : begin + 64 // bits]
                of_row.append(sum(int(token) << (bits * place) for place, token in enumerate(part)))
            words.append(of_row)
        return {
            "packed_indices": np.array(words, dtype=np.uint64),
            "exact_values": values[:, :exact].astype(np.float16).astype(np.float32),
            "coeffs": fitted(design, values[:, exact:], fit),
        }

    if settings["delta_encoding"]:
        values = np.diff(values, axis=1, prepend=0)
    count = k - exact
    ranks = np.linspace(0, 1, count) if settings.get("normalize_t") else np.arange(count, dtype=np.float64)
    terms = settings["polynomial_terms"]
    chunks = [as_bytes(values[:, :exact], settings["exact_dtype"])]
    if terms:
        design = np.stack([np.sqrt(ranks) if term == "sqrt" else ranks**term for term in terms], axis=1)
        chunks.append(as_bytes(fitted(design, values[:, exact:], fit), settings["term_dtype"]))
    return {
        "compressed_logprobs": np.concatenate(chunks, axis=1),
        "bytepacked_indices": bits_of(ids, (settings["d"] - 1).bit_length()),
    }


def captured_ids(tokenizer, text: str, has_start: bool) -> list[int]:
    """Tokens that DistillKit would capture: those of the text, and one that ends it."""
    start = [tokenizer.bos_token_id] if has_start else []
    return [*start, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


@torch.no_grad()
def write_captures(
    folder: Path,
    model,
    tokenizer,
    texts: list[str],
    settings: dict[str, Any] = EXACT,
    *,
    fit: Fit = "float64",
    documents_in_row: int = 1,
    has_start: bool = False,
) -> Path:
    """Write a model's captures of some texts, as DistillKit samples them, or packs them where a row has several.

    Args:
        has_start: the tokenizer puts a start of text before each.
    """
    folder.mkdir(parents=True)
    settings = sized(settings, len(tokenizer))
    rows = []
    for begin in range(0, len(texts), documents_in_row):
        row: dict[str, Any] = {"input_ids": [], "attention_mask": []}
        for number, text in enumerate(texts[begin : begin + documents_in_row], start=1):
            ids = captured_ids(tokenizer, text, has_start)
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            columns = encode(logits.double().log_softmax(-1).numpy(), settings, fit)
            # A packed row has as many tokens as lists: the last token of each text is gone.
            kept = ids if documents_in_row == 1 else ids[:-1]
            row["input_ids"] += kept
            row["attention_mask"] += [number] * len(kept)
            for name, values in columns.items():
                row[name] = [*row.get(name, []), *values.tolist()]
        if documents_in_row == 1:
            del row["attention_mask"]
        rows.append(row)

    half = max(1, len(rows) // 2)
    for number, part in enumerate([rows[:half], rows[half:]]):
        if part:
            pyarrow.parquet.write_table(_table(part), folder / f"data_{number}.parquet")
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings))), "utf-8")
    return folder


def _table(rows: list[dict[str, Any]]) -> pyarrow.Table:
    kinds = {
        "input_ids": pyarrow.list_(pyarrow.uint64()),
        "attention_mask": pyarrow.list_(pyarrow.int64()),
        "packed_indices": pyarrow.list_(pyarrow.list_(pyarrow.uint64())),
        "exact_values": pyarrow.list_(pyarrow.list_(pyarrow.float32())),
        "coeffs": pyarrow.list_(pyarrow.list_(pyarrow.float32())),
        "compressed_logprobs": pyarrow.list_(pyarrow.list_(pyarrow.uint8())),
        "bytepacked_indices": pyarrow.list_(pyarrow.list_(pyarrow.uint8())),
    }
    return pyarrow.table({name: pyarrow.array([row[name] for row in rows], kinds[name]) for name in rows[0]})
