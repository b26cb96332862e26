"""`examples/serve.py` as clients meet it: labels over HTTP, and clear answers to everything else."""

import http.client
import io
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import quote

import pytest
from PIL import Image

from examples import serve
from examples.serve import MAX_BYTES, load, server_of
from peft_vlm.export import plain_classifier
from peft_vlm.text.class_features import encode_classes
from tests.cases import base_model, class_prompts
from tests.source_tree import ROOT
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


def test_an_image_gets_the_labels_of_the_classifier(exported, client) -> None:
    """The same labels as without HTTP; a second request on the same connection is answered as well."""
    classifier = load(exported, threads=0)
    (expected,) = classifier.predict([png()], top_k=2)
    for _ in range(2):
        status, answer = client("POST", "/classify?top_k=2", body=png())
        assert status == 200
        assert [(row["label"], row["probability"]) for row in answer["labels"]] == expected
    status, card = client("GET", "/")
    assert status == 200
    assert card["class_names"] == list(colour_names())
    assert client("GET", "/health") == (200, {"status": "ok"})


def test_a_body_in_chunks_is_read_as_well(client) -> None:
    """As `curl -T -` sends a pipe."""
    parts = iter([png()[:50], png()[50:]])
    assert client("POST", "/classify", body=parts, encode_chunked=True)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "message"),
    [
        ("POST", "/classify", {"body": b"no image"}, 400, "cannot be read as an image"),
        ("POST", "/classify", {"body": b""}, 400, "cannot be read as an image"),
        ("POST", "/classify?top_k=0", {"body": png()}, 400, "`top_k` of at least 1"),
        ("POST", "/classify?top_k=-1", {"body": png()}, 400, "`top_k` of at least 1"),
        ("POST", "/classify?top_k=" + "9" * 5000, {"body": png()}, 400, "`top_k` of at least 1"),
        ("POST", "/classify?top_k=" + quote("\u00b2"), {"body": png()}, 400, "`top_k` of at least 1"),
        ("POST", "/elsewhere", {"body": png()}, 404, "POST /classify"),
        ("GET", "/elsewhere", {}, 404, "GET /"),
        ("GET", "/classify", {}, 405, "POST /classify"),
        ("DELETE", "/", {}, 405, "GET /"),
        ("POST", "/classify", {"headers": {"Content-Length": str(MAX_BYTES + 1)}}, 413, "Images of up to"),
        ("POST", "/classify", {"headers": {"Content-Length": "9" * 18}}, 413, "Images of up to"),
        ("POST", "/classify", {"body": png(8000, 1)}, 400, "at most 200 times as long as wide"),
    ],
)
def test_other_requests_are_told_what_is_wrong(client, method, path, options, status, message) -> None:
    """A server that breaks off, or answers 500, teaches nothing."""
    answered, answer = client(method, path, **options)
    assert answered == status
    assert message in answer["error"]


def test_a_body_without_length_is_counted(client, monkeypatch) -> None:
    """Chunks have no length to look at."""
    monkeypatch.setattr(serve, "MAX_BYTES", 100)
    status, answer = client("POST", "/classify", body=iter([b"x" * 60] * 2), encode_chunked=True)
    assert status == 413
    assert "Images of up to 100 bytes" in answer["error"]


def test_all_bodies_together_are_counted(client, monkeypatch) -> None:
    """Four hundred images of 20 MB are 8 GB; what was held is given back after every answer."""
    monkeypatch.setattr(serve, "MAX_HELD_BYTES", 3000)
    assert client("POST", "/classify", body=b"x" * 4000)[0] == 503
    for _ in range(5):
        assert client("POST", "/classify", body=png(9, 9))[0] == 200


def raw(address, data: bytes, *, seconds: float = 20) -> bytes:
    """What comes back for bytes that no client library would send, until the server closes."""
    with socket.create_connection(address, timeout=seconds) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: \xb2\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1e3\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
)
def test_what_is_no_http_is_400_and_the_end(address, head) -> None:
    """`Content-Length: \xb2` is a digit for Python, and no number."""
    assert raw(address, head).startswith(b"HTTP/1.1 400")


def test_a_head_without_end_is_refused(address) -> None:
    """Memory for as long a head as somebody likes to send."""
    with socket.create_connection(address, timeout=20) as connection, pytest.raises(OSError):  # noqa: PT011, PT012
        for _ in range(1000):
            connection.sendall(b"a" * 100_000)


def test_the_body_of_a_get_is_not_the_next_request(address) -> None:
    """A request that a web server in front let through as a body would be answered as one."""
    inner = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(inner)
    last = b"GET /elsewhere HTTP/1.1\r\nHost: x\r\n\r\n"
    answers = raw(address, head + inner + last)
    assert b'"status"' not in answers
    assert answers.count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 404" in answers


@pytest.mark.parametrize("start", [b"", b"POST /classify HTT", b"POST /classify HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(address, monkeypatch, start) -> None:
    """A byte every ten seconds keeps a connection for ever."""
    monkeypatch.setattr(serve, "HEAD_SECONDS", 1)
    begun = time.monotonic()
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(start)
        assert connection.recv(100) == b""
    assert time.monotonic() - begun < 10


def test_a_body_that_does_not_come_is_408(address, monkeypatch) -> None:
    """A client that stops, or sends a byte now and then."""
    monkeypatch.setattr(serve, "BODY_SECONDS", 1)
    answer = raw(address, b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"Send the image within 1 seconds" in answer


def test_a_client_that_goes_away_leaves_nothing_behind(address, client) -> None:
    """Half a body, then the end of the connection; the next request is answered."""
    for _ in range(20):
        with socket.create_connection(address) as connection:
            connection.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    assert client("POST", "/classify", body=png())[0] == 200


def test_four_hundred_requests_at_the_same_time_are_all_answered(address) -> None:
    """They share one classifier; half of them are no images."""
    ready = threading.Barrier(400)

    def request(number: int):
        with closing(http.client.HTTPConnection(*address, timeout=120)) as connection:
            connection.connect()
            ready.wait(60)
            return ask(connection, "POST", "/classify", body=png() if number % 2 else b"no image")

    with ThreadPoolExecutor(400) as pool:
        answers = list(pool.map(request, range(400)))
    assert [status for status, _ in answers] == [400, 200] * 200
    assert all(answer == answers[1] for answer in answers[1::2])


def test_health_is_answered_while_images_wait(address) -> None:
    """A server that is busy is not dead."""
    large = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(large, "PNG", compress_level=1)

    def classify(_: int):
        with closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
            return ask(connection, "POST", "/classify", body=large.getvalue())[0]

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(classify, number) for number in range(8)]
        time.sleep(0.2)
        begun = time.monotonic()
        with closing(http.client.HTTPConnection(*address, timeout=20)) as connection:
            assert ask(connection, "GET", "/health") == (200, {"status": "ok"})
        assert time.monotonic() - begun < 3
        assert [job.result() for job in jobs] == [200] * 8


def test_the_script_serves_and_ends_by_a_signal(exported) -> None:
    """What the page says to type."""
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), str(exported), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            line = process.stdout.readline()
            address = line.split()[-1]
            for _ in range(100):
                try:
                    with urllib.request.urlopen(f"{address}health", timeout=5) as answer:
                        assert json.loads(answer.read()) == {"status": "ok"}
                    break
                except OSError:
                    time.sleep(0.1)
            process.terminate()
            assert process.wait(20) in (0, -15)
        finally:
            process.kill()
