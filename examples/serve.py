"""A small HTTP server around an exported classifier: Starlette and uvicorn, onnxruntime or torch, no PEFT.

    pip install "peft-vlm[serve,onnx]"
    peft-vlm export outputs/readme exported
    python examples/serve.py exported/classifier.onnx --port 8000
    curl --data-binary @photo.png "http://127.0.0.1:8000/classify?top_k=3"

On a server without peft_vlm: copy this file and the folder `peft_vlm/serving` beside it, and begin the imports with
`serving.` instead of `peft_vlm.serving.`.

    GET  /            the classifier: classes, preprocessing, origin
    GET  /health      {"status": "ok"} as long as the server answers
    POST /classify    the bytes of an image file -> {"labels": [{"label": ..., "probability": ...}, ...]}

It listens on this machine only and has no log-in: put a web server with both before it. Images are decoded a few at a
time and classified one at a time, since one call already uses all threads that it was given. A request may be so large
and take so long as the constants below say; all requests together may hold so many bytes.
"""

import argparse
import asyncio
import json
import socket
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from anyio import CapacityLimiter, to_thread
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from peft_vlm.serving.errors import PeftVLMError

MAX_BYTES = 20_000_000
MAX_HELD_BYTES = 500_000_000  # bodies of all requests that are being answered
MAX_PIXELS = 25_000_000  # 100 MB when decoded
HEAD_SECONDS = 10  # for a client to send the head of a request
BODY_SECONDS = 30  # and for its body
DECODERS = 2
#: The rest of such a body is not read, so that the connection cannot go on.
CLOSE = {"Connection": "close"}


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


class Endpoints:
    """Answers requests with JSON."""

    def __init__(self, classifier: Any) -> None:
        self.classifier, self.held = classifier, 0
        self.card = json.loads(classifier.card.to_json())
        self.decoders, self.network = CapacityLimiter(DECODERS), CapacityLimiter(1)

    async def describe(self, request: Request) -> Response:
        """Describe the classifier."""
        return JSONResponse(self.card)

    async def health(self, request: Request) -> Response:
        """Say that the server answers."""
        return JSONResponse({"status": "ok"})

    async def classify(self, request: Request) -> Response:
        """Classify an image."""
        top_k = request.query_params.get("top_k", "5")
        if not (top_k.isascii() and top_k.isdecimal() and 1 <= int(top_k[:9]) and len(top_k) < 10):
            raise HTTPException(400, f"Expected `top_k` of at least 1, got {top_k[:20]!r}.", CLOSE)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                await self._read(request, body)
            images = [bytes(body)]
            # decoding needs no model: only the network waits for its turn
            pixels = await to_thread.run_sync(self.classifier.prepare, images, limiter=self.decoders)
            run = partial(self.classifier.classify, pixels, top_k=int(top_k))
            (row,) = await to_thread.run_sync(run, limiter=self.network)
        except TimeoutError as error:
            raise HTTPException(408, f"Send the image within {BODY_SECONDS} seconds.", CLOSE) from error
        except PeftVLMError as error:
            raise HTTPException(400, str(error)) from error
        finally:
            self.held -= len(body)
        return JSONResponse({"labels": [{"label": label, "probability": value} for label, value in row]})

    async def _read(self, request: Request, body: bytearray) -> None:
        """Read a body, as long as it and all others together are not too large."""
        length = request.headers.get("content-length", "0")
        if "content-length" in request.headers and "transfer-encoding" in request.headers:
            raise HTTPException(
                400, "Send a length or chunks, not both.", CLOSE
            )  # a server in front may take the other
        if len(length) > 18 or int(length) > MAX_BYTES:  # h11 lets digits through only
            raise HTTPException(413, f"Images of up to {MAX_BYTES} bytes are accepted.", CLOSE)
        async for chunk in request.stream():
            body += chunk
            self.held += len(chunk)
            if len(body) > MAX_BYTES:
                raise HTTPException(413, f"Images of up to {MAX_BYTES} bytes are accepted.", CLOSE)
            if self.held > MAX_HELD_BYTES:
                raise HTTPException(503, "Too many images at a time. Send it again.", CLOSE)


async def refuse(request: Request, error: Exception) -> Response:
    """The answer to a request that cannot be answered."""
    assert isinstance(error, HTTPException)
    paths = "There are GET /, GET /health and POST /classify."
    message = paths if error.status_code in (404, 405) else error.detail
    return JSONResponse({"error": message}, error.status_code, headers=dict(error.headers or {}) | CLOSE)


async def forget(request: Request, error: Exception) -> Response:
    """Nobody waits for an answer any more."""
    return Response(status_code=400)


def application(classifier: Any) -> Starlette:
    """The ASGI application of a classifier, for any server."""
    endpoints = Endpoints(classifier)
    routes = [
        Route("/", endpoints.describe, methods=["GET"]),
        Route("/health", endpoints.health, methods=["GET"]),
        Route("/classify", endpoints.classify, methods=["POST"]),
    ]
    handlers: Any = {HTTPException: refuse, ClientDisconnect: forget}
    return Starlette(routes=routes, exception_handlers=handlers)


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which waits for the head of a request for ever, with an end to that."""

    def connection_made(self, transport: Any) -> None:
        """Begin to look at the connection."""
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self._look, None)

    def _look(self, seen: Any) -> None:
        """Close the connection if no request has come since the last look."""
        if self.transport.is_closing():
            return
        if self.cycle is seen and (seen is None or seen.response_complete):
            self.transport.close()
        else:
            self.loop.call_later(HEAD_SECONDS, self._look, self.cycle)


def server_of(classifier: Any, *, quiet: bool = False) -> uvicorn.Server:
    """A uvicorn server with limits; `run(sockets=[...])` serves."""
    level = "error" if quiet else "info"
    config = uvicorn.Config(
        application(classifier),
        http=ImpatientProtocol,
        ws="none",
        log_level=level,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=10,
        limit_concurrency=1000,
        backlog=1000,
    )
    return uvicorn.Server(config)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifier", type=Path, help="classifier.onnx or classifier.safetensors of `peft-vlm export`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--threads", type=int, default=0, help="threads of one call; 0: what the runtime chooses")
    args = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    server = server_of(load(args.classifier, threads=args.threads))
    with socket.create_server((args.host, args.port), backlog=1000) as listening:
        host, port = listening.getsockname()[:2]
        print(f"Serving {args.classifier} on http://{host!s}:{port}/", flush=True)
        server.run(sockets=[listening])


if __name__ == "__main__":
    main()
