"""A run that does not fit is halved, goes on, and its student is exported; a resumed one is the same bit for bit."""

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]

SHORT = ["--max-steps", "6", "--eval-every", "3", "--save-every", "4"]


@pytest.mark.parametrize(("card", "precision"), [("T4", "fp16"), pytest.param("H100", "bf16", marks=pytest.mark.slow)])
def test_a_run_that_was_halved_for_memory_is_exported(scenario, gpu_kind, gpu_place, tmp_path, card, precision):
    if gpu_kind == "real":
        # and products take a workspace of up to 32 MiB: what models of kilobytes need is nothing beside that
        reason = "torch's own allocator takes memory in blocks of 2 and 20 MiB"
        pytest.skip(f"{reason}; larger models run out of it in `python -m benchmarks.gpu --parts tight`")

    output = tmp_path / "run"
    large = ["--batch-size", "4", "--gradient-accumulation-steps", "1"]
    settings = ["--set", f"training.mixed_precision={precision}", "teacher.dtype=auto", "student.lora.enabled=false"]
    arguments = gpu_place.arguments(output, *SHORT, *large, *settings)
    result = scenario("out_of_memory", card=card, arguments=arguments, output=str(output), share=0.8)
    assert result["code"] == 0, result["errors"]
    assert any("out of memory in optimizer step 4" in line for line in result["warnings"]), result["warnings"]
    assert result["is_exported"]


@pytest.mark.parametrize(("card", "precision"), [("T4", "fp16"), pytest.param("H100", "bf16", marks=pytest.mark.slow)])
def test_a_run_continues_bit_for_bit(scenario, gpu_place, tmp_path, card, precision, gpu_kind):
    """With the scale of fp16. On a real card only with `training.deterministic`."""
    output = tmp_path / "run"
    settings = ["--set", f"training.mixed_precision={precision}", "teacher.dtype=auto"]
    settings += ["training.deterministic=true"] if gpu_kind == "real" else []
    arguments = gpu_place.arguments(output, "--max-steps", "8", "--save-every", "4", *settings)
    result = scenario("resume", card=card, arguments=arguments, output=str(output))
    assert (result["whole"]["code"], result["again"]["code"]) == (0, 0)
    assert (result["whole"]["steps"], result["again"]["steps"]) == (8, 4)
    assert result["is_equal"]
