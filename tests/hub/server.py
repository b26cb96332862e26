"""A Hub on this computer: the real `huggingface_hub` client talks to it over HTTP, and it can be told to fail.

By hand (the address and what to set are printed):

    python -m tests.hub.server --port 8765

It speaks create, validate-yaml, preupload, LFS, commit, info, tree and resolve, keeps everything in memory, and takes
the token of `TOKEN` for the user `USER`. Requests that should go wrong are listed in `LoopbackHub.faults`.
"""

import argparse
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.hub import endpoints
from tests.hub.endpoints import Answer, Request
from tests.hub.storage import Repository

TOKEN, USER = "hf_dummy", "me"


@dataclass
class Fault:
    """What goes wrong with requests that match.

    Args:
        pattern: Searched in `"METHOD /path"`.
        status: Answer with this status instead; 0 keeps the proper answer.
        cut: Close the connection in the middle of the proper answer.
        delay: Seconds to wait before anything else.
        times: How many requests go wrong.
        body: JSON answer that goes with `status`.
    """

    pattern: str
    status: int = 0
    cut: bool = False
    delay: float = 0.0
    times: int = 1_000
    body: dict[str, Any] = field(default_factory=lambda: {"error": "told to fail"})


class LoopbackHub:
    """The server and what it stores.

    Args:
        listener: A bound socket of this computer; by default on a free port.
    """

    def __init__(self, listener: socket.socket | None = None) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        if listener is None:
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
        self._server = ThreadingHTTPServer(listener.getsockname(), _Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listener
        self._server.server_address = listener.getsockname()
        self._server.server_activate()
        self._server.daemon_threads = True
        self._server.hub = self
        self.endpoint = "http://{}:{}".format(*listener.getsockname())

    def serve(self) -> None:
        """Answer requests until `stop`."""
        self._server.serve_forever(poll_interval=0.05)

    def stop(self) -> None:
        """End `serve` and close the port."""
        self._server.shutdown()
        self._server.server_close()

    def model(self, name: str) -> Repository:
        """A stored model repository.

        Args:
            name: `owner/name`.
        """
        return self.repositories["model", name]

    def reset(self) -> None:
        """Forget everything."""
        with self.lock:
            for store in (self.repositories, self.objects, self.faults, self.requests):
                store.clear()

    def fault_for(self, line: str) -> Fault | None:
        """The first fault that is left for a request, which it uses up.

        Args:
            line: `"METHOD /path"`.
        """
        with self.lock:
            self.requests.append(line)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def running(listener: socket.socket | None = None) -> Iterator[LoopbackHub]:
    """A hub that serves in a thread.

    Args:
        listener: See `LoopbackHub`.
    """
    hub = LoopbackHub(listener)
    thread = threading.Thread(target=hub.serve, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stop()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        else:
            body = self.rfile.read(length)
        hub = self.server.hub
        fault = hub.fault_for(f"{self.command} {self.path}") or Fault("")
        time.sleep(fault.delay)
        if fault.status:
            self._send(Answer(fault.status, json.dumps(fault.body).encode()))
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        user = USER if token == TOKEN else None
        request = Request(self.command, self.path, body, user, self.headers.get("Range"), hub.endpoint)
        with hub.lock:
            answer = endpoints.answer(hub, request)
        self._send(answer, cut=fault.cut)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Answer, *, cut: bool = False) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body) or int(cut)))
        self.end_headers()
        if cut:
            self.wfile.write(answer.body[: len(answer.body) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(answer.body)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8765)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", parser.parse_args().port))
    hub = LoopbackHub(listener)
    print(f"export HF_ENDPOINT={hub.endpoint} HF_HUB_DISABLE_XET=1 HF_TOKEN={TOKEN} HF_HOME=$(mktemp -d)")
    try:
        hub.serve()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
