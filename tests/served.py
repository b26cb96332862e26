"""A running `examples/serve.py` around a tiny classifier, and clients of it."""

import http.client
import io
import json
import socket
import threading

import pytest

from examples.serve import load, server_of
from peft_vlm.export import plain_classifier
from peft_vlm.text.class_features import encode_classes
from tests.cases import base_model, class_prompts
from tests.tiny import clip_processor, colour_names, noise_image


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny exported classifier."""
    file = tmp_path_factory.mktemp("exported") / "classifier.safetensors"
    model = base_model()
    features = encode_classes(model, class_prompts())
    plain_classifier(model, features, colour_names(), image_processor=clip_processor()).save(file)
    return file


@pytest.fixture(scope="module")
def address(exported):
    """Host and port of a running server."""
    server, listening = server_of(load(exported, threads=0), quiet=True), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield listening.getsockname()
    server.should_exit = True
    thread.join(20)
    listening.close()
    assert not thread.is_alive()


@pytest.fixture
def client(address):
    """One connection, kept open over several requests."""
    connection = http.client.HTTPConnection(*address, timeout=20)
    yield lambda method, path, **options: ask(connection, method, path, **options)
    connection.close()


def ask(connection, method, path, **options):
    """Status and JSON of an answer."""
    connection.request(method, path, **options)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def png(width: int = 30, height: int = 20) -> bytes:
    """The bytes of an image."""
    content = io.BytesIO()
    noise_image(width, height).save(content, "PNG")
    return content.getvalue()


def raw(address, data: bytes, *, seconds: float = 20) -> bytes:
    """What comes back for bytes that no client library would send, until the server closes."""
    with socket.create_connection(address, timeout=seconds) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)
