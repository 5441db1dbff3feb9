"""Material for a first run without download or account.

Text: small stories that `data.stories` writes, 1.5 MB. From it: two byte-level BPE tokenizers of different size,
and the configs of a small teacher and a smaller student. Built once and cached; the teacher is trained by the first run
that learns from it.
"""

import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ..config import resume_rules
from ..config.plain import to_plain
from ..config.protocols import ConfigT, RunConfig
from ..config.quickstart_names import NAMES, STUDENT, TEACHER
from ..data import documents, stories
from ..data.stream.beginning import load_corpus
from ..errors import UserError, value_errors_are_the_users
from ..files import atomic_folder, write_text
from ..paths import cache_dir
from .exit_codes import Interrupted
from .session import Session

log = logging.getLogger("train")

FORMAT = 2
"""Version of the material; it goes up when the same stories and models would give another one."""
END_OF_TEXT = "<|endoftext|>"
STORIES = 2000
"""A window of the student holds one of them, so an epoch has about as many windows."""
TEACHER_VOCABULARY = 2048
STUDENT_VOCABULARY = 1024
CONTEXT = 512


@dataclass(frozen=True)
class Material:
    """Everything the embedded default starts from. Each of the two folders holds config.json and a tokenizer."""

    texts: list[str]
    file: Path
    """The texts as .jsonl with the column "text": training data for `load_documents`."""
    teacher: Path
    """Config and tokenizer; no weights."""
    student: Path
    """Config and tokenizer; no weights."""
    trained_teacher: Path
    """Where the trained teacher belongs: inside a folder that exists, named by what it was made from. Absent until
    someone puts it there, which has to be done atomically."""
    fingerprint: str
    """Of the texts, vocabularies, models and this module's format."""


def material(cache: Path | None = None) -> Material:
    """Return the material, from the cache or built now (a few seconds) and put there whole.

    Raises:
        UserError: the cache folder cannot be written to.
    """
    # Named by what it is made from: other stories, or other models, get a folder of their own.
    folder = (cache or cache_dir()) / f"quickstart-{_source_key()}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _build(folder)
        except OSError as error:
            if not folder.is_dir():  # else: another process was faster
                raise UserError(
                    f"Cannot write the quickstart material to {folder}: {error}. Set CURRICULUM_DISTILLATION_CACHE to "
                    "a folder that can be written to."
                ) from error

    file = folder / "documents.jsonl"
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    key = fingerprint(texts)
    return Material(
        texts=texts,
        file=file,
        teacher=folder / "teacher",
        student=folder / "student",
        trained_teacher=folder / f"trained-teacher-{key[:12]}",
        fingerprint=key,
    )


def fingerprint(texts: list[str]) -> str:
    """Return a hash of what everything else follows from."""
    return blake2b(json.dumps([FORMAT, _models(), texts]).encode(), digest_size=16).hexdigest()


def _models() -> list[dict[str, Any]]:
    """Return the settings of both models, their vocabularies included."""
    configs = (teacher_config(TEACHER_VOCABULARY), student_config(STUDENT_VOCABULARY))
    return [{k: v for k, v in config.to_diff_dict().items() if k != "transformers_version"} for config in configs]


def _source_key() -> str:
    """Return a name for what the material is made from, without making it: a second run starts at once."""
    source = json.dumps([FORMAT, _models(), STORIES, stories.fingerprint()])
    return blake2b(source.encode(), digest_size=6).hexdigest()


def with_paths(config: ConfigT, made: Material, teacher: Callable[[], Path]) -> ConfigT:
    """Return a run's settings with paths in place of `NAMES`.

    Args:
        teacher: returns the folder of the teacher to learn from; called only if the settings name it.
    """
    folders = {STUDENT: made.student, TEACHER: made.teacher}
    if config.student.name in NAMES:
        folder = folders[config.student.name]
        config = replace(config, student=replace(config.student, name=str(folder), init="random"))
    if config.teacher.name in NAMES:
        config = replace(config, teacher=replace(config.teacher, name=str(teacher())))

    train = [_text_path(name, made) for name in config.data.train]
    held_out = None if config.data.eval is None else _text_path(config.data.eval, made)
    return replace(config, data=replace(config.data, train=train, eval=held_out))


def _text_path(name: str, made: Material) -> str:
    """Return the path of the text that a name stands for; another name as it is."""
    return str(made.file) if name == STUDENT else name


def is_named(config: RunConfig) -> bool:
    """Return whether a run's settings name any of this."""
    texts = (*config.data.train, config.data.eval)
    models_named = NAMES & {config.teacher.name, config.student.name}
    return bool(models_named) or STUDENT in texts


def resolve(
    config: ConfigT,
    session: Session,
    teacher_config: ConfigT,
    train: Callable[[ConfigT], str],
) -> ConfigT:
    """Return the settings with paths in place of the names; a teacher that nobody has trained yet is trained first.

    Args:
        teacher_config: settings of the run that trains the teacher.
        train: does a run; returns what ended it.

    Raises:
        Interrupted: the time limit ended the teacher's training.
    """
    material_here = session.main_first(material)

    def teacher() -> Path:
        folder = teacher_folder(material_here, resume_rules.identity(to_plain(teacher_config)))
        if session.on_main(folder.is_dir):
            return folder

        # a mistake in a text of the user's own is told before the minute that the teacher takes
        data = with_paths(config, material_here, Path).data
        with value_errors_are_the_users(), documents.errors_name_their_document(data):
            session.main_first(lambda: load_corpus(data, config.training.seed))

        log.info("no trained teacher in the cache: training one now, about a minute")
        scratch = session.on_main(lambda: scratch_folder(folder))
        reason = train(replace(teacher_config, output_dir=str(scratch)))
        if reason == "max_hours":
            raise Interrupted(reason)

        if session.is_main:
            put_into_place(scratch, folder)
        session.accelerator.wait_for_everyone()
        return folder

    resolved = with_paths(config, material_here, teacher)
    session.continue_log()  # which the teacher's run had meanwhile
    return resolved


def teacher_folder(made: Material, settings: Mapping[str, Any]) -> Path:
    """Return the folder of the teacher that a run with these settings trains."""
    key = sha256(json.dumps(settings).encode()).hexdigest()[:8]
    return made.trained_teacher.with_name(f"{made.trained_teacher.name}-{key}")


def scratch_folder(folder: Path) -> Path:
    """Return a folder of this process in which to build `folder`; it takes over the work of a process that died."""
    stem = f"{folder.name}.run-{platform.node()}-"
    scratch = folder.with_name(f"{stem}{os.getpid()}")

    # What a killed process had trained is gone on with, as in any run that is resumed.
    for other in sorted(folder.parent.glob(f"{stem}*")):
        process = other.name.removeprefix(stem)
        is_abandoned = process.isdecimal() and not psutil.pid_exists(int(process))
        if is_abandoned and not scratch.exists():
            with suppress(OSError):  # another process was faster
                os.replace(other, scratch)
    return scratch


def put_into_place(made: Path, folder: Path) -> None:
    """Rename the student of the run in `made` to `folder`, unless another process was faster, and drop the run."""
    try:
        os.replace(made / "student", folder)
    except OSError:
        if not folder.is_dir():
            raise

    # The run is of no use beside its student.
    shutil.rmtree(made, ignore_errors=True)


def _build(folder: Path) -> None:
    """Write text, tokenizers and settings of both models into a folder that appears when it is whole."""
    texts = stories.write_stories(STORIES)
    with atomic_folder(folder) as staging:
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        write_text(staging / "documents.jsonl", "".join(lines))

        for name, size, config in (
            ("teacher", TEACHER_VOCABULARY, teacher_config),
            ("student", STUDENT_VOCABULARY, student_config),
        ):
            tokenizer = train_tokenizer(texts, size)
            tokenizer.save_pretrained(staging / name)
            config(len(tokenizer)).save_pretrained(staging / name)


# ---------------------------------------------------------------- tokenizers and models


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, in which every byte string has a tokenisation.

    `<|endoftext|>` opens and closes documents.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def teacher_config(vocabulary: int) -> LlamaConfig:
    """Llama of 4 layers, width 128: 1.1 million parameters with the teacher's vocabulary."""
    return _llama(vocabulary, width=128, layers=4, heads=4)


def student_config(vocabulary: int) -> LlamaConfig:
    """Llama of 2 layers, width 96: 0.3 million parameters with the student's vocabulary."""
    return _llama(vocabulary, width=96, layers=2, heads=4)


def _llama(vocabulary: int, *, width: int, layers: int, heads: int) -> LlamaConfig:
    """Make the settings of a small Llama, of which embedding and head are one."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=CONTEXT,
        # Three times the default, which is for wide models: in so few steps it decides how far a narrow one gets.
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
