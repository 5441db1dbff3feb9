"""Models, tokenizers and texts that are made on the spot: no part needs a network.

Tokenizers are taken from `--data DIR` where it has them, else trained on the texts that come with Python.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from benchmarks.gpu.settings import Bench, Skipped
from benchmarks.step_time import shapes
from utils.checks import miniature
from utils.run import quickstart

REAL_TOKENIZERS = {"teacher": "qwen2.5", "student": "smollm"}
"""Names below DIR/tokenizers."""
TRAINED_VOCABULARIES = {"teacher": 49_152, "student": 16_384}
"""Tokens to train at most, where no real tokenizers are given."""
TOY_VOCABULARIES = {"teacher": 1_000, "student": 600}
SPREAD = 0.02
"""Standard deviation of random weights."""
TRAINED = "trained on the spot"
"""Origin of tokenizers that no user gave."""


@dataclass(frozen=True)
class PairFolders:
    """A teacher and a student that load like any model, and a text for them."""

    teacher: Path
    student: Path
    text: Path
    tokenizers: str
    """Origin of the tokenizers, for the table."""


def small_pair(bench: Bench) -> PairFolders:
    """Return a pair of some million parameters (less at toy size) with random weights; made once for a command."""
    folder = bench.work / "small"
    if bench.scale.is_toy:
        pair = _miniature_in(folder)
    else:
        material = quickstart.material(folder)
        pair = PairFolders(material.teacher, material.student, material.file, TRAINED)

    # Configs and tokenizers come without weights.
    for model in (pair.teacher, pair.student):
        if not list(model.glob("*.safetensors")):
            config = AutoConfig.from_pretrained(model)
            _save_random_weights(config, model, dtype=torch.float32, device=torch.device("cpu"))
    return pair


def _miniature_in(folder: Path) -> PairFolders:
    """Return the smallest pair, built by the first part of the command that needs it."""
    if not folder.exists():
        miniature.build(folder)
    return PairFolders(folder / "teacher", folder / "student", folder / "documents.jsonl", TRAINED)


def true_pair(bench: Bench) -> PairFolders:
    """Return a pair of the scale's shapes with random weights in bf16; made once for a command.

    Raises:
        Skipped: the disk has no room for the weights.
    """
    folder = bench.work / "true"
    text = folder / "documents.jsonl"
    pair = PairFolders(folder / "teacher", folder / "student", text, _origin(bench))
    # Written last: where it exists, everything does.
    if text.exists():
        return pair

    folder.mkdir(parents=True, exist_ok=True)
    _check_disk(bench, folder)

    material = small_pair(bench)
    configs = shapes(bench.scale.shape, bench.scale.teacher_vocabulary, bench.scale.student_vocabulary)
    for config, role in zip(configs, ("teacher", "student"), strict=True):
        tokenizer = _tokenizer(bench, role, material.text)
        tokenizer.save_pretrained(folder / role)

        # The shapes come without special tokens.
        config.bos_token_id = tokenizer.eos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.initializer_range = SPREAD
        _save_random_weights(config, folder / role, dtype=torch.bfloat16, device=bench.device)

    shutil.copyfile(material.text, text)
    return pair


def _check_disk(bench: Bench, folder: Path) -> None:
    """Check that a disk has room for true models and runs of them.

    Raises:
        Skipped: it has not.
    """
    # Models in bf16, and the exported student in float32.
    needed = 2**20 if bench.scale.is_toy else 8 * 2**30
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Skipped(
            f"{free / 2**30:.1f} GiB are free in {folder}, expected {needed / 2**30:.0f} for models and runs; "
            "set TMPDIR to a larger disk"
        )


def _origin(bench: Bench) -> str:
    """Return the origin of the true pair's tokenizers."""
    return " and ".join(REAL_TOKENIZERS.values()) if _real_tokenizers(bench) else TRAINED


def _real_tokenizers(bench: Bench) -> dict[str, Path]:
    """Return the user's tokenizers by role; empty unless there are both, and the models are large enough for them."""
    if bench.data is None or bench.scale.is_toy:
        return {}

    folders = {role: bench.data / "tokenizers" / name for role, name in REAL_TOKENIZERS.items()}
    if not all(folder.is_dir() for folder in folders.values()):
        return {}
    return folders


def _tokenizer(bench: Bench, role: str, text: Path) -> PreTrainedTokenizerBase:
    """Return the user's tokenizer of a role, or one that is trained on a text."""
    if folders := _real_tokenizers(bench):
        return AutoTokenizer.from_pretrained(folders[role])

    sizes = TOY_VOCABULARIES if bench.scale.is_toy else TRAINED_VOCABULARIES
    lines = text.read_text(encoding="utf-8").splitlines()
    return quickstart.train_tokenizer(lines, sizes[role])


def _save_random_weights(config: PretrainedConfig, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Write config and weights, which are drawn on the device: a billion of them take long on a CPU."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to("cpu").save_pretrained(folder)


def real_pair(bench: Bench) -> tuple[Path, Path]:
    """Return the folders of the user's teacher and student.

    Without `--pair` these are DIR/models/teacher and DIR/models/student, or else the largest and the smallest model
    there.

    Raises:
        Skipped: there are no two models.
    """
    if bench.data is None:
        raise Skipped("no --data DIR with models/ was given")

    # By name.
    models = bench.data / "models"
    names = bench.pair or ("teacher", "student")
    folders = tuple(models / name for name in names)
    if all((folder / "config.json").is_file() for folder in folders):
        return folders
    if bench.pair:
        raise Skipped(f"{models} has no {' or no '.join(names)} with a config.json")

    # By size; a folder without weights is no model.
    sized = sorted((_weight_bytes(path.parent), path.parent) for path in models.glob("*/config.json"))
    by_size = [folder for size, folder in sized if size > 0]
    if len(by_size) < 2:
        raise Skipped(f"{models} has no two models with weights (*.safetensors)")
    return by_size[-1], by_size[0]


def _weight_bytes(folder: Path) -> int:
    """Return the bytes of a model's weights; 0 if there are none."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
