"""Everything that a run depends on: the settings of both towers in one configuration, and the command line for it.

    python -m utils.commands.settings    writes what is generated of it: docs/settings.md and configs/schema.json

Nothing here loads torch.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from models.config import HEAD_TERMS, CurriculumConfig, LossConfig, RouterConfig
from utils.config import arguments, command_line, reference
from utils.config.contradictions import contradictions
from utils.config.error_messages import Contradictions
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
    output_dir: Name = "runs/train"
    """Folder of the run; by default runs/ and the name of the recipe."""
    resume: str = "auto"
    """auto: continue from the newest whole checkpoint in output_dir, if any; never; or a checkpoint's path."""
    resume_changed: bool = False
    """Continue although curriculum, on_policy, loss, max_grad_norm or patience differ from those of the checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()

        if wrong := contradictions(self, HEAD_TERMS):
            raise Contradictions(wrong)


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
