"""Refuses every connection that would leave this computer."""

import socket
from typing import Any


def allow_loopback_only() -> None:
    """From now on, in this process, a connection to any other host is an error that names the host."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a request left this computer, to {address!r}")
        connect(self, address)

    def resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in ("127.0.0.1", "::1", "localhost", None, ""):
            raise AssertionError(f"a request left this computer, to {host!r}")
        return getaddrinfo(host, *args, **kwargs)

    getaddrinfo = socket.getaddrinfo
    socket.socket.connect = guarded
    socket.getaddrinfo = resolve
