"""The forecast of memory against the peak of steps of true shapes, counted byte by byte."""

import pytest

from tests.gpu.attention_kernels import MATH

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]

WITHIN = 0.05
QUICK = [("T4", "fp16", 2, 512), ("P100", "fp16", 4, 512), ("H100", "bf16", 8, 1024)]
SLOW = [
    ("T4", "fp16", 4, 512),
    ("T4", "fp16", 8, 512),
    ("T4", "fp16", 4, 1024),
    ("3090", "bf16", 2, 1024),
    ("H100", "no", 2, 1024),
]


@pytest.fixture(scope="module")
def forecasts(gpu_kind, scenario):
    """(cases) -> what was measured and forecast of each, in one process."""
    if gpu_kind == "real":
        pytest.skip("steps without content are counted on a pretended GPU; `python -m benchmarks.gpu` counts real ones")
    return lambda cases: scenario("forecasts", cases=cases)


def check(results: list[dict]) -> None:
    for result in results:
        assert MATH not in result["kernels"], result
        assert result["forecast"] == pytest.approx(result["peak"], rel=WITHIN), result


def test_the_forecast_of_the_recipes_is_within_5_percent_of_the_peak(forecasts):
    check(forecasts(QUICK))


@pytest.mark.slow
def test_so_is_that_of_other_batches_and_cards(forecasts):
    check(forecasts(SLOW))
