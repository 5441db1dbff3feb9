"""Configuration: frozen dataclasses, and how YAML and flags become one with every mistake reported at once.

Defaults live in the dataclasses and nowhere else. `build` works for any tree of dataclasses, so
`train.py` can join the ones below with those of the other tower.
"""

import dataclasses
import difflib
import json
import logging
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import InstanceOf, TypeAdapter, ValidationError

from ..errors import UserError
from ..paths import user_path
from .error_messages import describe, dotted, shown
from .validation import Validated

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs"

CHANGEABLE = ("curriculum.", "loss.", "training.max_grad_norm", "training.patience")
"""Settings, or beginnings of their keys, that a run can be continued with otherwise if that is asked for: they weigh
what is learned from, and nothing in a checkpoint was cut or sized by them."""

DESCRIBED_BY = {
    "data.train": (
        "data.eval",
        "data.split",
        "data.text_column",
        "data.messages_column",
        "data.prompt_column",
        "data.completion_column",
        "data.document_separator",
        "data.document_start",
        "data.max_documents",
        "data.train_only",
    ),
    "teacher.name": ("teacher.allow_pickle",),
    "student.name": ("student.allow_pickle", "student.lora.targets"),
}
"""Setting that names a text or a model -> settings that say how that one is read. They go with it: where a command line
replaces the name that a recipe has, they are no longer those of the recipe. How is learned stays: from random weights
or trained ones, what of a conversation, the share that is held out, lengths, precision, the rank of an adapter."""

# An instance, for a name of a file may hold bytes that are no UTF-8. Python writes them as lone surrogates, and
# pydantic takes no string that has any.
Name = Annotated[InstanceOf[str], MinLen(1)]
"""Of a model, a text, a file or a folder."""

HowTextIsRead = Literal[
    "text_column",
    "messages_column",
    "prompt_column",
    "completion_column",
    "document_separator",
    "document_start",
]
"""Settings of `data` that say how the documents of a text are read, of the training text and the evaluation text."""

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig(Validated):
    """The teacher."""

    name: Name | None = None
    """Hub id or local folder; null trains without a teacher (kd and span must then weigh 0)."""
    dtype: Literal["auto", "float32", "float16", "bfloat16", "8bit", "4bit"] = "auto"
    """Precision of the frozen weights; auto: what the device computes fastest without loss of range. 8bit and 4bit
    need an NVIDIA GPU and bitsandbytes."""
    device: str = "auto"
    """auto: the student's; cpu, or a GPU of its own such as cuda:1, where it works one step ahead of the student; its
    layers spread over all GPUs, or sharded over all processes."""
    allow_pickle: bool = False
    """Also take weights that are only there as pickle files (.bin); safetensors cannot carry code, they can."""
    text_start: str | None = None
    """Token that plain text starts with, such as `<|endoftext|>`; null: the start of text that the tokenizer itself
    puts there, else the token that separates texts. The log tells which, and how likely the model finds a text behind
    it."""


@dataclass(frozen=True)
class LoraConfig(Validated):
    """A student whose weights are frozen, with a trained low-rank adapter beside them."""

    enabled: bool = False
    """Train and save an adapter instead of the weights."""
    rank: Annotated[int, Gt(0)] = 16
    """Rank of the two factors of each layer's change."""
    alpha: Annotated[float, Gt(0)] = 32.0
    """The change is scaled by alpha / rank."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Of what enters the adapter."""
    targets: Annotated[list[str], MinLen(1)] = field(default_factory=lambda: ["all-linear"])
    """Names of the layers that get one, such as q_proj and v_proj; all-linear: every linear layer but the head."""
    base: Literal["auto", "float32", "float16", "bfloat16", "4bit"] = "auto"
    """Precision of the frozen weights, as the teacher's. The adapter is float32."""
    merge: bool = False
    """Export a plain model with the adapter added to its weights, not the adapter alone."""


@dataclass(frozen=True)
class StudentConfig(Validated):
    """The student. What is trained of it is float32 whatever the precision of the computation."""

    name: Name | None = None
    """Hub id or local folder."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: only config.json and the tokenizer are taken from `name`; weights are drawn from the seed."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """An adapter in place of the weights."""
    allow_pickle: bool = False
    """As for the teacher."""
    text_start: str | None = None
    """As for the teacher."""


@dataclass(frozen=True)
class DataConfig(Validated):
    """Text to learn from and text to measure on."""

    train: list[Name] = field(default_factory=list)
    """Hub ids (`name` or `name:configuration`), files (.txt .jsonl .parquet .csv) or folders of those."""
    eval: Name | None = None
    """Text to measure on; null: a share of the training documents is held out."""
    text_column: str | None = None
    """Column that holds plain text in tabular sources; null: messages, prompt and completion, or `text`, whichever of
    these columns are there, in this order."""
    messages_column: str = "messages"
    """Column of conversations: lists of messages with `role` and `content`."""
    prompt_column: str = "prompt"
    """Column of what a user asks; together with `completion_column` a conversation of two messages."""
    completion_column: str = "completion"
    """Column of what the assistant answers."""
    learn_from: Literal["completions", "all"] = "completions"
    """What is learned of conversations: what the assistant says, or every message. Of plain text: all."""
    split: str = "train"
    """Split of a hub data set."""
    document_separator: str | None = None
    """String at whose every occurrence a .txt file is cut into documents (backslash-n is a line break); null: lines
    that are `<|endoftext|>` if the file has any, else blank lines."""
    document_start: str | None = None
    """Regular expression: a row or document that matches starts a document, those up to the next one belong to it.
    For texts that come line by line; Wikitext's articles start with `^ = [^=]`."""
    train_only: list[HowTextIsRead] = field(default_factory=list)
    """Settings that describe the training text alone: the text of `eval` is read with their defaults. Where a command
    line replaces the evaluation text of a recipe and not its training text, these are what the recipe says."""
    eval_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05
    """Share of the documents held out when `eval` is null, chosen by a hash of their text."""
    max_length: Annotated[int, Ge(8)] = 512
    """Tokens per window, for each of the two models (capped at their context lengths)."""
    num_workers: Annotated[int, Ge(0)] = 0
    """Processes that prepare batches beside the training process."""
    max_documents: Annotated[int, Gt(0)] | None = None
    """Read at most this many training documents; null: all."""
    deduplicate: bool = True
    """Drop documents whose text occurred before."""


@dataclass(frozen=True)
class TrainingConfig(Validated):
    """The loop."""

    batch_size: Annotated[int, Gt(0)] | Literal["auto"] = 2
    """Windows per forward pass and process; auto: as many as fit into memory, by the forecast."""
    gradient_accumulation_steps: Annotated[int, Gt(0)] = 8
    """Forward passes per optimizer step; with `batch_size: auto` windows per optimizer step and process."""
    epochs: Annotated[int, Gt(0)] = 1
    """Passes over the training windows."""
    max_steps: Annotated[int, Gt(0)] | None = None
    """Optimizer steps in total; replaces `epochs`, the windows are repeated as often as needed."""
    learning_rate: Annotated[float, Gt(0)] = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """Decoupled weight decay; not applied to biases and norms."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    warmup_ratio: Annotated[float, Ge(0), Le(1)] = 0.03
    """Share of the optimizer steps over which the learning rate rises from 0."""
    scheduler: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls to 0 after warm-up."""
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients are scaled down to at most this norm."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Precision of the student's computation; auto: chosen from the hardware, with the reason logged."""
    gradient_checkpointing: bool = False
    """Compute the student's layers a second time in the backward pass instead of keeping what it needs of them: less
    memory, one more forward pass, the same gradients."""
    deterministic: bool = False
    """Only kernels that compute the same bits every time. On a GPU several of the fast ones do not: a run that is
    repeated or continued then differs by rounding. On a CPU all do."""
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 42
    """Seed of initialisation, data order and dropout."""
    max_hours: Annotated[float, Gt(0)] | None = None
    """Wall-clock limit: stop at a step boundary, save, evaluate, export."""
    save_every: Annotated[int, Gt(0)] = 200
    """Optimizer steps between checkpoints."""
    keep_checkpoints: Annotated[int, Gt(0)] = 2
    """Newest checkpoints that are kept."""
    patience: Annotated[int, Ge(0)] = 0
    """Stop after this many evaluations in a row without fewer bits per byte; 0: never."""


@dataclass(frozen=True)
class EvaluationConfig(Validated):
    """What is measured on the held-out text."""

    every: Annotated[int, Ge(0)] = 0
    """Optimizer steps between evaluations; 0: only before and after training."""
    max_windows: Annotated[int, Gt(0)] | None = 256
    """Windows of held-out text that are scored; null: all."""
    samples: Annotated[int, Ge(0)] = 3
    """Continuations shown side by side in the report."""
    prompt_tokens: Annotated[int, Gt(0)] = 24
    """Length of their prompts, in student tokens."""
    new_tokens: Annotated[int, Gt(0)] = 48
    """Length of the continuations, in tokens of the model that writes them."""
    without_teacher: bool = False
    """Also train the same student, on the same batches for the same steps, without the teacher, and compare."""
    tasks: list[str] = field(default_factory=list)
    """Tasks or groups of lm_eval, measured after training on teacher, student and, if it had weights, its beginning."""
    tasks_path: Name | None = None
    """Folder with tasks of your own, in lm_eval's YAML form."""
    tasks_limit: Annotated[int, Gt(0)] | None = None
    """First documents of each task that are scored; null: all."""


@dataclass(frozen=True)
class CacheConfig(Validated):
    """What the teacher says, kept on disk: computed once, read by later epochs and runs."""

    folder: Name | None = None
    """Folder of the cache; null: the teacher runs in every step."""
    build_only: bool = False
    """Build the cache and stop, without a student."""
    top_k: Annotated[int, Gt(0)] | Literal["adaptive"] = 64
    """Teacher tokens kept per position, in place of loss.top_k; adaptive: the fewest that hold 99.9 % of the mass, at
    most 256."""
    storage: Literal["compact", "float32"] = "compact"
    """compact: log-probabilities in 6 to 16 bits; float32: exactly as the teacher says them."""
    accept_mismatch: bool = False
    """Use the cache although it was built from another text or by another teacher; no matter what that does."""

    def __post_init__(self) -> None:
        super().__post_init__()

        if self.build_only and self.folder is None:
            raise ValueError("cache.build_only builds a cache in a folder: give --cache-teacher DIR")


@dataclass(frozen=True)
class LoggingConfig(Validated):
    """What is written while training."""

    every: Annotated[int, Gt(0)] = 100
    """Optimizer steps between logged steps."""
    track: list[
        Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]
    ] = field(default_factory=list)
    """Trackers that get every record of metrics.jsonl as well; each needs its package."""
    term_gradients: bool = False
    """Also log the norm of the gradient that each term contributes to the student (for debugging: slow, and takes
    the memory of one gradient per term)."""


@dataclass(frozen=True)
class HubConfig(Validated):
    """The student on the Hugging Face Hub."""

    repository: Name | None = None
    """OWNER/NAME to which it is uploaded after the run; null: none."""
    private: bool = True
    """If the repository does not exist, it is made a private one."""


# ---------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `no` is a word, `1e-4` is a number, a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {', '.join(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What a text can make the loader raise: dates and numbers that are none, brackets without end, bytes of no text."""


def find_config(name_or_path: str) -> Path:
    """The YAML file a user means: a path, or the name of a shipped recipe.

    Raises:
        UserError: there is no such file; the message lists the recipes that exist.
    """
    shipped = {path.stem: path for path in sorted(CONFIG_FOLDER.glob("*.yaml"))}
    for path in (user_path(name_or_path), CONFIG_FOLDER / name_or_path):
        if path.is_file():
            return path
    if name_or_path in shipped:
        return shipped[name_or_path]
    raise UserError(
        f"--config {name_or_path}: no such file and no such recipe.\n"
        f"  expected: a YAML file, or one of {', '.join(shipped) or '(no recipes are installed)'}"
        f"{_did_you_mean(name_or_path, shipped)}"
    )


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        UserError: unreadable, not YAML (with line and column), or not a mapping.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, *NOT_YAML) as error:
        raise UserError(f"{path}: cannot be read as YAML.\n  {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: got {type(values).__name__}, expected a mapping such as `training: {{seed: 1}}`")
    return values


def set_dotted(values: dict[str, Any], assignment: str) -> None:
    """Apply `a.b=value` to nested dicts in place; the value is parsed as YAML.

    Raises:
        UserError: no `=`, an empty key, a value that is not YAML, or a path through something that has no keys.
    """
    key, equals, text = assignment.partition("=")
    parts = key.strip().replace("-", "_").split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {assignment}: expected dotted.key=value, such as --set curriculum.kd.weight=0")
    try:
        value = yaml.load(text, _Loader)
    except NOT_YAML as error:
        raise UserError(f"--set {assignment}: the value cannot be read as YAML.\n  {error}") from error
    for depth, part in enumerate(parts[:-1], start=1):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {assignment}: {'.'.join(parts[:depth])} is {values!r} and has no keys")
    values[parts[-1]] = value


def get_dotted(values: Any, key: str, default: Any = None) -> Any:
    """Return the value of `a.b` in nested dicts, or `default` where there is none."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return default
        values = values[part]
    return values


def drop_descriptions(recipe: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Remove from a recipe what describes a text or a model that is replaced; see `DESCRIBED_BY`.

    Args:
        recipe: nested values, changed in place.
        given: nested values that are laid over it.

    Returns:
        `key value` of each setting that was not the default, and that is not given anew.
    """
    defaults = to_plain({"data": DataConfig(), "teacher": ModelConfig(), "student": StudentConfig()})
    dropped = []
    for name, descriptions in DESCRIBED_BY.items():
        if not _is_replaced(get_dotted(recipe, name), get_dotted(given, name)):
            continue

        for key in descriptions:
            path, _, last = key.rpartition(".")
            section = get_dotted(recipe, path)
            if not isinstance(section, dict) or last not in section:
                continue

            value = section.pop(last)
            is_given_anew = get_dotted(given, key, default=defaults) is not defaults
            if value != get_dotted(defaults, key) and not is_given_anew:
                dropped.append(f"{key} {shown(value)}")
    return dropped


def limit_to_training_text(recipe: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Keep what a recipe says of its text away from an evaluation text that is replaced; see `DataConfig.train_only`.

    Call it after `drop_descriptions`, which leaves nothing to limit where the training text is replaced too.

    Args:
        recipe: nested values, changed in place.
        given: nested values that are laid over it.

    Returns:
        `key value` of each setting that the evaluation text is read without.
    """
    section = recipe.get("data")
    if not isinstance(section, dict) or not _is_replaced(section.get("eval"), get_dotted(given, "data.eval")):
        return []

    defaults = to_plain(DataConfig())
    limited = [
        name
        for name in get_args(HowTextIsRead)
        if section.get(name, defaults[name]) != defaults[name]
        and get_dotted(given, f"data.{name}", default=defaults) is defaults
    ]
    section["train_only"] = limited
    return [f"data.{name} {shown(section[name])}" for name in limited]


def _is_replaced(before: Any, now: Any) -> bool:
    """Return whether the name of a text or a model is another one now."""
    as_lists = [value if isinstance(value, list) else [value] for value in (before, now)]
    return now is not None and as_lists[0] != as_lists[1]


# ------------------------------------------------------------------------------------------ building


def build(schema: type[T], values: dict[str, Any], *, source: str) -> T:
    """An instance of the dataclass `schema` from nested plain values.

    Args:
        source: where the values come from, for the message.

    Raises:
        UserError: every mistake at once, each with its dotted path, what was got, what is expected, and
            for an unknown key the nearest known one.
    """
    problems: list[str] = []
    cleaned = _without_unknown(schema, values, "", dict(_leaves(schema)), problems)
    while True:
        try:
            instance = _adapter(schema).validate_python(cleaned)
            break
        except ValidationError as error:
            problems += [line for line in describe(error, cleaned) if line not in problems]
            if not _take_out(error, cleaned):
                break
    if problems:
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
        raise UserError(f"{count} in the configuration ({source}):\n" + "\n".join(f"  - {p}" for p in problems))
    return instance


@cache
def _adapter(schema: type[T]) -> TypeAdapter[T]:
    """Make the validator of a schema, which takes far longer than to use it."""
    return TypeAdapter(schema)


def _take_out(error: ValidationError, values: dict[str, Any]) -> bool:
    """Remove wrong values, so that the default stands in and what they hid can be checked. False: none removed."""
    removed = False
    for item in error.errors(include_url=False, include_input=False):
        *path, last = dotted(item["loc"], values).split(".")
        inner: Any = values
        for part in path:
            if not isinstance(inner, dict) or part not in inner:
                break
            if not isinstance(inner[part], dict):  # inside a list: the list goes
                last = part
                break
            inner = inner[part]
        if isinstance(inner, dict) and last in inner:
            del inner[last]
            removed = True
    return removed


def to_plain(instance: Any) -> Any:
    """Dataclasses, tuples and paths as dicts, lists and strings: what YAML and JSON can hold."""
    if dataclasses.is_dataclass(instance) and not isinstance(instance, type):
        return {f.name: to_plain(getattr(instance, f.name)) for f in dataclasses.fields(instance)}
    if isinstance(instance, dict):
        return {key: to_plain(value) for key, value in instance.items()}
    if isinstance(instance, list | tuple):
        return [to_plain(value) for value in instance]
    return str(instance) if isinstance(instance, Path) else instance


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key; a ramp, which is one value, stays whole."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and "points" not in value
        found |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def refuse_differences(where: str, there: Mapping[str, Any], here: Mapping[str, Any], changed: bool) -> None:
    """Compare what a run was made from with what it would be continued with, by dotted key.

    Args:
        where: the run or checkpoint, for the message.
        changed: other values of `CHANGEABLE` settings were asked for; they are logged.

    Raises:
        UserError: every difference, what to do, and the override where there is one.
    """
    keys = [key for key in sorted({*there, *here}) if there.get(key, "-") != here.get(key, "-")]
    if not keys:
        return
    lines = "".join(f"\n  - {key}: {_told(there, key)} -> {_told(here, key)}" for key in keys)
    can_change = all(key.startswith(CHANGEABLE) for key in keys)
    if can_change and changed:
        log.warning("continuing %s with other settings, as asked for (that run -> now):%s", where, lines)
        return
    override = " To continue it with the new values nevertheless: --set resume_changed=true." if can_change else ""
    raise UserError(
        f"{where} belongs to a run with other settings (that run -> now):{lines}\n"
        "Expected the same, or the result would be neither run. Put them back to continue it, or choose another "
        f"--output-dir, with --resume never, for a new run.{override}"
    )


def _told(values: Mapping[str, Any], key: str) -> str:
    text = json.dumps(values[key], ensure_ascii=False, default=str) if key in values else "(absent)"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass an annotation admits: itself, or a member of a union."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((found for arg in get_args(annotation) if (found := _dataclass_in(arg))), None)
    return None


def _leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, last key) of every key of a schema."""
    for name, annotation in get_type_hints(schema, include_extras=True).items():
        yield f"{prefix}{name}", name
        if (inner := _dataclass_in(annotation)) is not None:
            yield from _leaves(inner, f"{prefix}{name}.")


def _without_unknown(schema: type, values: Any, prefix: str, known: dict[str, str], problems: list[str]) -> Any:
    """A copy of `values` without unknown keys, which are added to `problems`."""
    if not isinstance(values, dict):
        return values
    hints = get_type_hints(schema, include_extras=True)
    cleaned = {}
    for key, value in values.items():
        if key not in hints:
            near = _did_you_mean(str(key), hints, prefix) or _did_you_mean_elsewhere(str(key), known)
            problems.append(f"{prefix}{key}: unknown key (got {shown(value)}){near}")
            continue
        inner = _dataclass_in(hints[key])
        cleaned[key] = value if inner is None else _without_unknown(inner, value, f"{prefix}{key}.", known, problems)
    return cleaned


def _did_you_mean(word: str, candidates: Any, prefix: str = "") -> str:
    near = difflib.get_close_matches(word, [str(c) for c in candidates], n=1, cutoff=0.6)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; known here: {', '.join(candidates)}" if prefix else ""


def _did_you_mean_elsewhere(word: str, known: dict[str, str]) -> str:
    paths = [path for path, leaf in known.items() if leaf == word] or [
        path for path, leaf in known.items() if difflib.get_close_matches(word, [leaf], cutoff=0.8)
    ]
    return f"; did you mean {' or '.join(paths[:3])}?" if paths else ""
