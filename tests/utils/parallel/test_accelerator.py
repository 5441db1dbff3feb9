import os

import pytest

from utils.parallel.accelerator import build_accelerator, temporary_accelerator


@pytest.mark.parametrize(("asked", "used"), [(None, "cpu"), ("xpu", "xpu")])
def test_on_a_cpu_deepspeed_is_told_its_device_before_a_library_loads_it(asked, used, monkeypatch):
    """Else it warns on the screen that it had to look for one."""
    monkeypatch.setenv("DS_ACCELERATOR", asked or "")
    if asked is None:
        monkeypatch.delenv("DS_ACCELERATOR")
    with temporary_accelerator("no", cpu=True):
        assert os.environ["DS_ACCELERATOR"] == used


def test_a_second_run_of_a_process_may_have_another_precision():
    with temporary_accelerator("bf16", cpu=True):
        for precision in ("no", "no", "bf16"):
            assert build_accelerator(precision, cpu=True).mixed_precision == precision
