"""Checks of a run's text, models, memory and disk, before anything is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from .. import files
from ..advice import reason
from ..config.plain import to_plain
from ..config.protocols import RunConfig
from ..config.settings import ModelConfig, StudentConfig
from ..config.unused_settings import unused_settings
from ..data import delivery
from ..data import documents as text_documents
from ..data.batch_order import permutation
from ..data.stream.beginning import load_corpus
from ..data.windows import IN_MEMORY_BYTES
from ..errors import UserError
from ..evaluation.comparability import MOST_UNSPELT
from ..forecast import disk as disk_forecast
from ..forecast import model_size, step_memory
from ..interfaces import Job
from ..machine import hardware
from ..pretrained import loading, locate, model_folders, precision
from ..pretrained.named import teachers_by_role
from ..pretrained.teacher import with_spare_gpu
from ..run import folder as run_folder
from ..seeding import seed_everything
from .checklist import Measured

MOST_WINDOWS = 4_000
"""Windows that go through the loader at most."""
LEAST_COVERAGE = 0.5
"""Share of student positions with an anchor, below which KD teaches little."""
REPRESENTATIVE = 2
"""Layers of a model that a fresh one is built with: enough to see how its loss starts."""
LARGEST_BUILT = 2e8
"""Parameters; larger models are not loaded or built for a check."""
ROUTED_WINDOWS = 8
"""Windows of the text that calibrate a router, and as many others on which it is measured then."""


@dataclass(frozen=True)
class SetUp:
    """The start of a run: its settings, and the sizes of its models and its text."""

    config: RunConfig
    student: PretrainedConfig
    teachers: Mapping[str, PretrainedConfig]
    """By role: `teacher`, and `teacher_2` and so on where there are several; none where nothing is distilled."""
    text_bytes: int
    """Size of the training text."""
    chunk_rows: step_memory.ChunkRows
    built_later: frozenset[str] = frozenset()
    """Names of models that the first run builds."""

    @property
    def loaded(self) -> dict[str, PretrainedConfig]:
        """Models whose weights are loaded here, by role: all but teachers elsewhere."""
        settings = teachers_by_role(self.config)
        here = {role: shape for role, shape in self.teachers.items() if not settings[role].is_elsewhere}
        return {"student": self.student, **here}

    @cached_property
    def whole_student(self) -> PretrainedConfig:
        """The model that the student's layers come from: its own, or a bigger one."""
        settings = self.config.student
        return self.student if settings.layers is None else loading.load_config(settings.name, "student")

    @property
    def limits(self) -> dict[str, float]:
        """Tokens that each of these models reads at once."""
        return {role: loading.context_length(shape) for role, shape in self.loaded.items()}

    @property
    def window(self) -> int:
        """Tokens per window."""
        return int(min(self.config.data.max_length, *self.limits.values()))


def _batch_size(config: RunConfig) -> int:
    """Return the windows of a micro-batch; the checks put a number in the place of `auto` before anything else."""
    return config.training.batch_size  # type: ignore[return-value]


def settings_read(setup: SetUp) -> Measured:
    """Look for settings that somebody has set and nothing reads in this run."""
    lines = unused_settings(setup.config)
    return Measured(
        "; ".join(lines) or "each that is set has an effect",
        "no effect only where it is meant so",
        passed=True,
        doubtful=bool(lines),
    )


# ---------------------------------------------------------------------------------------------- text


def duplicates(job: Job) -> Measured:
    """Pass windows through the loader, for one process and for two, and count those that are repeated or missing."""
    # Two processes share every step, which is where windows can be repeated or lost.
    windows = job.windows.select(range(min(len(job.windows), MOST_WINDOWS)))
    deliveries = [
        delivery.delivery(
            windows,
            micro_batch=_batch_size(job.config),
            num_workers=job.config.data.num_workers,
            processes=processes,
        )
        for processes in (1, 2)
    ]

    repeated = max(one.repeated for one in deliveries)
    missing = max(one.missing for one in deliveries)
    identical = max(one.identical for one in deliveries)
    expected = deliveries[0].expected
    share = repeated / max(expected, 1)
    return Measured(
        f"{share:.0%} of {expected} windows: {repeated} repeated, {missing} missing, {identical} identical",
        "0 %; identical text at most 1 %",
        passed=repeated == 0 and missing == 0 and identical <= expected / 100,
    )


def documents(job: Job) -> Measured:
    """Look for texts that were read as one document although they are many."""
    # Conversations are one a row by their format; plain text may have any separator, or none.
    corpus = load_corpus(job.config.data, job.config.training.seed)
    if corpus.conversations:
        return Measured(f"{len(corpus.train):,} conversations to learn from", "one a row", passed=True)

    sides = text_documents.document_sizes(corpus, job.windows, job.held_out.windows)
    value = "; ".join(f"{kind}: {sizes}" for kind, sizes in sides.items())
    is_doubtful = any(sizes.is_doubtful for sizes in sides.values())
    if is_doubtful:
        value += text_documents.uncut_marker(chain(corpus.train, corpus.eval))
    return Measured(value, text_documents.DOCUMENTS_EXPECTED, passed=True, doubtful=is_doubtful)


def leakage(job: Job) -> Measured:
    """Look for text of the evaluation in the training text, by content and by the documents in the windows."""
    corpus = load_corpus(job.config.data, job.config.training.seed)
    share = text_documents.leakage(corpus.train, corpus.eval)

    # Two faults: equal content in both texts, and one document whose windows are on both sides.
    in_both = _document_names(job.windows) & _document_names(job.held_out.windows)
    repeated = corpus.report["duplicate"]
    held_out = corpus.report["in_eval"]
    return Measured(
        f"{share:.0%} of {len(corpus.eval)} documents, {len(in_both)} in windows of both sides; "
        f"{repeated} repeated and {held_out} held-out ones left out while reading",
        "0 %",
        passed=share == 0 and not in_both,
    )


def _document_names(windows: Any) -> set[str]:
    """Return the names of all documents whose text is in some windows."""
    return {name for row in windows["documents"] for name in row.split(",")}


def coverage(job: Job) -> Measured:
    """Measure the share of student positions that learn from the teacher."""
    totals = job.held_out.coverage()
    positions = totals["lm"]
    anchored = totals["kd"] / max(positions, 1)
    at_depth_0 = totals["depth0"] / max(positions, 1)
    return Measured(
        f"{anchored:.1%} of {positions} positions have an anchor, {at_depth_0:.1%} at depth 0",
        f"{LEAST_COVERAGE:.0%} or more",
        passed=anchored >= LEAST_COVERAGE,
    )


def spelt_text(job: Job, sides: Sequence[str]) -> Measured:
    """Measure how many bytes of the text the tokens of each side leave out."""
    shares = {side: share for side, share in job.held_out.unspelt_shares().items() if side in sides}
    return Measured(
        ", ".join(f"{side} leaves out {share:.1%} of the bytes" for side, share in shares.items()),
        f"{MOST_UNSPELT:.0%} or less",
        passed=max(shares.values()) <= MOST_UNSPELT,
    )


# -------------------------------------------------------------------------------------------- models


def models(setup: SetUp) -> Measured:
    """Look for the weights of the models, and load those that are small enough."""
    teachers = teachers_by_role(setup.config)
    settings: dict[str, ModelConfig | StudentConfig] = {"student": setup.config.student, **teachers}
    shapes = setup.loaded
    # A student that starts at random needs no weights.
    if setup.config.student.init == "random":
        del shapes["student"]

    notes = [note for role in setup.teachers if (note := _place_elsewhere(role, teachers[role]))]
    missing: list[str] = []
    for role, shape in shapes.items():
        model = settings[role]
        if model.name in setup.built_later:
            notes.append(f"{role} is built by the first run")
            continue

        can_be_loaded, note = _examine_weights(role, model, shape)
        if can_be_loaded:
            notes.append(note)
        else:
            missing.append(note)

    value = "; ".join(missing + notes)
    return Measured(value or "random start, no teacher", "weights are there", passed=not missing)


def _place_elsewhere(role: str, model: ModelConfig) -> str | None:
    """Return where a teacher is whose weights are not loaded here."""
    if model.is_served:
        return f"{role} is behind a server, which a run looks at first"
    if model.is_captured:
        return f"{role} is of captures, which fit its tokenizer"
    return None


def _examine_weights(role: str, model: ModelConfig | StudentConfig, shape: PretrainedConfig) -> tuple[bool, str]:
    """Load a small model, and look at the folder of a large one; returns (it can be loaded, a note about it)."""
    # Loading is the sure test, but takes too long for a large model, of which only the files are looked at.
    folder = Path(locate.locate(model.name, role))
    is_here = folder.is_dir()
    if is_here and not too_large(shape):
        loading.load_model(model.name, role, torch.float32, allow_pickle=model.allow_pickle)
        return True, f"{role} loads"

    if is_here and (problem := model_folders.wrong_weights(folder)):
        return False, f"{role} {model.name}: {problem}"
    if is_here and not model_folders.has_weights(folder, model.allow_pickle):
        return False, f"{role} has no weights in {folder}"

    millions = model_size.Shape.of(shape).parameters / 1e6
    return True, f"{role} of {millions:,.0f} M parameters, weights not read"


def too_large(config: PretrainedConfig) -> bool:
    """Return True if a model is too large to be built or loaded for a check."""
    return model_size.Shape.of(config).parameters > LARGEST_BUILT


def build_shallow(setup: SetUp, shapes: Mapping[str, PretrainedConfig]) -> dict[str, nn.Module]:
    """Build models with few layers and random weights.

    Args:
        shapes: role -> config.

    Returns:
        role -> model; without those whose embeddings alone are too large.
    """
    seed_everything(setup.config.training.seed)

    models = {}
    for role, whole in shapes.items():
        shape = model_size.shallow(whole, REPRESENTATIVE)
        if not too_large(shape):
            models[role] = loading.random_model(shape)
    return models


def router_obstacle(setup: SetUp) -> str | None:
    """Return why the router of this pair is not measured; None if it can be."""
    if setup.config.teacher.name in setup.built_later:
        return "the teacher is built by the first run"
    if too_large(setup.whole_student) or too_large(setup.teachers["teacher"]):
        return "a model is too large to be loaded for a check"

    dtypes = {setup.config.teacher.dtype, setup.config.student.lora.base}
    if dtypes & {*precision.QUANTISED}:
        return "this check computes on the CPU, quantised weights do not"
    return None


class RouterBatches(NamedTuple):
    calibration: list[Any]
    measured: list[Any]
    windows: int
    """Windows of each of the two lists, where the text has as many."""


def router_batches(job: Job) -> RouterBatches:
    """Draw batches of the training text: some to calibrate a router on, and as many others to measure it on."""
    training = job.config.training
    size = min(_batch_size(job.config), ROUTED_WINDOWS)
    count = ROUTED_WINDOWS // size

    # A random order, that of the run's first epoch.
    order = permutation(len(job.windows), training.seed, 0).tolist()
    starts = range(0, len(order), size)
    batches = []
    for start in starts[: 2 * count]:
        numbers = order[start : start + size]
        batches.append(job.collate([job.windows[number] for number in numbers]))

    # A text too short for two lists is measured on windows that it was calibrated on.
    return RouterBatches(batches[:count], batches[-count:], count * size)


# ------------------------------------------------------------------------------- window, memory, disk


def window_length(setup: SetUp) -> Measured:
    """Compare the tokens of a window with those that the models read at once."""
    limits = ", ".join(f"{role} {limit}" for role, limit in setup.limits.items())
    return Measured(
        f"{setup.window} tokens ({setup.config.data.max_length} asked for; read at once: {limits})",
        "8 or more",
        passed=setup.window >= 8,
    )


def memory(setup: SetUp) -> Measured:
    """Compare the forecast of memory with what is free on the device."""
    return _forecast_or_reason(_memory, setup)


def _memory(setup: SetUp) -> Measured:
    """Forecast the memory of a step."""
    device = hardware.choose_device().value
    training = setup.config.training
    setting = step_memory.StepSetting(
        setup.student,
        tuple(setup.teachers.values()),
        setup.window,
        precision=hardware.choose_precision(training.mixed_precision, device).value,
        device=device,
        chunk_rows=setup.chunk_rows,
    )
    config, spare = with_spare_gpu(setup.config, device, processes=1)
    demand = step_memory.demand_of(config, setting)

    # With a complete cache the teacher is not loaded at all.
    spares_teacher = step_memory.spares_teacher(setup.config)
    parts = replace(demand, apart=demand.apart or spares_teacher).memory(_batch_size(setup.config))
    condition = ", if the teacher cache is complete" if spares_teacher else ""
    if spare is not None:
        condition += f", if one process trains: the teacher is then on {config.teacher.device}"

    free = hardware.free_memory(device)
    return Measured(
        f"about {disk_forecast.largest(parts)} on {device}{condition}",
        f"{free / 2**30:.3g} GiB free",
        passed=sum(parts.values()) <= free,
    )


def disk(setup: SetUp) -> Measured:
    """Compare the forecast of what a run writes with what is free on the disk."""
    return _forecast_or_reason(_disk, setup)


def _disk(setup: SetUp) -> Measured:
    """Forecast the space of checkpoints, windows and exports."""
    config = setup.config
    parts = disk_forecast.disk(
        model_size.Shape.of(setup.student),
        config.training,
        config.student.lora,
        data=config.data,
        text_bytes=setup.text_bytes,
        runs=1 + config.compares_without_teacher,  # the comparison keeps checkpoints of its own
        in_memory=IN_MEMORY_BYTES,
    )

    free = files.free_disk(Path(config.output_dir))
    return Measured(
        f"about {disk_forecast.largest(parts)}",
        f"{free / 2**30:.3g} GiB free",
        passed=sum(parts.values()) <= free,
    )


def _forecast_or_reason(forecast: Callable[[SetUp], Measured], setup: SetUp) -> Measured:
    """Return a forecast, or why there is none, which keeps no run from its start."""
    try:
        return forecast(setup)
    except UserError:
        raise
    except Exception as error:
        return Measured(f"no forecast, because of {reason(error)}", "what is free", passed=True)


def output_directory(setup: SetUp) -> Measured:
    """Try to write into the output folder, without leaving anything in it."""
    folder = Path(setup.config.output_dir)
    # The trial makes the folder and those above it, and none of them may stay.
    new_folders = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        run_folder.check(folder, to_plain(setup.config), setup.config.resume)
    finally:
        for path in new_folders:
            if path.is_dir():
                path.rmdir()
    return Measured(f"{folder} can be written to", "writable, of no other run", passed=True)
