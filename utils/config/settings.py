"""The settings of a run, section by section, each with its default, its range and its meaning.

The loss, the curriculum and the router have their settings in `models/config.py`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, cast

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, InstanceOf, StringConstraints, WithJsonSchema

from .quickstart_names import NAMES
from .validation import Validated

# An instance, for a name of a file may hold bytes that are no UTF-8. Python writes them as lone surrogates, and
# pydantic takes no string that has any.
Name = Annotated[InstanceOf[str], MinLen(1)]
"""Name of a model, a text, a file or a folder; never empty."""


def _check_init(init: str) -> str:
    """Return the beginning of a student as it was given.

    Raises:
        ValueError: it is none.
    """
    if init not in ("pretrained", "random") and re.fullmatch(r"layers:[1-9]\d*", init) is None:
        raise ValueError(f"got {init!r}, expected pretrained, random or layers:K, such as layers:10")
    return init


_INIT_FORMS = [
    {"type": "string", "enum": ["pretrained", "random"]},
    {"type": "string", "pattern": "^layers:[1-9][0-9]*$", "examples": ["layers:10"]},
]

Init = Annotated[str, AfterValidator(_check_init), WithJsonSchema({"anyOf": _INIT_FORMS})]
"""Beginning of a student: pretrained, random or layers:K."""


TemplateValue = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*=")]
"""A variable of a chat template and its value: `enable_thinking=false`."""


def template_values(settings: Sequence[str]) -> dict[str, Any]:
    """Return values for the variables of a chat template; what is no number, true or false is a text."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
        if not isinstance(values[name], str | bool | int | float):
            values[name] = value
    return values


CAPTURES = "captures:"
"""Beginning of the name of a teacher, or of a source of text, that is a folder of captures."""

HowTextIsRead = Literal[
    "text_column",
    "messages_column",
    "prompt_column",
    "completion_column",
    "document_separator",
    "document_start",
]
"""Settings of `data` that say how the documents of a text are read, of the training text and the evaluation text."""


@dataclass(frozen=True)
class ModelConfig(Validated):
    """The teacher."""

    name: Name | None = None
    """Hub id, local folder or GGUF file; the address of a server, http://HOST:PORT/v1 (docs/served_teacher.md); or
    captures:DIR, a folder of DistillKit's captures (docs/captures.md). null trains without a teacher (kd and span must
    then weigh 0)."""

    dtype: Literal["auto", "float32", "float16", "bfloat16", "8bit", "4bit"] = "auto"
    """Precision of the frozen weights; auto: what the device computes fastest without loss of range. 8bit and 4bit
    need an NVIDIA GPU and bitsandbytes."""

    device: str = "auto"
    """auto: in one process a second GPU, where there is one with room, else the student's; cpu, or a GPU such as
    cuda:1. On one of its own it works one step ahead of the student. Or its layers spread over all GPUs, or sharded
    over all processes."""

    allow_pickle: bool = False
    """Also take weights that are only there as pickle files (.bin); safetensors cannot carry code, they can."""

    text_start: str | None = None
    """Token that plain text starts with, such as `<|endoftext|>`; null: the start of text that the tokenizer itself
    puts there, else the token that separates texts. The log tells which, and how likely the model finds a text behind
    it."""

    tokenizer: Name | None = None
    """Hub id or local folder of its tokenizer; null: the one that comes with the model."""

    chat_template_kwargs: list[TemplateValue] = field(default_factory=list)
    """Values for variables of its chat template, such as `enable_thinking=false`. One that the template does not read
    is an error."""

    model: Name | None = None
    """Name of the model at a server of teachers (`name` is http://HOST:PORT/v1); null: the only one that it has. Of
    captures, the model that they are said to be of."""

    @property
    def is_served(self) -> bool:
        """True for a teacher behind a server, which is asked over HTTP."""
        return self.name is not None and self.name.startswith(("http://", "https://"))

    @property
    def is_captured(self) -> bool:
        """True for a teacher that is a folder of captures."""
        return self.name is not None and self.name.startswith(CAPTURES)

    @property
    def is_elsewhere(self) -> bool:
        """True for a teacher whose model is in no process of this run."""
        return self.is_served or self.is_captured


@dataclass(frozen=True)
class ServedConfig(Validated):
    """Requests to the server of a served teacher."""

    requests: Annotated[int, Gt(0)] = 8
    """Requests under way at a time, of each process. Each asks for one window."""

    listed: Annotated[int, Gt(0)] | None = None
    """Tokens that the server lists at each position; null: as many as the loss or the cache keeps. More of them leave
    fewer positions inside of teacher tokens to the text alone, at the price of longer answers."""

    timeout: Annotated[float, Gt(0)] = 120.0
    """Seconds for one answer."""

    patience: Annotated[float, Ge(0)] = 600.0
    """Seconds for which a server that does not answer is waited for; then the run ends, with a checkpoint."""

    key_variable: Name = "TEACHER_API_KEY"
    """Environment variable with the key that the server wants, if any. The key itself is in no setting and no log."""


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
    """Dropout of what enters the adapter."""

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
    """Hub id, local folder or GGUF file."""

    init: Init = "pretrained"
    """random: only config.json and the tokenizer are taken from `name`; weights are drawn from the seed. layers:K, such
    as layers:10: K layers of `name`, those that change the training text most on its way through it, with its
    embeddings, its head and its widths."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    """An adapter in place of the weights."""

    allow_pickle: bool = False
    """Also take weights that are only there as pickle files; see `teacher.allow_pickle`."""

    text_start: str | None = None
    """Token that plain text starts with; see `teacher.text_start`."""

    tokenizer: Name | None = None
    """Hub id or local folder of its tokenizer; null: the one that comes with the model."""

    chat_template_kwargs: list[TemplateValue] = field(default_factory=list)
    """Values for variables of its chat template; see `teacher.chat_template_kwargs`. The exported template has them."""

    @property
    def beginning(self) -> Literal["trained", "cut", "random"]:
        """Kind of the weights that it starts from; an adapter is beside trained ones."""
        # what is built for the first run has no weights yet
        if self.init == "random" or self.name in NAMES:
            return "random"
        return "trained" if self.layers is None else "cut"

    @property
    def layers(self) -> int | None:
        """Layers that it takes from its model; None: all of them."""
        kind, _, count = self.init.partition(":")
        return int(count) if kind == "layers" else None


@dataclass(frozen=True)
class DataConfig(Validated):
    """Text to learn from and text to measure on."""

    train: list[Name] = field(default_factory=list)
    """Hub ids (`name` or `name:configuration`), files (.txt .jsonl .parquet .csv, also .gz and .zst), folders, or
    captures:DIR. Empty beside a teacher of captures: their own text."""

    eval: Name | None = None
    """Text to measure on; null: a share of the training documents is held out."""

    tokenizer: Name | None = None
    """Hub id or local folder of the tokenizer by which the text of captures is decoded, where `train` or `eval` names
    some (captures:DIR); null: that of the teacher."""

    text_column: str | None = None
    """Column that holds plain text in tabular sources; null: messages, conversations, prompt and completion,
    instruction and output, or `text`, whichever of these columns are there, in this order."""

    messages_column: str = "messages"
    """Column of conversations: lists of messages with `role` and `content`. Beside it, or beside a prompt, a column
    `teacher_messages` may hold the conversation as the teacher reads it, and a column `tools` schemas of functions."""

    prompt_column: str = "prompt"
    """Column of a user's question; together with `completion_column` a conversation of two messages."""

    completion_column: str = "completion"
    """Column of the assistant's answer."""

    learn_from: Literal["completions", "all"] = "completions"
    """Part of a conversation that is learned: the assistant's messages, or every one. Plain text is learned whole."""

    reasoning: Literal["learn", "read", "drop"] = "learn"
    """Use of the thinking before an answer (`reasoning_content`, `<think>`): learn it with the answer; read it, so that
    the answer behind it alone is learned; or drop it before either model reads the conversation."""

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

    isolate_documents: bool = False
    """Documents that share a window do not see each other: each is read as if it were alone, by both models. Not for
    models that cannot (recurrent ones, for one), which is measured as a run begins."""

    num_workers: Annotated[int, Ge(0)] = 0
    """Processes that prepare batches beside the training process."""

    max_documents: Annotated[int, Gt(0)] | None = None
    """Read at most this many training documents; null: all."""

    deduplicate: bool = True
    """Drop documents whose text occurred before; in a stream, among the last `remembered_documents` or more."""

    streaming: bool = False
    """Read the text while training, block by block, for text that is larger than memory, or than the disk; needs
    `training.max_steps`. Files are read where they are, and hub data sets downloaded as far as they are read
    (docs/streams.md)."""

    mixture: dict[Name, Annotated[float, Gt(0)]] | None = None
    """With `streaming`: weight of each source of `train`, by its name: the source of every document is drawn with them,
    and one that ends is read again. null: the sources in turn."""

    block_bytes: Annotated[int, Gt(0)] = 32_000_000
    """With `streaming`: bytes of text that are shuffled as a whole. The windows of three blocks are on the disk at a
    time, at most."""

    remembered_documents: Annotated[int, Gt(0)] = 2_000_000
    """With `streaming`: documents among which repeats are looked for, at least; 6 bytes of memory, and of every
    checkpoint, for each. Up to 2 of 100,000 new ones are taken for repeats and left out."""

    order: Literal["random", "length", "teacher_loss"] = "random"
    """Difficulty by which `curriculum.open_text` opens the training windows: the length of their documents (of a
    packed window the mean of those that it has a part of), or the teacher's bits per byte, which takes one pass of the
    teacher before training. random: all are open."""

    def beside(self, teacher: ModelConfig) -> "DataConfig":
        """Return the same text with what a teacher of captures settles: their text, and its tokenizer."""
        train = self.train
        if teacher.is_captured and not train:
            train = [cast(str, teacher.name)]

        tokenizer = self.tokenizer
        if self._names_captures(train):
            of_teacher = teacher.tokenizer if teacher.is_elsewhere else teacher.tokenizer or teacher.name
            tokenizer = tokenizer or of_teacher
        if (train, tokenizer) == (self.train, self.tokenizer):
            return self
        return replace(self, train=train, tokenizer=tokenizer)

    @property
    def lacks_tokenizer(self) -> bool:
        """True if there are captures among the texts, and nothing to decode them with."""
        return self.tokenizer is None and self._names_captures(self.train)

    def _names_captures(self, train: Sequence[str]) -> bool:
        return any(name.startswith(CAPTURES) for name in [*train, self.eval or ""])


@dataclass(frozen=True)
class TrainingConfig(Validated):
    """The training loop: optimizer, schedule, precision, checkpoints."""

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
    """Curve along which the learning rate falls to 0 after warm-up."""

    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients are scaled down to at most this norm."""

    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Precision of the student's computation; auto: chosen from the hardware, with the reason logged. On a CPU that is
    bf16 where it has instructions for it (AMX, AVX512_BF16), which pays for models of a hundred million parameters."""

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
class OnPolicyConfig(Validated):
    """Text that the student writes itself and learns from; `curriculum.on_policy` says how much of it."""

    every: Annotated[int, Gt(0)] = 50
    """Optimizer steps of a round: at its beginning the student writes the texts that it learns from in all of them."""

    prompt_tokens: Annotated[int, Gt(0)] = 32
    """Length of the beginnings of plain texts that it goes on from, in student tokens, at most. In conversations it
    writes an answer in place of one of the assistant's."""

    new_tokens: Annotated[int, Gt(0)] = 128
    """Length of what it writes, in student tokens, at most."""

    temperature: Annotated[float, Gt(0)] = 1.0
    """Temperature that it samples at."""

    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sample from the fewest likeliest tokens whose probabilities add up to this; 1: from all."""

    stop_on_collapse: bool = False
    """End training, with a checkpoint, when the student's texts show that it loses itself in them: they have no end,
    grow round by round, are one token, are empty, or the teacher finds them ever less likely. False: only warn."""

    @property
    def of_texts(self) -> dict[str, float]:
        """The settings that a text depends on, beside those that say which texts there are."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }

    @property
    def tokens(self) -> int:
        """Tokens of a plain text that the student has written, its beginning included."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class EvaluationConfig(Validated):
    """Measurements on the held-out text."""

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

    generation: Annotated[int, Ge(0)] = 16
    """Texts that each model writes from such prompts, sampled at temperature 1, for the figures of written text in the
    report; one for each held-out document at most; 0: none."""

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
    """The teacher's distributions, kept on disk: computed once, read by later epochs and runs."""

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
    """Records that are written while training."""

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
