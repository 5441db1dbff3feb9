"""Student and teacher of a finished run side by side in the terminal: `curriculum-distill chat runs/NAME`.

Both go on from the same text, or answer the same conversation, where the student learned from conversations; as in the
report, each writes what it finds likeliest. In a pipe every line of the input is one text or question.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config import chat_arguments
from ..config.quickstart_names import NAMES
from ..config.settings import template_values
from ..config.yaml_files import get_dotted, read_config
from ..errors import UserError
from ..evaluation.samples import generate_samples
from ..evaluation.scores import has_encoder
from ..logs.console import console
from ..logs.terminal import printable
from ..machine.hardware import choose_device, choose_precision
from ..paths import user_path
from ..pretrained import loading, model_folders
from ..pretrained.precision import frozen_dtype
from ..run_layout import REPORT_JSON, STUDENT
from . import quickstart

log = logging.getLogger("train")

NARROWEST = 70
"""Columns of a terminal below which the answers stand one below the other."""

NEW = "/new"
"""Input that starts a new conversation."""

ChatTokenizers = Callable[
    [dict[str, PreTrainedTokenizerBase], Mapping[str, Mapping[str, Any]] | None],
    tuple[dict[str, PreTrainedTokenizerBase], list[str]],
]
"""Tokenizers by role, and values for their templates -> tokenizers with chat templates, and what their own ones lack
(`Method.chat_tokenizers`)."""


@dataclass
class Speaker:
    """A model that writes, and what it has read and written so far."""

    name: str
    """Student or Teacher."""
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    start: Sequence[int]
    """Tokens that it reads before a plain text, or that its decoder begins with."""
    converses: bool
    """True: it answers a conversation; False: it goes on from a text."""
    messages: list[dict[str, str]] = field(default_factory=list)
    """The conversation so far."""

    def reply(self, text: str, new_tokens: int) -> str:
        """Return what the model writes, and remember it in a conversation."""
        is_encoder_decoder = has_encoder(self.model)
        if self.converses:
            self.messages.append({"role": "user", "content": text})
            prompt = self._conversation(new_tokens)
        elif is_encoder_decoder:
            prompt = self.tokenizer(text)["input_ids"]
        else:
            prompt = [*self.start, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]

        forced_bos = self.start[1] if is_encoder_decoder and len(self.start) > 1 else None
        [reply] = generate_samples(
            self.model, self.tokenizer, [prompt], new_tokens, forced_bos=forced_bos, float32=False
        )
        if self.converses:
            self.messages.append({"role": "assistant", "content": reply})
        return reply

    def _conversation(self, new_tokens: int) -> list[int]:
        """Return the tokens of the conversation; its oldest exchanges are forgotten where the context is too short."""
        context = loading.context_length(self.model.config)
        while True:
            ids = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, return_dict=True)
            prompt = ids["input_ids"]
            if len(prompt) + new_tokens <= context or len(self.messages) < 3:
                return prompt
            del self.messages[:2]


# ------------------------------------------------------------------------------------------ command


def main(words: Sequence[str], chat_tokenizers: ChatTokenizers) -> None:
    """Chat with the models of a run until the input ends.

    Args:
        words: of the command line, behind `chat`.

    Raises:
        UserError: mistakes in the words, no finished run in the folder, or a student that cannot be loaded.
    """
    options = chat_arguments.parse(words)
    folder = user_path(options.run)
    _require_student(folder, options.run)

    speakers = load_speakers(folder, chat_tokenizers, with_teacher=not options.student_only)
    is_watched = sys.stdin.isatty() and sys.stdout.isatty()
    if is_watched:
        _introduce(speakers)
    for text in _inputs(is_watched):
        _exchange(speakers, text, options.new_tokens, is_watched)


def _require_student(folder: Path, name: str) -> None:
    """Check that there is a finished run in a folder.

    Raises:
        UserError: there is none.
    """
    if (folder / STUDENT).is_dir():
        return

    problem = f"no {STUDENT}/ in it: that run is not finished, or the folder is not a run's"
    if not folder.is_dir():
        problem = "no such folder"
    elif model_folders.is_model(folder):
        problem = "this is a model's folder, perhaps of a run: then give the folder above it"
    raise UserError(f"chat {name}: {problem}. Expected the folder of a finished run, such as runs/quickstart.")


# ------------------------------------------------------------------------------------------- models


def load_speakers(folder: Path, chat_tokenizers: ChatTokenizers, *, with_teacher: bool = True) -> list[Speaker]:
    """Load the student of a run and, if it can be found, its teacher.

    Raises:
        UserError: the student cannot be loaded.
    """
    settings, _ = read_config(folder)
    results = _read_results(folder)
    device = choose_device().value
    names = {"student": str(folder / STUDENT)}
    models = {"student": loading.load_model(names["student"], "student", torch.float32, device)}
    tokenizers = {"student": loading.load_tokenizer(names["student"], "student")}

    teacher = get_dotted(settings, "teacher.name")
    if with_teacher and teacher is not None:
        try:
            name = _teacher_source(teacher)
            named = get_dotted(settings, "teacher.tokenizer") or name
            tokenizers["teacher"] = loading.load_tokenizer(named, "teacher")
            models["teacher"] = _load_teacher(name, settings, device)
        except UserError as error:
            tokenizers.pop("teacher", None)
            log.warning("the student writes alone, since its teacher cannot be loaded: %s", error)

    # As in training: a model that has no chat template of its own gets one there.
    converses = bool(results.get("prompted")) and not has_encoder(models["student"])
    if converses:
        # The student's template was exported with its values in it.
        variables = {"teacher": template_values(get_dotted(settings, "teacher.chat_template_kwargs", []))}
        tokenizers, _ = chat_tokenizers(tokenizers, variables)
    starts = results.get("text_starts") or {}
    return [
        Speaker(role.capitalize(), model.eval(), tokenizers[role], starts.get(role, ()), converses)
        for role, model in models.items()
    ]


def _load_teacher(name: str, settings: Mapping[str, Any], device: torch.device) -> nn.Module:
    """Load the teacher in the precision that the run had it in."""
    weights = get_dotted(settings, "teacher.dtype", "auto")
    precision = choose_precision(get_dotted(settings, "training.mixed_precision", "no"), device)
    dtype = frozen_dtype(weights, device, precision.value).value
    allow_pickle = bool(get_dotted(settings, "teacher.allow_pickle"))
    return loading.load_model(name, "teacher", dtype, device, weights=weights, allow_pickle=allow_pickle)


def _teacher_source(name: str) -> str:
    """Return a teacher's folder or hub id; for the embedded teacher the newest one that a run has trained.

    Raises:
        UserError: no run has trained the embedded teacher here.
    """
    if name.startswith(("http://", "https://")):
        raise UserError(f"teacher {name}: it is behind a server, which is asked for probabilities alone")
    if name not in NAMES:
        return name

    untrained = quickstart.material().trained_teacher
    trained = [path for path in untrained.parent.glob(f"{untrained.name}*") if model_folders.is_model(path)]
    if not trained:
        raise UserError(f"teacher {name}: it is trained by the first run that learns from it, and is not in the cache")
    return str(max(trained, key=lambda path: path.stat().st_mtime))


def _read_results(folder: Path) -> dict[str, Any]:
    """Return the results of a run; {} where its report is missing or damaged."""
    try:
        results = json.loads((folder / REPORT_JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


# ------------------------------------------------------------------------------------------- screen


def _introduce(speakers: Sequence[Speaker]) -> None:
    """Say who writes, and what can be typed."""
    names = " and ".join(speaker.name.lower() for speaker in speakers)
    if speakers[0].converses:
        console().print(f"Ask something: {names} will answer. {NEW} starts a new conversation; Ctrl-D ends.")
    else:
        console().print(f"Write the beginning of a text: {names} will go on from it. Ctrl-D ends.")


def _inputs(is_watched: bool) -> Iterator[str]:
    """Yield the texts that are typed, or the lines of a pipe, until they end; Ctrl-C at the prompt ends them too."""
    while True:
        try:
            line = input("\n> " if is_watched else "")
        except (EOFError, KeyboardInterrupt):
            if is_watched:
                console().print()
            return
        # bytes that are no UTF-8 come as halves of characters, which no tokenizer takes
        text = line.encode(errors="replace").decode().strip()
        if text:
            yield text


def _exchange(speakers: Sequence[Speaker], text: str, new_tokens: int, is_watched: bool) -> None:
    """Let every speaker reply to a text, and show the replies; Ctrl-C ends a reply of a chat that is watched."""
    if text == NEW:
        for speaker in speakers:
            speaker.messages.clear()
        return

    replies = []
    try:
        for speaker in speakers:
            if is_watched:
                with console().status(f"{speaker.name} writes"):
                    replies.append((speaker.name, _printable(speaker.reply(text, new_tokens))))
            else:
                replies.append((speaker.name, _printable(speaker.reply(text, new_tokens))))
    except KeyboardInterrupt:
        if not is_watched:
            raise
        console().print("(stopped)")
        _forget_question(speakers)
    _show(replies, in_columns=is_watched and console().width >= NARROWEST and len(replies) > 1)


def _forget_question(speakers: Sequence[Speaker]) -> None:
    """Take a question that was not answered out of the conversations."""
    for speaker in speakers:
        if speaker.messages and speaker.messages[-1]["role"] == "user":
            speaker.messages.pop()


def _show(replies: Sequence[tuple[str, str]], *, in_columns: bool) -> None:
    """Print the replies beside each other, or one below the other."""
    if not in_columns:
        for name, reply in replies:
            console().print(f"{name}: {reply}", soft_wrap=True)
        return

    table = Table.grid(expand=True, padding=(0, 3))
    for _ in replies:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Text(name, "bold") for name, _ in replies))
    table.add_row(*(Text(reply) for _, reply in replies))
    console().print(table)


def _printable(text: str) -> str:
    """Return what a model wrote as a terminal can show it."""
    return printable(text).strip() or "(nothing: it ended the text at once)"
