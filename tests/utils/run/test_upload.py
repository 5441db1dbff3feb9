"""The student on the hub, with a hub that is not there: refused before the run, and never at the cost of the run."""

import inspect
import logging
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from utils.config.settings import HubConfig, LoraConfig, StudentConfig
from utils.errors import UserError
from utils.run import upload as hub


class Hub:
    """A hub that records what it is asked for, and raises the error that it is given."""

    def __init__(self) -> None:
        self.created, self.uploaded, self.refusal = [], [], None

    def create_repo(self, repo_id, **options):
        validate_repo_id(repo_id)
        if self.refusal:
            raise self.refusal
        self.created.append((repo_id, options))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, **options):
        if self.refusal:
            raise self.refusal
        self.uploaded.append(options)
        return "https://hub/me/mine"


@pytest.fixture
def there(monkeypatch) -> Hub:
    """A hub that can be reached, with a token."""
    pretended = Hub()
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(hub, "HfApi", lambda: pretended)
    return pretended


def test_without_a_repository_nothing_is_asked(there, tmp_path):
    hub.check(HubConfig(), tmp_path, StudentConfig())
    hub.push(HubConfig(), tmp_path)
    assert not there.created and not there.uploaded


def test_the_repository_is_private_and_has_its_owner(there, tmp_path):
    hub.check(HubConfig("mine"), tmp_path, StudentConfig())
    hub.push(HubConfig("mine"), tmp_path)
    assert there.created == [("mine", {"private": True, "exist_ok": True})] * 2
    (upload,) = there.uploaded
    assert (upload["repo_id"], upload["folder_path"]) == ("me/mine", tmp_path)


def test_public_must_be_asked_for(there, tmp_path):
    hub.check(HubConfig("me/mine", private=False), tmp_path, StudentConfig())
    assert there.created[0][1]["private"] is False


def test_offline_is_refused_with_what_to_do_later(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)
    with pytest.raises(UserError, match=r"cannot be reached.*hf upload me/mine .*student \. --private"):
        hub.check(HubConfig("me/mine"), tmp_path / "student", StudentConfig())


def test_without_a_token_it_is_refused(there, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"no token.*hf auth login.*HF_TOKEN"):
        hub.check(HubConfig("me/mine"), tmp_path, StudentConfig())
    assert not there.created


@pytest.mark.parametrize(
    ("repository", "refusal", "told"),
    [
        ("me/mine/more", None, "expected OWNER/NAME"),
        ("them/theirs", 403, "organisation of yours"),
        ("me/mine", ConnectionError("reset by peer"), "reset by peer"),
    ],
)
def test_what_the_hub_refuses_is_told_before_the_run(there, tmp_path, repository, refusal, told):
    if isinstance(refusal, int):
        response = SimpleNamespace(status_code=refusal, headers={}, request=None)
        refusal = HfHubHTTPError("forbidden", response=response)
    there.refusal = refusal
    with pytest.raises(UserError, match=told):
        hub.check(HubConfig(repository), tmp_path, StudentConfig())


def test_a_failing_upload_is_told_with_the_command_that_repeats_it(there, tmp_path, caplog):
    there.refusal = OSError("connection reset")
    with caplog.at_level(logging.ERROR):
        hub.push(HubConfig("me/mine"), tmp_path / "my student")
    assert "connection reset" in caplog.text and f"hf upload me/mine '{tmp_path}/my student' . --private" in caplog.text


def test_the_real_client_takes_what_is_asked_of_it(tmp_path):
    """Its signatures, without a network."""
    inspect.signature(HfApi.create_repo).bind(None, "me/mine", private=True, exist_ok=True)
    inspect.signature(HfApi.upload_folder).bind(None, repo_id="a/b", folder_path=tmp_path, commit_message="c")


def test_an_adapter_of_a_local_folder_is_refused_since_nobody_else_could_load_it(there, tmp_path):
    base = tmp_path / "models--owner--small" / "snapshots" / "abc"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    local = tmp_path / "small"
    local.mkdir()
    (local / "config.json").write_text("{}")

    def check(name, **lora):
        hub.check(HubConfig("mine"), tmp_path, StudentConfig(name=str(name), lora=LoraConfig(**lora)))

    with pytest.raises(UserError, match=r"LoRA adapter of .*small, a model of this machine.*--merge-lora"):
        check(local, enabled=True)
    assert not there.created
    check(local, enabled=True, merge=True)
    check(local)
    check(base, enabled=True)
    check("owner/small", enabled=True)
    assert len(there.created) == 4
