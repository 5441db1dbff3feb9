"""Everything that a run depends on: the settings of both towers in one configuration, and the command line for it.

    python -m utils.commands.settings    writes what is generated of it: docs/settings.md and configs/schema.json

Nothing here loads torch.
"""

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from models.config import HEAD_TERMS, CurriculumConfig, LossConfig, RouterConfig, Schedule, values_of
from models.curriculum import value_at
from utils.config import arguments, command_line, reference
from utils.config.contradictions import contradictions
from utils.config.error_messages import Contradiction, Contradictions
from utils.config.schema import json_schema
from utils.config.settings import (
    CacheConfig,
    DataConfig,
    EvaluationConfig,
    HubConfig,
    LoggingConfig,
    ModelConfig,
    Name,
    OnPolicyConfig,
    ServedConfig,
    StudentConfig,
    TrainingConfig,
)
from utils.config.validation import Validated

from .automatic_curriculum import with_automatic_curriculum


@dataclass(frozen=True)
class MixedTeacher(Validated):
    """One of several teachers."""

    name: Name
    """As `teacher.name`."""
    weight: Schedule = 1.0
    """Its weight beside those of the others, which need not add up to 1; a ramp follows the run. At 0 it is not
    asked."""
    only_for: list[Name] | dict[Name, list[Name]] = field(default_factory=list)
    """Text that it is asked about: sources, as `data.train` and `data.eval` name them; or a column of tables and its
    values, `{domain: [code]}`; none: all."""
    device: str | None = None
    """As `teacher.device`; null: the same."""
    dtype: Literal["auto", "float32", "float16", "bfloat16", "8bit", "4bit"] | None = None
    """As `teacher.dtype`; null: the same."""
    text_start: str | None = None
    """As `teacher.text_start`."""
    tokenizer: Name | None = None
    """As `teacher.tokenizer`."""

    @property
    def is_used(self) -> bool:
        """True if it has a weight anywhere in the run."""
        return any(values_of(self.weight))

    @property
    def routes(self) -> list[str]:
        """Sources, or values of a column, that it is asked about; none: all."""
        if isinstance(self.only_for, dict):
            return [value for values in self.only_for.values() for value in values]
        return self.only_for

    @property
    def route_column(self) -> str | None:
        """The column that `only_for` names; None: it names sources, or nothing."""
        return next(iter(self.only_for), None) if isinstance(self.only_for, dict) else None

    def model(self, common: ModelConfig) -> ModelConfig:
        """Return its model; what it does not say is that of `teacher`."""
        return replace(
            common,
            name=self.name,
            device=self.device or common.device,
            dtype=self.dtype or common.dtype,
            text_start=self.text_start,
            tokenizer=self.tokenizer,
        )


@dataclass(frozen=True)
class RunConfig(Validated):
    """Everything a run depends on."""

    teacher: ModelConfig = field(default_factory=ModelConfig)
    served: ServedConfig = field(default_factory=ServedConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    teachers: list[MixedTeacher] = field(default_factory=list)
    """Several teachers, mixed on the student's vocabulary, in place of `teacher`, whose other settings hold for all of
    them. Each is a name, or a mapping with `name` and, where needed, `weight` (a number or a ramp; 1), `only_for` (a
    list of sources of text, of `data.train` and `data.eval`, or a column of tables with a list of its values),
    `device`, `dtype`, `text_start` and `tokenizer`. Terms on hidden states compare with the first one."""
    mix: Literal["weights", "likelihood"] = "weights"
    """Shares of several teachers: their weights, or these times how likely each finds the text of the window so far
    (softmax of minus its cross-entropy, in nats per token of the student)."""
    output_dir: Name = "runs/train"
    """Folder of the run; by default runs/ and the name of the recipe."""
    resume: str = "auto"
    """auto: continue from the newest whole checkpoint in output_dir, if any; never; or a checkpoint's path."""
    resume_changed: bool = False
    """Continue although curriculum, on_policy, loss, max_grad_norm or patience differ from those of the checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()

        # The rest of the program asks `teacher` whether there is one, and what the first of them is.
        wrong = self._problems_of_teachers()
        # Where none of them has a weight there is one nevertheless: that there is none would be a second mistake.
        if self.teachers and not (wrong and self.used_teachers):
            first = next(iter(self.used_teachers or self.teachers))
            object.__setattr__(self, "teacher", first.model(self.teacher))
        object.__setattr__(self, "data", self.data.beside(self.teacher))
        wrong += contradictions(self, HEAD_TERMS)
        if wrong:
            raise Contradictions(wrong)

    @property
    def reads_once(self) -> bool:
        """True if no text is learned from twice: in one epoch, or from a stream. A number of steps may take several.

        Nor may text be opened later than it would be read: what is open is read again in place of what is not.
        """
        is_one_epoch = self.training.max_steps is None and self.training.epochs == 1
        share = self.curriculum.open_text
        is_open_in_time = all(value_at(share, percent / 100) >= percent / 100 for percent in range(101))
        return self.data.streaming or (is_one_epoch and is_open_in_time)

    @property
    def compares_without_teacher(self) -> bool:
        """True if the student is trained once more without its teacher, which the first training must have used."""
        return self.evaluation.without_teacher and not self.curriculum.used() <= {"lm"}

    @property
    def used_teachers(self) -> list[MixedTeacher]:
        """Those of `teachers` that have a weight anywhere in the run."""
        return [teacher for teacher in self.teachers if teacher.is_used]

    @property
    def mixes_teachers(self) -> bool:
        """True if there are several, or one that is for some of the text alone."""
        used = self.used_teachers
        return len(used) > 1 or any(teacher.routes for teacher in used)

    @property
    def several_teachers(self) -> list[ModelConfig]:
        """The models of teachers that are mixed; none where there is a single one."""
        return [teacher.model(self.teacher) for teacher in self.used_teachers] if self.mixes_teachers else []

    @property
    def routes_of_teachers(self) -> list[list[str]]:
        """Sources of text, or values of `route_column`, that each of `several_teachers` is asked about; none: all."""
        return [teacher.routes for teacher in self.used_teachers] if self.mixes_teachers else []

    @property
    def route_column(self) -> str | None:
        """Column of tables that says which teachers a row is for; None: its source does, or all are for all text."""
        return next((teacher.route_column for teacher in self.used_teachers if teacher.only_for), None)

    def _problems_of_teachers(self) -> list[Contradiction]:
        """Return the contradictions among `teachers`, and between them and `teacher`."""
        problems = []
        for teacher in self.teachers:
            below = [weight for weight in values_of(teacher.weight) if weight < 0]
            if below:
                problems.append(f"{teacher.name}: got the weight {below[0]:g}, expected 0 or more")

        for teacher in self.teachers:
            by_column = teacher.only_for if isinstance(teacher.only_for, dict) else {}
            if len(by_column) > 1 or [] in by_column.values():
                got = ", ".join(f"{column} with {len(values)} values" for column, values in by_column.items())
                problems.append(f"{teacher.name}: only_for: got {got}, expected one column, with its values")

        used = self.used_teachers
        kinds = {teacher.route_column for teacher in used if teacher.only_for}
        if len(kinds) > 1:
            names = " and ".join(sorted("sources" if column is None else f"the column {column}" for column in kinds))
            problems.append(f"only_for: got {names}, expected all teachers to be chosen by sources, or by one column")
        if self.teachers and not used:
            problems.append("got 0 for every weight, expected one teacher with a weight at least")
        if used and self.teacher.name not in (None, used[0].name):
            problems.append(
                f"got teacher.name {self.teacher.name} besides, expected one of the two: name all teachers in the list"
            )
        return [Contradiction("teachers", f"teachers: {problem}") for problem in problems]


parser = partial(arguments.parser, RunConfig)
"""The parser of the command line."""

parse = partial(arguments.parse, RunConfig)
"""argv -> the words of a command line, sorted."""

configure = partial(command_line.configure, RunConfig, complete=with_automatic_curriculum)
"""argv -> the configuration a command line asks for; its recipe and why, and where its weights come from."""


def generated_files() -> dict[Path, str]:
    """Return the files that are made of the settings, and their text."""
    root = Path(__file__).resolve().parents[2]
    return {
        root / "docs" / "settings.md": reference.page(RunConfig),
        root / "configs" / "schema.json": json.dumps(json_schema(RunConfig), indent=2) + "\n",
    }


if __name__ == "__main__":
    for file, text in generated_files().items():
        file.write_text(text, encoding="utf-8")
