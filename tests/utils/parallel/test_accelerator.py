import os

import pytest

from utils.parallel.accelerator import temporary_accelerator


@pytest.mark.parametrize(("asked", "used"), [(None, "cpu"), ("xpu", "xpu")])
def test_on_a_cpu_deepspeed_is_told_its_device_before_a_library_loads_it(asked, used, monkeypatch):
    """Else it warns on the screen that it had to look for one."""
    monkeypatch.setenv("DS_ACCELERATOR", asked or "")
    if asked is None:
        monkeypatch.delenv("DS_ACCELERATOR")
    with temporary_accelerator("no", cpu=True):
        assert os.environ["DS_ACCELERATOR"] == used
