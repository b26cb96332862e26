"""One loopback Hub for all tests of this folder, empty at the start of each; no request can leave the computer."""

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from tests.hub.environment import CACHE, LISTENER
from tests.hub.guard import allow_loopback_only
from tests.hub.server import TOKEN, LoopbackHub, running


@pytest.fixture(scope="session")
def running_hub() -> Iterator[LoopbackHub]:
    """The server, at the address that the hub libraries were told when the tests began."""
    with running(LISTENER) as hub:
        yield hub


@pytest.fixture
def hub(running_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """An empty Hub, an empty cache, a valid token, and retries of the client that do not wait."""
    for name in ("connect", "getaddrinfo"):
        owner = socket.socket if name == "connect" else socket
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back what the guard replaces
    allow_loopback_only()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    running_hub.reset()
    yield running_hub
    shutil.rmtree(Path(CACHE), ignore_errors=True)
