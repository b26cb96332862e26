"""`examples/serve.py` as clients meet it: labels over HTTP. What strangers send is in `tests/hostile/test_http.py`."""

import http.client
import io
import json
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from PIL import Image

from examples.serve import load
from tests.served import ask, png
from tests.source_tree import ROOT
from tests.tiny import colour_names


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
