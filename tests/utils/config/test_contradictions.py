"""Settings of several sections that exclude one another; most are tested where their sections are."""

import pytest

from utils.commands.settings import RunConfig
from utils.config.build import build
from utils.errors import UserError


@pytest.mark.parametrize("name", ["127.0.0.1:8000/v1", "localhost:8000", "gpu-box.local:18431/"])
def test_an_address_without_its_scheme_is_no_name_of_a_model(name):
    values = {"teacher": {"name": name}, "student": {"name": "student"}, "data": {"train": ["text.txt"]}}
    with pytest.raises(UserError, match=f"without http://: give --teacher http://{name}"):
        build(RunConfig, values, source="a test")
    assert build(RunConfig, values | {"teacher": {"name": "org/model:7b.gguf"}}, source="a test")


@pytest.mark.parametrize(
    ("loss", "is_refused"), [({}, False), ({"correction": "channel"}, False), ({"top_k": 8}, True)]
)
def test_a_cache_of_one_token_leaves_nothing_to_renormalise(loss, is_refused):
    values = {"teacher": {"name": "teacher"}, "student": {"name": "student"}, "data": {"train": ["text.txt"]}}
    values |= {"cache": {"folder": "cache", "top_k": 1}, "loss": {"tail": "renormalise" if loss else "bucket", **loss}}
    if not is_refused:
        assert build(RunConfig, values, source="a test")
        return
    with pytest.raises(UserError, match=r"cache.top_k 1 .* loss.tail renormalise: give 2 or more"):
        build(RunConfig, values, source="a test")
