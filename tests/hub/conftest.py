"""One loopback Hub for all tests of this folder, empty at the start of each; no request can leave the computer."""

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from tests.hub.environment import CACHE, LISTENER
from tests.hub.guard import allow_loopback_only
from tests.hub.server import TOKEN, LoopbackHub, running


@pytest.fixture(scope="session")
def running_hub() -> Iterator[LoopbackHub]:
    """The server, at the address that the hub libraries were told when the tests began."""
    with running(LISTENER) as hub:
        yield hub


@contextmanager
def connected(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """An empty Hub, an empty cache, a valid token, and retries of the client that do not wait."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo")):
            patch.setattr(owner, name, getattr(owner, name))  # puts back what the guard replaces
        allow_loopback_only()
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        for module in (_http, file_download):
            patch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
        patch.setenv("HF_HUB_OFFLINE", "0")  # PEFT reads the variable itself
        patch.setenv("HF_TOKEN", TOKEN)
        hub.reset()
        yield hub
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture
def hub(running_hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """The Hub of one test."""
    with connected(running_hub):
        yield running_hub
