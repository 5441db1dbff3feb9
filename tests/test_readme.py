"""Recipes and code that README tells users to type."""

import re
from pathlib import Path

from transformers import LlamaForCausalLM

from tests.models.tiny import STORIES, byte_bpe, pretend_hub, tiny_llama
from utils.config.yaml_files import find_config

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_every_recipe_it_names_exists():
    named = re.search(r"a recipe from `configs/`: (.*?) \|", README)[1]
    for name in re.findall(r"`(\w+)`", named):
        assert find_config(name).is_file()


def test_the_library_example_trains(as_installed, monkeypatch, tmp_path):
    """Run the example as it stands, with tiny models for those that it names."""
    pretend_hub(monkeypatch, {"HuggingFaceTB/SmolLM2-360M": byte_bpe(280), "Qwen/Qwen2.5-1.5B": byte_bpe(330)})
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")

    scope = {"texts": STORIES * 30}
    exec(example, scope)

    untrained = tiny_llama(280)
    trained = LlamaForCausalLM.from_pretrained(tmp_path / "student")
    assert scope["steps"] > 2
    assert any((a != b).any() for a, b in zip(untrained.parameters(), trained.parameters(), strict=True))
