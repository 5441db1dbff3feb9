"""DistillKit's compression: read back exactly, and what it loses, in nats, against an encoder of the tests' own."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.captures import BUDGET, DEEPSEEK, EXACT, PUBLISHED, QWEN, RECOMMENDED, Fit, bits_of, encode, sized
from utils.captures.compression import (
    LogprobCodec,
    cleaned,
    noise_of_curve,
    published_loss,
    read_settings,
    trusted_ranks,
)
from utils.errors import UserError

VOCABULARY = 1000


def some_log_probs(positions: int = 40, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Distributions with a steep head and a long tail, as those of a language model."""
    draw = np.random.default_rng(0)
    logits = 4 * draw.standard_normal((positions, vocabulary))
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def read_back(log_probs: np.ndarray, settings: dict, fit: Fit = "float64") -> tuple[np.ndarray, np.ndarray]:
    settings = sized(settings, log_probs.shape[1])
    return read_settings(settings, "manifest").decode(encode(log_probs, settings, fit))


def divergence(log_probs: np.ndarray, ids: np.ndarray, values: np.ndarray) -> float:
    """Mean KL in nats of the exact top k and its rest from what was read of them."""
    exact = np.take_along_axis(log_probs, np.maximum(ids, 0), 1)
    rests = [np.maximum(1 - np.exp(part).sum(1, keepdims=True), 1e-9) for part in (exact, values)]
    p, q = (np.concatenate([np.exp(part), rest], 1) for part, rest in zip((exact, values), rests, strict=True))
    q /= q.sum(1, keepdims=True)
    return float((p * np.log(p / q)).sum(1).mean())


def nats_lost(log_probs: np.ndarray, settings: dict, fit: Fit) -> tuple[float, float]:
    """Loss of what is stored, and of what is read of it."""
    codec = read_settings(sized(settings, log_probs.shape[1]), "manifest")
    ids, values = read_back(log_probs, settings, fit)
    read = cleaned(ids, values, exact=codec.exact, ranks=trusted_ranks(codec, values))
    return divergence(log_probs, ids, values), divergence(log_probs, *read)


@pytest.mark.parametrize("settings", [EXACT, QWEN, DEEPSEEK, BUDGET, {**RECOMMENDED, "normalize_t": True}])
def test_tokens_and_exact_values_come_back(settings):
    log_probs = some_log_probs()
    ids, values = read_back(log_probs, settings)
    order = np.argsort(-log_probs, axis=1, kind="stable")[:, : settings["k"]]
    assert np.array_equal(ids, order)

    # To the rounding of how they are stored.
    exact = settings["exact_k"]
    expected = np.take_along_axis(log_probs, ids, 1)
    tolerance = {"float32": 1e-5, "bfloat16": 0.04}[settings.get("exact_dtype", "bfloat16")]
    assert np.abs(values - expected)[:, :exact].max() < tolerance


def test_residuals_in_bins_are_added_to_the_ranks_behind_the_exact_ones():
    codec = read_settings(
        sized(
            {
                **{"k": 8, "exact_k": 2, "exact_dtype": "float64", "polynomial_terms": []},
                "residual_bins": [
                    {"scale_dtype": "float32", "element_bits": 3, "num_elements": 2},
                    {"scale_dtype": "float16", "element_bits": 1, "num_elements": 3},
                ],
                "delta_encoding": False,
            },
            VOCABULARY,
        ),
        "manifest",
    )
    exact = np.array([-0.5, -2.0]).view(np.uint8)
    first = [np.array([0.25], np.float32).view(np.uint8), bits_of(np.array([[0, 7]]), 3)[0]]
    second = [np.array([2.0], np.float16).view(np.uint8), bits_of(np.array([[1, 0, 1]]), 1)[0]]
    stored = np.concatenate([exact, *first, *second])[None]
    tokens = np.array([[5, 999, 0, 1, 2, 3, 4, 6]])

    assert codec.widths() == (stored.shape[1], 10)
    ids, values = codec.decode({"compressed_logprobs": stored, "bytepacked_indices": bits_of(tokens, 10)})
    # Three bits count from -4 to 3; one says a sign; the last rank has no residual.
    assert np.array_equal(ids, tokens)
    assert values[0].tolist() == [-0.5, -2.0, -1.0, 0.75, 2.0, -2.0, 2.0, 0.0]


def test_the_recommended_settings_may_corrupt_their_curve_and_then_it_is_not_read():
    """Powers of 0 to 111 up to the fourth, in float32: in float64, or over 0 to 1, the same curve is a good one."""
    log_probs = some_log_probs()
    codec = read_settings(sized(RECOMMENDED, VOCABULARY), "manifest")
    assert noise_of_curve(codec) > 10

    errors = {}
    ranks = {}
    for name, settings, fit in (
        ("rounded", RECOMMENDED, "rounded"),
        ("float64", RECOMMENDED, "float64"),
        ("0 to 1", {**RECOMMENDED, "normalize_t": True}, "rounded"),
    ):
        codec = read_settings(sized(settings, VOCABULARY), "manifest")
        ids, values = read_back(log_probs, settings, fit)
        exact = np.take_along_axis(log_probs, ids, 1)
        errors[name] = np.abs(values - exact)[:, 16:].mean()
        ranks[name] = trusted_ranks(codec, values)
    assert errors["rounded"] > 10 * max(errors["float64"], errors["0 to 1"])
    assert ranks == {"rounded": 16, "float64": 128, "0 to 1": 128}

    stored, read = nats_lost(log_probs, RECOMMENDED, "rounded")
    assert stored > 10 * read


@pytest.mark.parametrize("name", ["budget", "Qwen3-235B", "DeepSeek-V3"])
def test_other_published_curves_are_read_whole(name):
    codec = read_settings(sized(PUBLISHED[name], VOCABULARY), "manifest")
    _, values = read_back(some_log_probs(), PUBLISHED[name], "rounded")
    assert noise_of_curve(codec) < 0.1 and trusted_ranks(codec, values) == codec.listed
    assert published_loss(codec) is not None


def test_what_is_read_is_a_distribution_whatever_the_curve_says():
    ids = np.array([[1, 2, 3, 4], [1, 2, 3, 4]])
    values = np.array([[-0.1, -3.0, 5.0, -1.0], [-1.0, -2.0, np.nan, -np.inf]])
    ids, values = cleaned(ids, values, exact=2, ranks=4)
    assert np.exp(values).sum(1).max() <= 1 + 1e-9
    assert (values[0, 2:] <= values[0, 1]).all()
    assert ids[1].tolist() == [1, 2, -1, -1] and (values[1, 2:] == -np.inf).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_lose_in_nats(name):
    """Measure the losses of a real teacher; -s prints the table that docs/captures.md has."""
    place = os.environ.get("REAL_MODELS_DIR")
    if not place:
        pytest.skip("REAL_MODELS_DIR is not set: the losses of a real teacher are not measured")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(place) / "models" / "tinystories-neo-chat-3m"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = (Path(place) / "corpora" / "tinystories-v1.txt").read_text(encoding="utf-8")[:1500]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :200]
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1).numpy()

    stored, read = nats_lost(log_probs, PUBLISHED[name], "float32")
    print(f"\n{name}: {stored:.5f} nats a position as stored, {read:.5f} as read", end=" ")
    # What DistillKit's own fit makes of the recommended ones depends on the machine's library.
    assert read < (0.15 if name == "budget" else 0.002)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("no mapping", "expected the settings"),
        ({"version": 3}, "lacks d, exact_k, k, residual_bins and has version"),
        ({**sized(EXACT, 100), "codebook": 8}, "has codebook, which this version does not know"),
        (sized({**EXACT, "exact_dtype": "float8"}, 100), "got numbers in float8"),
        (sized({**EXACT, "exact_k": 17}, 100), "exact_k <= k <= vocabulary"),
        (sized(EXACT, 10), "exact_k <= k <= vocabulary"),
        (sized({**EXACT, "residual_bins": [{"element_bits": 3}]}, 100), "scale_dtype"),
    ],
)
def test_other_settings_are_refused_with_what_was_expected(settings, message):
    with pytest.raises(UserError, match=message):
        read_settings(settings, "manifest")


def test_settings_may_lie_under_the_name_that_a_recipe_of_distillkit_has_for_them():
    settings = sized(QWEN, VOCABULARY)
    codec = read_settings({"teacher": {"kind": "dataset", "logprob_compressor": settings}}, "manifest")
    assert isinstance(codec, LogprobCodec) and codec == read_settings(settings, "manifest")
