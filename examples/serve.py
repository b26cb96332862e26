"""A small HTTP server around an exported classifier: standard library, onnxruntime or torch, no PEFT, no text encoder.

    peft-vlm export outputs/readme exported
    python examples/serve.py exported/classifier.onnx --port 8000
    curl --data-binary @photo.png "http://127.0.0.1:8000/classify?top_k=3"

On a server without peft_vlm: copy this file and the folder `peft_vlm/serving` beside it, and begin the two imports
with `serving.` instead of `peft_vlm.serving.`.

    GET  /            what the classifier is: classes, preprocessing, origin
    POST /classify    the bytes of an image file -> {"labels": [{"label": ..., "probability": ...}, ...]}

It listens on this machine only, without encryption and log-in: put a web server with both before it. Requests are read
in threads and classified one at a time, since one call already uses all threads that it was given.
"""

import argparse
import json
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

MAX_BYTES = 20_000_000


def load(path: Path, *, threads: int) -> Any:
    """The classifier in a file, by the runtime that its ending names; nothing else is imported."""
    if path.suffix == ".onnx":
        from peft_vlm.serving.onnx import OnnxClassifier

        return OnnxClassifier(path, threads=threads)
    import torch

    from peft_vlm.serving.plain import load_exported

    if threads:
        torch.set_num_threads(threads)
    return load_exported(path)


class RequestError(Exception):
    """A request that cannot be answered, with its HTTP status."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """Answers requests with JSON."""

    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds for a client that stops sending
    server: "ClassifierServer"

    def do_GET(self) -> None:
        """Describe the classifier."""
        self._answer(self._describe)

    def do_POST(self) -> None:
        """Classify an image."""
        self._answer(self._classify)

    def _describe(self) -> Any:
        if urlsplit(self.path).path != "/":
            raise RequestError(HTTPStatus.NOT_FOUND, "There are GET / and POST /classify.")
        return json.loads(self.server.classifier.card.to_json())

    def _classify(self) -> Any:
        address = urlsplit(self.path)
        image = self._body()  # read in any case: an unread body would be taken for the next request
        if address.path != "/classify":
            raise RequestError(HTTPStatus.NOT_FOUND, "There are GET / and POST /classify.")
        try:
            top_k = int(parse_qs(address.query).get("top_k", ["5"])[0])
            with self.server.lock:
                (row,) = self.server.classifier.predict([image], top_k=top_k)
        except ValueError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, str(error)) from error
        return {"labels": [{"label": label, "probability": probability} for label, probability in row]}

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            self.close_connection = True
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "Send the image with a Content-Length.")
        if int(length) > MAX_BYTES:
            self.close_connection = True
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"Images of up to {MAX_BYTES} bytes are accepted.")
        return self.rfile.read(int(length))

    def _answer(self, make: Any) -> None:
        status = HTTPStatus.OK
        try:
            value = make()
        except RequestError as error:
            status, value = error.status, {"error": str(error)}
        content = json.dumps(value, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """One line per request, unless the server is quiet."""
        if not self.server.quiet:
            super().log_message(format, *args)


class ClassifierServer(ThreadingHTTPServer):
    """Holds the classifier that all requests share."""

    def __init__(self, address: tuple[str, int], classifier: Any, *, quiet: bool = False) -> None:
        super().__init__(address, Handler)
        self.classifier, self.quiet, self.lock = classifier, quiet, Lock()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifier", type=Path, help="classifier.onnx or classifier.safetensors of `peft-vlm export`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--threads", type=int, default=0, help="threads of one call; 0: what the runtime chooses")
    args = parser.parse_args()
    server = ClassifierServer((args.host, args.port), load(args.classifier, threads=args.threads))
    host, port = server.server_address[:2]
    print(f"{len(server.classifier.card.class_names)} classes on http://{host!s}:{port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
