"""Files that runs of the whole program need: two tokenizers, a random teacher, a student's config, a text, a recipe."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from utils.run.quickstart import train_tokenizer

WORDS = "the a girl boy dog cat tree house river stone runs sees finds takes loves small red old happy and then but"


@dataclass(frozen=True)
class Place:
    """Files of a set-up that trains in seconds."""

    folder: Path
    teacher: Path
    student: Path
    """Config and tokenizer, no weights."""
    text: Path
    recipe: Path

    def arguments(self, output: Path, *more: str) -> list[str]:
        """A command line that trains into `output`."""
        return ["--config", str(self.recipe), "--output-dir", str(output), *more]


def documents(count: int, seed: int = 0) -> list[str]:
    """Different short texts, always the same for a seed."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS.split(), k=48)).capitalize() + "." for _ in range(count)]


def write_jsonl(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


def make_place(folder: Path, key_value_heads: int = 2, dropout: float = 0.1) -> Place:
    """Write the files of a set-up.

    Args:
        key_value_heads: of both models, which have two query heads.
        dropout: of the student's attention.
    """
    text = write_jsonl(folder / "text.jsonl", documents(90))

    for name, vocabulary, width in (("teacher", 400, 32), ("student", 290, 16)):
        tokenizer = train_tokenizer(documents(90), vocabulary)
        tokenizer.save_pretrained(folder / name)

        config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=key_value_heads,
            max_position_embeddings=128,
            attention_dropout=dropout if name == "student" else 0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        config.save_pretrained(folder / name)

        # The student gets no weights here: the recipe begins it at random.
        if name == "teacher":
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)

    recipe = {
        "teacher": {"name": str(folder / "teacher")},
        "student": {"name": str(folder / "student"), "init": "random"},
        "data": {"train": [str(text)], "max_length": 64},
        "curriculum": {
            "kd": {"weight": {"points": [[0, 0.2], [1, 0.8]]}},
            "lm": {"weight": 0.5},
            # a random student would get them
            "feat": {"weight": 0.0},
            "attn": {"weight": 0.0},
        },
        "training": {
            "batch_size": 2,
            "gradient_accumulation_steps": 4,
            "epochs": 3,
            "learning_rate": 1e-2,
            "mixed_precision": "no",
            "save_every": 4,
        },
        "evaluation": {"every": 15, "max_windows": 8, "samples": 1, "new_tokens": 4, "generation": 2},
        "logging": {"every": 1},
    }

    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return Place(folder, folder / "teacher", folder / "student", text, folder / "recipe.yaml")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Vocabulary maps are kept where the suite keeps its files, also by subprocesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURRICULUM_DISTILLATION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
