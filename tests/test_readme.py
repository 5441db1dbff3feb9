"""What README tells users to type."""

import re
from pathlib import Path

import torch

from tests.models.tiny import STORIES, byte_bpe, tiny_llama
from utils.config.yaml_files import find_config

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_every_recipe_it_names_exists():
    named = re.search(r"a recipe from `configs/`: (.*?) \|", README)[1]
    for name in re.findall(r"`(\w+)`", named):
        assert find_config(name).is_file()


def test_the_library_example_trains(as_installed):
    """As it stands, with tiny models."""
    student_tokenizer, teacher_tokenizer = byte_bpe(280), byte_bpe(330)
    scope = {
        "torch": torch,
        "student_tokenizer": student_tokenizer,
        "teacher_tokenizer": teacher_tokenizer,
        "student_rows": len(student_tokenizer),
        "teacher_rows": len(teacher_tokenizer),
        "student": tiny_llama(len(student_tokenizer)),
        "teacher": tiny_llama(len(teacher_tokenizer), seed=1),
        "texts": STORIES * 30,
        "steps": 3,
    }
    before = [p.clone() for p in scope["student"].parameters()]
    (example,) = blocks("python")
    exec(example, scope)
    assert any((a != b).any() for a, b in zip(before, scope["student"].parameters(), strict=True))
