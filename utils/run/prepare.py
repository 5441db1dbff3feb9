"""From settings to what training works with: tokenizers, text, windows, held-out text. Models are loaded later."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..advice import advice
from ..config import resume_rules
from ..config.plain import to_plain
from ..config.protocols import RunConfig, share_stored
from ..config.settings import template_values
from ..data import documents
from ..data.batch_order import Pacing, permutation
from ..data.routes import Routes
from ..data.stream.beginning import read_beginning
from ..data.stream.blocks import StreamSetUp
from ..data.stream.recent import ERROR, RecentTexts
from ..data.windows import (
    Room,
    make_windows,
    make_windows_by_route,
    warn_of_left_out,
    warn_of_missing,
    window_lengths,
    windows_fingerprint,
)
from ..errors import value_errors_are_the_users
from ..evaluation.held_out import HeldOut, TextStart
from ..forecast import disk
from ..forecast.batch_size import Forecast
from ..forecast.model_size import Shape
from ..interfaces import Collator, Method, Pair
from ..machine.hardware import Choice
from ..paths import cache_dir
from ..pretrained import families, loading
from ..pretrained import named as named_models
from ..pretrained import student as students
from ..pretrained import teacher as teachers
from ..pretrained.layers import LayerChoice
from ..pretrained.precision import frozen_dtype
from ..teacher_cache import conversation_date
from ..teacher_cache.store import TeacherCache

log = logging.getLogger("train")

CHANNEL_WINDOWS = 2000
"""Windows on which the counted channel (loss.correction: channel) is counted."""


@dataclass(frozen=True)
class Job:
    """Everything that training and evaluation work with."""

    config: RunConfig
    method: Method
    accelerator: Accelerator
    pair: Pair
    """The two tokenizers and all between them."""
    collate: Collator
    windows: Dataset
    """To train on; of a stream, those at its beginning."""
    held_out: HeldOut
    fingerprint: dict[str, Any]
    """What a checkpoint must have been made from to be continued."""
    teacher_device: torch.device
    teacher_dtype: Choice[torch.dtype]
    cache: TeacherCache | None = None
    """Of what the teacher says."""
    needed: Forecast = field(default_factory=Forecast)
    text_repeats: bool = False
    """The training text was put together from a stock of sentences, and is learnt in few steps."""
    stream: StreamSetUp | None = None
    """Text that is read while training; None: all of it is in `windows`."""
    lengths: np.ndarray | None = None
    """Of each window, where they are put in order by it (`data.order: length`)."""
    pacing: Pacing | None = None
    """Windows by difficulty, and which of them are open in which step; None: all, in random order."""
    layers: LayerChoice | None = None
    """Those that the student takes from its model; None: all, or random ones."""
    parts: tuple["Job", ...] = ()
    """With several teachers, the job with each of them alone; see `several_teachers`."""
    teacher_name: str | None = None
    """Name of the teacher of such a part, for the log."""
    weight_at: Callable[[float], float] | None = None
    """Weight of the teacher of such a part, by the progress of the run; None: it always has one."""
    routes: Collection[str] = ()
    """Routes of text that the teacher of such a part is asked about; none: all."""

    @property
    def window_count(self) -> int:
        """Windows of an epoch; 0: they come as a stream, and nobody knows."""
        return 0 if self.stream is not None else len(self.windows)

    @property
    def stored_share(self) -> float:
        """Share of its KD rows that the cache keeps of a training window."""
        # Of several teachers the entropy of their mixture chooses, which none of their caches knows.
        return 1.0 if self.teacher_name is not None else share_stored(self.config)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's."""
        return self.pair.tokenizers["student"]

    @property
    def vocabulary(self) -> Any:
        """The map from the teacher's vocabulary to the student's."""
        return self.pair.vocabulary


@dataclass(frozen=True)
class Named:
    """Tokenizers and configurations of the models that a run names, by role; no weights."""

    tokenizers: dict[str, PreTrainedTokenizerBase]
    shapes: dict[str, PretrainedConfig]
    decoder_starts: tuple[int, int] | None
    """Tokens that the decoders of encoder-decoder models start with; None for causal models."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the student's head, then of those of its teacher or teachers."""
        return tuple(shape.get_text_config().vocab_size for shape in self.shapes.values())


@dataclass(frozen=True)
class TextSettings:
    """Facts of text and models that `interfaces.Method.join` needs; by model: student, teacher, further teachers."""

    max_length: int
    conversations: bool
    learn_from: Literal["completions", "all"]
    learn_reasoning: bool
    rows: tuple[int, ...]
    decoder_starts: tuple[int, int] | None
    text_starts: tuple[str | None, ...]
    today: date | None
    cache_dir: Path
    isolate_documents: bool


@dataclass(frozen=True)
class Material:
    """Text as both models read it."""

    corpus: documents.Corpus
    pair: Pair
    windows: Dataset
    held_out: Dataset
    stream: StreamSetUp | None
    """Of which the corpus is the beginning."""


def prepare(config: RunConfig, method: Method, accelerator: Accelerator, today: date | None = None) -> Job:
    """Read tokenizers and text, and cut windows: all that can fail cheaply, before the models.

    Args:
        today: the day for chat templates that write it; None: that of its checkpoints or cache, see
            `utils.teacher_cache.conversation_date`.

    Raises:
        UserError: the models, the text or the settings do not fit one another, or the disk is too full.
    """
    # A device that is not there is found before anything is read.
    teacher_device = teachers.choose_teacher_device(config, accelerator)
    named = load_named(config)
    require_widths_and_disk(config, method, named)

    material = read_material(config, method, named, today)
    pair = material.pair
    if config.curriculum.uses_own_text:
        with value_errors_are_the_users():
            pair.require_own_text()

    if config.loss.correction == "channel":
        # on windows that no setting but the text decides on
        chosen = permutation(len(material.windows), 0, 0)[:CHANNEL_WINDOWS].tolist()
        pair = pair.with_counted_channel([material.windows[i] for i in chosen])

    # The windows that are measured are drawn once, so that every evaluation of every run has the same.
    measured = sorted(permutation(len(material.held_out), 0, 0)[: config.evaluation.max_windows].tolist())
    held_out = HeldOut(
        config.evaluation,
        accelerator,
        material.held_out.select(measured),
        material.corpus.eval,
        pair.collate,
        pair.tokenizers,
        cast(int, config.training.batch_size),  # `auto` is a number by now
        prompt=pair.encoder.prompt,
        starts=text_starts(config, pair),
        together=config.teacher.device == teachers.SHARDED,
    )

    return Job(
        config=config,
        method=method,
        accelerator=accelerator,
        pair=pair,
        collate=pair.collate,
        windows=material.windows,
        held_out=held_out,
        fingerprint=identity(config, accelerator, material, held_out),
        teacher_device=teacher_device,
        teacher_dtype=frozen_dtype(config.teacher.dtype, teacher_device, accelerator.mixed_precision),
        stream=material.stream,
        text_repeats=documents.repeats_itself(material.corpus.train),
        lengths=window_lengths(material.windows, material.corpus) if config.data.order == "length" else None,
    )


def load_named(config: RunConfig) -> Named:
    """Load tokenizers and configurations; a run without a teacher has the student's for both."""
    # Windows are made for two sides; without a teacher both read with the student's tokenizer.
    students.check(config.student)
    tokenizers = named_models.load_tokenizers(config)
    shapes = named_models.load_shapes(config)
    named = Named(tokenizers, shapes, families.decoder_starts(config, shapes))

    names = {"student": config.student.name}
    for role, model in named_models.teachers_by_role(config).items():
        names[role] = model.name or config.student.name
    for role, rows in zip(names, named.rows, strict=True):
        # Rows that no token has are nothing to worry about, but they are a question that is asked.
        tokens = len(tokenizers[role])
        level = logging.DEBUG if rows == tokens else logging.INFO
        log.log(level, "%s %s: vocabulary %s, tokenizer %s", role, names[role], f"{rows:,}", f"{tokens:,}")
    return named


def require_widths_and_disk(config: RunConfig, method: Method, named: Named) -> None:
    """Refuse heads of the router that do not divide the models' widths, and a disk that is too full."""
    widths = {role: named.shapes[role].get_text_config().hidden_size for role in ("student", "teacher")}
    with value_errors_are_the_users():
        method.check_widths(**widths)

    # An estimate that fails is no reason not to train.
    with advice("forecast of disk"):
        # the comparison without the teacher keeps checkpoints of its own
        runs = 1 + config.compares_without_teacher
        student = Shape.of(named.shapes["student"])
        needed = disk.disk(student, config.training, config.student.lora, data=config.data, runs=runs)
        disk.require_disk(Path(config.output_dir), needed)


def _text_settings(
    config: RunConfig,
    named: Named,
    length: int,
    *,
    conversations: bool,
    today: date | None,
) -> TextSettings:
    """Return what a pair needs to know of a run's text, cut into windows of this length."""
    of_teachers = named_models.teachers_by_role(config).values()
    return TextSettings(
        max_length=length,
        conversations=conversations,
        learn_from=config.data.learn_from,
        learn_reasoning=config.data.reasoning != "read",
        rows=named.rows,
        decoder_starts=named.decoder_starts,
        text_starts=(config.student.text_start, *(model.text_start for model in of_teachers)),
        today=today or conversation_date.choose(config).day,
        cache_dir=cache_dir() / "vocabularies",
        isolate_documents=config.data.isolate_documents,
    )


def template_variables(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the values for the variables of chat templates, by role."""
    return {
        "student": template_values(config.student.chat_template_kwargs),
        "teacher": template_values(config.teacher.chat_template_kwargs),
    }


def read_material(config: RunConfig, method: Method, named: Named, today: date | None) -> Material:
    """Read the text and cut it into windows; what of it is left out, or looks wrong, is logged."""
    length = loading.window_length(config.data.max_length, named.shapes.values())
    with value_errors_are_the_users(), documents.errors_name_their_document(config.data):
        teachers_for = {route for routes_of_one in config.routes_of_teachers for route in routes_of_one}
        routes = Routes(teachers_for, config.route_column) if teachers_for else None
        beginning = read_beginning(config.data, config.training.seed) if config.data.streaming else None
        corpus = beginning.corpus if beginning else documents.load_documents(config.data, routes)

        # Only the text tells whether chat templates are needed.
        tokenizers = named.tokenizers
        if corpus.conversations and named.decoder_starts is None:
            tokenizers, notes = method.chat_tokenizers(tokenizers, template_variables(config))
            for note in notes:
                log.warning("%s", note)

        text = _text_settings(config, named, length, conversations=corpus.conversations, today=today)
        pair = method.join(tokenizers, text)
        for note in pair.encoder.notes(corpus.train):
            log.warning("%s", note)

        # Windows are kept on disk under a hash of all that they depend on, so a second run does not cut them again.
        room = Room(length, pair.encoder.least_length)
        packing = {
            "encode": pair.encoder.windows,
            "fingerprint": pair.encoder.fingerprint,
            "num_proc": config.data.num_workers or None,
            "room": room,
        }
        # Documents that are for different teachers must not share a window.
        make = make_windows if routes is None else partial(make_windows_by_route, routes=routes)
        windows = make(corpus.train, kind="training", **packing)
        held_out = make(corpus.eval, kind="held-out", **packing)

    stream = None
    if beginning is not None:
        stream = StreamSetUp(beginning, pair.encoder.windows, windows.features, pair.encoder.fingerprint)
    material = Material(corpus, pair, windows, held_out, stream)
    _log_material(config, named, material, room)
    return material


def _log_material(config: RunConfig, named: Named, material: Material, room: Room) -> None:
    """Log what of the text is left out, once, where it can still be put right."""
    corpus, pair, windows, held_out = material.corpus, material.pair, material.windows, material.held_out
    for role, table in zip(named.shapes, pair.encoder.tables, strict=True):
        if table.beyond_rows:
            left_out = ", ".join(table.beyond_rows)
            log.info("%s: no row of its head for %s, which no text yields: left out", role, left_out)
    where = "documents"
    if material.stream is not None:
        where = "documents at the beginning of the stream"
        _log_stream(config)
    log.info("%s: %s", where, corpus_in_words(corpus.report))

    for kind, texts, cut in (("training", corpus.train, windows), ("held-out", corpus.eval, held_out)):
        warn_of_left_out(cut, kind)
        warn_of_missing(config.data, kind, texts, cut, room)
    documents.warn_of_long_documents(corpus, windows, held_out)

    asked, most = config.evaluation.generation, len(corpus.eval)
    if most < asked:
        log.info("written text: each model writes %d texts, one for each held-out document, not %d", most, asked)


def _log_stream(config: RunConfig) -> None:
    """Log how a stream is shuffled, mixed and cleaned of repeats."""
    data = config.data
    weights = "in turn" if data.mixture is None else ", ".join(f"{name} {x:g}" for name, x in data.mixture.items())
    log.info("stream: shuffled in blocks of %.3g MB of text; sources: %s", data.block_bytes / 1e6, weights)
    if data.deduplicate:
        size = RecentTexts(data.remembered_documents).size
        log.info(
            "stream: repeats are looked for among the last %s documents or more, in %.1f MB of memory; up to %g %% of "
            "new documents are taken for repeats",
            f"{data.remembered_documents:,}",
            size / 1e6,
            100 * ERROR,
        )


def corpus_in_words(report: Mapping[str, int]) -> str:
    """Return how many documents there are to learn from and to measure on, and why others are left out."""
    words = [
        f"{report['train']:,} to learn from ({report['train_bytes'] / 1e6:.2f} MB)",
        f"{report['eval']:,} held out ({report['eval_bytes'] / 1e6:.2f} MB)",
    ]
    reasons = {"empty": "empty", "duplicate": "seen before", "in_eval": "in the held-out text too"}
    for name, reason in reasons.items():
        if report.get(name):
            words.append(f"{report[name]:,} left out ({reason})")
    return ", ".join(words)


def text_starts(config: RunConfig, pair: Pair) -> dict[str, TextStart]:
    """Return what each model reads before a text, and behind which tokens it is worth measuring a plain one."""
    starts = {}
    # Of several teachers the first; each of the others is measured in a part of the job.
    tables, ids_of_sides = pair.encoder.tables[:2], pair.encoder.starts[:2]
    for role, table, ids in zip(("student", "teacher"), tables, ids_of_sides, strict=True):
        # A model with random weights has no opinion on how a text starts.
        is_untrained = role == "student" and config.student.init == "random"
        is_plain = pair.encoder.prompt is None
        candidates = table.start_candidates if is_plain and not is_untrained else ()
        starts[role] = TextStart(ids, candidates)
    return starts


def identity(config: RunConfig, accelerator: Accelerator, material: Material, held_out: HeldOut) -> dict[str, Any]:
    """Return what a checkpoint must have been made from to be continued, but for the models' weights."""
    encoder = material.pair.encoder
    stream = material.stream
    text = documents.corpus_fingerprint(material.corpus.train) if stream is None else stream.beginning.fingerprint
    # Rows with another value in the column of routes make other windows of the same text.
    routes = material.corpus.routes
    if routes is not None:
        text += routes.fingerprint(map(documents.document_name, material.corpus.train))

    facts: Mapping[str, Any] = {
        **resume_rules.identity(to_plain(config)),
        "training_text": text,
        "held_out_windows": windows_fingerprint(held_out.windows),
        "tokenizers_and_length": encoder.fingerprint,
        "mixed_precision": accelerator.mixed_precision,
    }
    # Only where a template writes the date does the day belong to what is continued.
    if encoder.day is None:
        return dict(facts)
    return {**facts, conversation_date.IDENTITY: str(encoder.day)}
