"""The exported student on the Hugging Face Hub."""

import logging
import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..config.settings import HubConfig, StudentConfig
from ..errors import UserError
from ..paths import user_path
from ..pretrained.locate import hub_is_reachable, where_from

log = logging.getLogger(__name__)


def check(config: HubConfig, student: Path, model: StudentConfig) -> None:
    """Create the student's repository, so that a run which cannot upload ends before anything is loaded.

    Args:
        student: the folder that will be uploaded.
        model: the student's settings.

    Raises:
        UserError: no network, no token, or one that may not write there; or an adapter that nobody else could load.
    """
    if config.repository is None:
        return

    is_adapter = model.lora.enabled and not model.lora.merge
    if is_adapter and user_path(where_from(model.name)).exists():
        raise UserError(
            f"--push-to-hub {config.repository}: the student is a LoRA adapter of {model.name}, a model of this "
            "machine, and whoever loads it would look for its base there. Expected the base's name on the hub as "
            "--student, or --merge-lora, which uploads a whole model."
        )

    later = f"Leave it out, and upload the student after the run: {_command(config, student)}"
    # A notebook without internet is the usual case.
    if not hub_is_reachable():
        raise UserError(f"--push-to-hub {config.repository}: the hub cannot be reached from here. {later}")
    # In order of what is cheapest to find out.
    if get_token() is None:
        raise UserError(
            f"--push-to-hub {config.repository}: no token of yours is on this machine. Expected one with the right to "
            f"write: `hf auth login`, or the environment variable HF_TOKEN. {later}"
        )

    try:
        _repository(config)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {config.repository}: expected OWNER/NAME. {error}") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"--push-to-hub {config.repository}: the hub refuses. Expected your own name or an organisation of yours, "
            f"and a token with the right to write there. {later}\n  {' '.join(str(error).split())}"
        ) from error


def push(config: HubConfig, student: Path) -> None:
    """Upload the exported student. A failure is told, with the command that repeats it, and the run goes on."""
    if config.repository is None:
        return
    try:
        repository = _repository(config)
        address = HfApi().upload_folder(repo_id=repository, folder_path=student, commit_message="Upload the student")
        log.info("the student is on the hub: %s", address)
    except Exception as error:
        # The network, the hub, the disk: the student is exported all the same.
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        again = _command(config, student)
        log.error("not uploaded: %s\nThe student is whole in %s; once more: %s", message, student, again)


def _repository(config: HubConfig) -> str:
    """Return the full name of the repository, which is made if there is none."""
    assert config.repository is not None
    return HfApi().create_repo(config.repository, private=config.private, exist_ok=True).repo_id


def _command(config: HubConfig, student: Path) -> str:
    """Return the command that uploads a student later."""
    assert config.repository is not None
    private = " --private" if config.private else ""
    return f"hf upload {shlex.quote(config.repository)} {shlex.quote(str(student))} .{private}"
