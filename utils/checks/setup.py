"""Checks of a machine and of a run's set-up, before anything is trained.

What trains tiny models is in rehearsal.py, what needs the losses in verify_fixes.py.

`job` below is what a run is prepared to: `windows` to train on, `held_out` text, and its `config`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from .. import files
from ..advice import reason
from ..config.plain import to_plain
from ..data import delivery
from ..data import documents as data
from ..data import windows as windows_module
from ..errors import UserError
from ..evaluation.comparability import MOST_UNSPELT
from ..forecast import disk as forecast
from ..forecast import model_size
from ..forecast import step_memory as plan_memory
from ..machine import hardware
from ..machine import hardware as hardware_module
from ..pretrained import loading as pretrained
from ..pretrained import locate, model_folders
from ..run import folder as run_folder
from .checklist import DOUBTFUL, check

MOST_WINDOWS = 4_000
"""So many windows go through the loader."""
LEAST_COVERAGE = 0.5
"""Share of student positions with an anchor, below which KD teaches little."""
REPRESENTATIVE = 2
"""Layers of a student that a fresh one is built with: enough to see how its loss starts."""
LARGEST_BUILT = 2e8
"""Parameters; larger models are not loaded or built for a check."""

# ------------------------------------------------------------------------------------------- machine


# ---------------------------------------------------------------------------------------- evaluation


# ---------------------------------------------------------------------------------------------- text


@check("duplicates", "the loader repeats or drops windows; or texts repeat: set data.deduplicate=true")
def duplicates(job: Any) -> tuple:
    windows = job.windows.select(range(min(len(job.windows), MOST_WINDOWS)))
    settings = job.config
    found = [
        delivery.delivery(
            windows, micro_batch=settings.training.batch_size, num_workers=settings.data.num_workers, processes=count
        )
        for count in (1, 2)
    ]
    counts = {name: max(getattr(d, name) for d in found) for name in ("repeated", "missing", "identical")}
    share = counts["repeated"] / max(found[0].expected, 1)
    named = ", ".join(f"{count} {name}" for name, count in counts.items())
    right = not counts["repeated"] and not counts["missing"] and counts["identical"] <= found[0].expected / 100
    return f"{share:.0%} of {found[0].expected} windows: {named}", "0 %; identical text at most 1 %", right


@check("documents", data.DOCUMENTS_REMEDY)
def documents(job: Any) -> tuple:
    corpus = data.load_documents(job.config.data)
    if corpus.conversations:
        return f"{len(corpus.train):,} conversations to learn from", "one a row", True

    sides = data.document_sizes(corpus, job.windows, job.held_out.windows)
    value = "; ".join(f"{kind}: {sizes}" for kind, sizes in sides.items())
    is_doubtful = any(sizes.is_doubtful for sizes in sides.values())
    if is_doubtful:
        return value + data.uncut_marker([*corpus.train, *corpus.eval]), data.DOCUMENTS_EXPECTED, DOUBTFUL
    return value, data.DOCUMENTS_EXPECTED, True


@check("leakage", "text of the evaluation is trained on: its figures would be too good. Give other --eval-data")
def leakage(job: Any) -> tuple:
    corpus = data.load_documents(job.config.data)
    share = data.leakage(corpus.train, corpus.eval)
    sides = (job.windows, job.held_out.windows)
    trained, held_out = ({name for row in side["documents"] for name in row.split(",")} for side in sides)
    both = len(trained & held_out)
    dropped = (
        f"{corpus.report['duplicate']} repeated and {corpus.report['in_eval']} held-out ones left out while reading"
    )
    value = f"{share:.0%} of {len(corpus.eval)} documents, {both} in windows of both sides; {dropped}"
    return value, "0 %", share == 0 and not both


@check("alignment coverage", "the tokenizers share few boundaries, so KD reaches little text; choose a closer pair")
def coverage(job: Any) -> tuple:
    totals = job.held_out.coverage()
    anchored, shallow = (totals[name] / max(totals["lm"], 1) for name in ("kd", "depth0"))
    value = f"{anchored:.1%} of {totals['lm']} positions have an anchor, {shallow:.1%} at depth 0"
    return value, f"{LEAST_COVERAGE:.0%} or more", anchored >= LEAST_COVERAGE


@check("text in tokens", "the tokens leave text out, so bits per byte do not compare; choose a byte-level tokenizer")
def spelt_text(job: Any, sides: Sequence[str]) -> tuple:
    shares = {side: share for side, share in job.held_out.unspelt_shares().items() if side in sides}
    value = ", ".join(f"{side} leaves out {share:.1%} of the bytes" for side, share in shares.items())
    return value, f"{MOST_UNSPELT:.0%} or less", max(shares.values()) <= MOST_UNSPELT


# -------------------------------------------------------------------------------------------- set-up


@dataclass(frozen=True)
class SetUp:
    """What a run would start from."""

    config: Any
    """The junction's RunConfig."""
    student: PretrainedConfig
    teacher: PretrainedConfig | None
    text_bytes: int
    """Of the training text."""
    chunk_rows: plan_memory.ChunkRows
    built_later: frozenset[str] = frozenset()
    """Names of models that the first run builds."""

    @property
    def window(self) -> int:
        """Tokens per window."""
        shapes = [shape for shape in (self.student, self.teacher) if shape is not None]
        return int(min(self.config.data.max_length, *map(pretrained.context_length, shapes)))


@check("models", "give folders or hub ids that hold weights; --student-init random needs none")
def models(setup: SetUp) -> tuple:
    config, found, missing = setup.config, [], []
    wanted = [("student", config.student, setup.student)] if config.student.init == "pretrained" else []
    wanted += [("teacher", config.teacher, setup.teacher)] if setup.teacher else []
    for role, model, shape in wanted:
        name, pickled = model.name, model.allow_pickle
        if name in setup.built_later:
            found.append(f"{role} is built by the first run")
            continue
        folder = Path(locate.locate(name, role))
        if folder.is_dir() and not too_large(shape):
            pretrained.load_model(name, role, torch.float32, allow_pickle=pickled)
            found.append(f"{role} loads")
        elif folder.is_dir() and (why := model_folders.wrong_weights(folder)):
            missing.append(f"{role} {name}: {why}")
        elif folder.is_dir() and not model_folders.has_weights(folder, pickled):
            missing.append(f"{role} has no weights in {folder}")
        else:
            found.append(f"{role} of {model_size.Shape.of(shape).parameters / 1e6:,.0f} M parameters, weights not read")
    return "; ".join(missing + found) or "random start, no teacher", "weights are there", not missing


def too_large(config: PretrainedConfig) -> bool:
    """Whether a model is too large to be built or loaded for a check."""
    return model_size.Shape.of(config).parameters > LARGEST_BUILT


@check("window length", "raise --max-length, or choose models that read more at once")
def window_length(setup: SetUp) -> tuple:
    limits = [f"student reads {pretrained.context_length(setup.student)}"]
    limits += [f"teacher {pretrained.context_length(setup.teacher)}"] if setup.teacher else []
    asked = setup.config.data.max_length
    return f"{setup.window} tokens ({asked} asked for, {', '.join(limits)})", "8 or more", setup.window >= 8


@check("memory", "lower --batch-size (and raise --gradient-accumulation-steps), lower --max-length, or smaller models")
def memory(setup: SetUp) -> tuple:
    return _forecast_or_reason(_memory, setup)


def _memory(setup: SetUp) -> tuple:
    device, training = hardware.choose_device().value, setup.config.training
    mixed = hardware.choose_precision(training.mixed_precision, device).value
    setting = plan_memory.StepSetting(
        setup.student, setup.teacher, setup.window, precision=mixed, device=device, chunk_rows=setup.chunk_rows
    )
    demand = plan_memory.demand_of(setup.config, setting)
    spared = plan_memory.spares_teacher(setup.config)
    parts = replace(demand, apart=demand.apart or spared).memory(training.batch_size)
    free = hardware_module.free_memory(device)
    value = f"about {forecast.largest(parts)} on {device}{', if the teacher cache is complete' if spared else ''}"
    return value, f"{free / 2**30:.3g} GiB free", sum(parts.values()) <= free


@check("disk", "free some space, choose another --output-dir, or lower training.keep_checkpoints")
def disk(setup: SetUp) -> tuple:
    return _forecast_or_reason(_disk, setup)


def _disk(setup: SetUp) -> tuple:
    parts = forecast.disk(
        model_size.Shape.of(setup.student),
        setup.config.training,
        setup.config.student.lora,
        text_bytes=setup.text_bytes,
        runs=1 + setup.config.evaluation.without_teacher,
        in_memory=windows_module.IN_MEMORY_BYTES,
    )
    free = files.free_disk(Path(setup.config.output_dir))
    return f"about {forecast.largest(parts)}", f"{free / 2**30:.3g} GiB free", sum(parts.values()) <= free


def _forecast_or_reason(forecast_of: Callable[[SetUp], tuple], setup: SetUp) -> tuple:
    """A forecast; or why there is none, which keeps no run from its start."""
    try:
        return forecast_of(setup)
    except UserError:
        raise
    except Exception as error:
        return f"no forecast, because of {reason(error)}", "what is free", True


@check("output directory", "choose another --output-dir")
def output_directory(setup: SetUp) -> tuple:
    folder = Path(setup.config.output_dir)
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        run_folder.check(folder, to_plain(setup.config), setup.config.resume)
    finally:
        for path in made:
            if path.is_dir():
                path.rmdir()
    return f"{folder} can be written to", "writable, of no other run", True
