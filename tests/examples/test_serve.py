"""`examples/serve.py` as clients meet it: labels over HTTP, and clear answers to everything else."""

import http.client
import io
import json
import threading
from urllib.parse import quote

import pytest

from examples.serve import MAX_BYTES, ClassifierServer, load
from peft_vlm.export import plain_classifier
from peft_vlm.text.class_features import encode_classes
from tests.cases import base_model, class_prompts
from tests.tiny import clip_processor, colour_names, noise_image


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running server over a tiny exported classifier."""
    file = tmp_path_factory.mktemp("exported") / "classifier.safetensors"
    model = base_model()
    features = encode_classes(model, class_prompts())
    plain_classifier(model, features, colour_names(), image_processor=clip_processor()).save(file)
    server = ClassifierServer(("127.0.0.1", 0), load(file, threads=0), quiet=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(server):
    """One connection, kept open over several requests."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    yield lambda method, path, **options: ask(connection, method, path, **options)
    connection.close()


def ask(connection, method, path, **options):
    """Status and JSON of an answer."""
    connection.request(method, path, **options)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def png() -> bytes:
    """The bytes of a picture."""
    content = io.BytesIO()
    noise_image(30, 20).save(content, "PNG")
    return content.getvalue()


def test_a_picture_gets_the_labels_of_the_classifier(server, client) -> None:
    """The same labels as without HTTP; a second request on the same connection is answered as well."""
    (expected,) = server.classifier.predict([png()], top_k=2)
    for _ in range(2):
        status, answer = client("POST", "/classify?top_k=2", body=png())
        assert status == 200
        assert [(row["label"], row["probability"]) for row in answer["labels"]] == expected
    status, card = client("GET", "/")
    assert status == 200
    assert card["class_names"] == list(colour_names())


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "message"),
    [
        ("POST", "/classify", {"body": b"no picture"}, 400, "cannot be read as an image"),
        ("POST", "/classify?top_k=0", {"body": png()}, 400, "`top_k` of at least 1"),
        ("POST", "/classify?top_k=" + quote("\u00fc"), {"body": png()}, 400, "invalid literal"),
        ("POST", "/elsewhere", {"body": png()}, 404, "POST /classify"),
        ("GET", "/elsewhere", {}, 404, "GET /"),
        ("POST", "/classify", {"headers": {"Content-Length": str(MAX_BYTES + 1)}}, 413, "Images of up to"),
        ("POST", "/classify", {"headers": {"Transfer-Encoding": "chunked"}, "body": b""}, 411, "Content-Length"),
    ],
)
def test_other_requests_are_told_what_is_wrong(client, method, path, options, status, message) -> None:
    """A server that breaks off, or answers 500, teaches nothing."""
    answered, answer = client(method, path, **options)
    assert answered == status
    assert message in answer["error"]


def test_requests_at_the_same_time_are_all_answered(server) -> None:
    """Threads share one classifier."""
    answers = []

    def request() -> None:
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
        answers.append(ask(connection, "POST", "/classify", body=png()))
        connection.close()

    threads = [threading.Thread(target=request) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0] == 200
