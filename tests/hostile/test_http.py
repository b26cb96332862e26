"""Requests of strangers to the example server: a clear answer or the end of the connection, and the next is served."""

import gzip
import http.client
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import quote

import pytest

from examples import serve
from examples.serve import MAX_BYTES
from tests.served import ask, png, raw

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


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
        ("POST", "/classify", {"body": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, 400, "cannot be read"),
        ("POST", "/classify", {"body": b"/etc/hostname"}, 400, "cannot be read as an image"),
        ("POST", "/classify", {"body": b'{"image": "/etc/hostname"}', "headers": JSON}, 400, "cannot be read"),
        ("POST", "/classify", {"body": gzip.compress(png()), "headers": {"Content-Encoding": "gzip"}}, 400, "cannot"),
        ("POST", "/classify", {"body": b"--x\r\n\r\n" + png() + b"\r\n--x--", "headers": FORM}, 400, "cannot be read"),
        ("POST", "/classify?top_k=1&top_k=0", {"body": png()}, 400, "`top_k` of at least 1"),
        ("POST", "/classify?top_k=" + quote("\x1b[31m\n\u202e"), {"body": png()}, 400, "`top_k` of at least 1"),
        ("POST", "/classify?top_k=%ff%00", {"body": png()}, 400, "`top_k` of at least 1"),
        ("GET", "/../../etc/passwd", {}, 404, "GET /"),
        ("GET", "/..%2f..%2fetc%2fpasswd", {}, 404, "GET /"),
        ("GET", "//evil.example/", {}, 404, "GET /"),
        ("TRACE", "/", {"headers": {"Authorization": "secret"}}, 405, "GET /"),
    ],
)
def test_other_requests_are_told_what_is_wrong(client, method, path, options, status, message) -> None:
    """A server that breaks off, or answers 500, teaches nothing."""
    answered, answer = client(method, path, **options)
    assert answered == status
    assert message in answer["error"]
    assert "\n" not in answer["error"]
    assert "\x1b" not in answer["error"]
    assert client("GET", "/health")[0] == 200


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


POST = b"POST /classify HTTP/1.1\r\nHost: x\r\n"
#: Bytes that no client library sends, and the beginning of the answer.
RAW = {
    "a-length-that-python-takes-for-a-digit": (POST + b"Content-Length: \xb2\r\n\r\n", b"400"),
    "a-negative-length": (POST + b"Content-Length: -1\r\n\r\n", b"400"),
    "two-lengths": (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", b"400"),
    "a-list-of-lengths": (POST + b"Content-Length: 1, 2\r\n\r\nab", b"400"),
    "a-length-with-exponent": (POST + b"Content-Length: 1e3\r\n\r\n", b"400"),
    "a-length-with-sign": (POST + b"Content-Length: +3\r\n\r\nabc", b"400"),
    "a-length-with-underscore": (POST + b"Content-Length: 1_0\r\n\r\n0123456789", b"400"),
    "a-length-of-many-digits": (POST + b"Content-Length: " + b"9" * 19 + b"\r\n\r\n", b"4"),
    "another-encoding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", b"400"),
    "two-encodings": (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n", b"400"),
    "a-chunk-of-no-number": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"4"),
    "a-chunk-of-2**80": (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\nabc", b"4"),
    "a-chunk-of-2**400": (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 100 + b"\r\nabc", b"4"),
    "a-zero-in-a-header": (POST + b"A: b\0c\r\n\r\n", b"400"),
    "a-header-over-two-lines": (b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", b"400"),
    "a-space-before-the-colon": (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", b"400"),
    "no-host": (b"GET / HTTP/1.1\r\n\r\n", b"400"),
    "two-hosts": (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", b"400"),
    "no-version": (b"GET /\r\n\r\n", b"400"),
    "http-2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"4"),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00", b"400"),
    "a-name-with-line": (b"GET /a\x0d\x0aX: y HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_http_is_refused_and_the_end(address, monkeypatch, name) -> None:
    """The rest of it would be read as the next request, or waited for."""
    monkeypatch.setattr(serve, "BODY_SECONDS", 1)
    data, status = RAW[name]
    answer = raw(address, data)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"Traceback" not in answer


def test_a_length_beside_chunks_hides_no_request(address) -> None:
    """A web server in front that goes by the length takes the hidden request for part of the image."""
    image, hidden = png(), b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(image), image)
    length = b"Content-Length: %d\r\n" % (len(chunks) + len(hidden))
    answer = raw(address, POST + length + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + hidden)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1 ") == 1


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


@pytest.mark.parametrize("start", [b"", png(), b"POST /classify HTT", b"POST /classify HTTP/1.1\r\nHost: x\r\n"])
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


def test_a_body_that_comes_byte_by_byte_is_408(address, monkeypatch) -> None:
    """Each byte would begin the patience again."""
    monkeypatch.setattr(serve, "BODY_SECONDS", 1)
    begun = time.monotonic()
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\n")
        connection.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() - begun < 10:
            connection.sendall(b"a")
            try:
                answer = connection.recv(1000)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - begun < 5


def test_many_open_connections_leave_room_for_a_request(address, client) -> None:
    """Connections that say nothing cost nothing but themselves."""
    silent = [socket.create_connection(address, timeout=20) for _ in range(300)]
    try:
        assert client("POST", "/classify", body=png())[0] == 200
    finally:
        for connection in silent:
            connection.close()


def test_a_client_that_goes_away_leaves_nothing_behind(address, client) -> None:
    """Half a body, then the end of the connection; the next request is answered."""
    for _ in range(20):
        with socket.create_connection(address) as connection:
            connection.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    assert client("POST", "/classify", body=png())[0] == 200


def test_a_websocket_is_not_opened(client) -> None:
    """The server that runs the example could."""
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "a" * 22 + "==",
        "Sec-WebSocket-Version": "13",
    }
    assert client("GET", "/", headers=headers)[0] in (200, 400, 405, 426)


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
