"""Settings: their defaults, the files and flags that change them, and the mistakes made in these.

- `settings`: the sections of a run as frozen dataclasses, with every default.
- `schema`: the settings as data: a table of all keys, and a JSON schema for editors, made of the dataclasses.
- `arguments`: the words of a command line; every setting is a flag.
- `chat_arguments`: the words of a chat.
- `command_line`: `configure`, which makes a configuration of a recipe and these words.
- `short_forms`: `teacher: PATH` and other forms that can mean one thing only.
- `yaml_files`: recipes and the config.yaml of a run; dotted keys.
- `reference`: the page docs/settings.md.
- `build`: the function of this name makes a dataclass of nested plain values, with every mistake in one message.
- `validation`: the base of the dataclasses, which checks what a program hands in.
- `error_messages`: pydantic's errors in the words of somebody who wrote YAML or flags.
- `contradictions`: settings of several sections that exclude one another.
- `unused_settings`: settings of a run that change nothing in it.
- `described_by`: settings of a recipe that are dropped when a command line replaces its text or model.
- `resume_rules`: settings that may change, or must not, when a run is continued.
- `protocols`: a run's settings as functions see them.
- `plain`: dataclasses as what YAML and JSON can hold, nested or by dotted key.
- `quickstart_names`: names that stand for the models and the text of the first run.

Nothing here loads torch before a default recipe has to be chosen on a machine that may have a GPU. `build` and
`contradictions` are imported from their modules: a function of the same name here would hide the module.
"""

from .command_line import configure
from .plain import flatten, to_plain
from .resume_rules import check_same_run, identity
from .settings import (
    CacheConfig,
    DataConfig,
    EvaluationConfig,
    HubConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    StudentConfig,
    TrainingConfig,
)
from .yaml_files import CONFIG_FOLDER, find_config, load_yaml, read_config

__all__ = [
    "CONFIG_FOLDER",
    "CacheConfig",
    "DataConfig",
    "EvaluationConfig",
    "HubConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "StudentConfig",
    "TrainingConfig",
    "check_same_run",
    "configure",
    "find_config",
    "flatten",
    "identity",
    "load_yaml",
    "read_config",
    "to_plain",
]
