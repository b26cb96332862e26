"""A Hub that is not there, does not answer, or must not be asked: one line within seconds."""

import socket
import time
from contextlib import closing
from pathlib import Path

import pytest
from huggingface_hub import constants

from peft_vlm.classifier import PromptedClassifier
from peft_vlm.errors import HubError
from tests import forked
from tests.hostile.folders import change


def ask(port: int, names: list[str], message: str, seconds: float) -> None:
    """Load adapters with a Hub at a port of this computer; port 0 is offline mode."""
    constants.HF_HUB_OFFLINE, constants.ENDPOINT = port == 0, f"http://127.0.0.1:{port}"
    for name in names:
        begun = time.monotonic()
        with pytest.raises(HubError, match=message):
            PromptedClassifier.from_pretrained(name)
        assert time.monotonic() - begun < seconds, time.monotonic() - begun


@pytest.fixture
def names(copy_of) -> list[str]:
    """An adapter by its id, and a folder that records a base model by its id."""
    folder = copy_of("coop")
    change(base_model_name_or_path="nobody/base")(folder)
    return ["nobody/adapter", str(folder)]


def test_a_hub_that_refuses_connections_is_named_at_once(names, tmp_path):
    """Its own client tries six times per file: 23 s of silence, twice."""
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    forked.run(tmp_path / "log", ask, port, names, "did not answer within 5 s", 4.0)


def test_a_hub_that_never_answers_is_given_up(names, tmp_path):
    """A connection that is accepted and then silent."""
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        forked.run(tmp_path / "log", ask, port, names, f"http://127.0.0.1:{port} did not answer", 9.0)


def test_offline_mode_is_respected_and_said(names, tmp_path):
    """The user has to learn why nothing is found."""
    forked.run(tmp_path / "log", ask, 0, names, "Unset HF_HUB_OFFLINE to download it", 3.0)


@pytest.mark.parametrize("name", ["./mine", "a/b/c", "/no/such", "../x", "~/adapter", "a b", "\u00e4/b", "a\nb"])
def test_a_path_never_becomes_a_request(tmp_path, name, monkeypatch):
    """A mistyped folder with a token on the way is somebody else's repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("a request"))
    with pytest.raises(ValueError, match="does not exist"):
        PromptedClassifier.from_pretrained(name)


def test_a_folder_wins_over_a_repository_of_its_name(copy_of, tmp_path, monkeypatch):
    """`owner/name` that exists here is this folder, complete or not."""
    folder = copy_of("coop")
    (tmp_path / "owner").mkdir()
    folder = Path(folder.rename(tmp_path / "owner" / "name"))
    (folder / "adapter_model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("a request"))
    with pytest.raises(ValueError, match="read from its own folder only"):
        PromptedClassifier.from_pretrained("owner/name")
