"""The page around it, served by `peft-vlm app`: errors in words, many requests at a time, nothing sent elsewhere."""

import json
import os
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from peft_vlm.cli import main
from tests.hub.adapters import write_images
from tests.source_tree import ROOT
from tests.tiny import noise_image

#: The command in a process of its own, in which connections to any other machine fail.
GUARDED = """
import signal, sys
from tests.hub.guard import allow_loopback_only
from peft_vlm.cli import main
allow_loopback_only()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins by ignoring it
sys.exit(main(sys.argv[1:]))
"""


def needs_gradio() -> None:
    """Skip where the extra is not installed."""
    pytest.importorskip("gradio", reason="the extra `app` is not installed")


@pytest.fixture(scope="module")
def url(app_adapter, tmp_path_factory):
    """Address of the running app, which ends like any command on Ctrl-C."""
    needs_gradio()
    test = write_images(tmp_path_factory.mktemp("colours"))
    words = ["app", str(app_adapter), "--test", str(test), "--device", "cpu", "--json"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", GUARDED, *words], env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    line = "".join(process.stdout.readline() for _ in range(3))
    assert line, process.communicate()[1]
    yield json.loads(line)["url"]
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, ""), errors
    assert "interrupted" in errors


def call(url: str, *data: object) -> str:
    """The HTML that the page shows for an image, classes, a template and adapters."""
    event = httpx.post(f"{url}gradio_api/call/compare", json={"data": data}, timeout=60, trust_env=False).json()
    answer = httpx.get(f"{url}gradio_api/call/compare/{event['event_id']}", timeout=120, trust_env=False).text
    assert "event: complete" in answer, answer
    return json.loads(answer.split("data: ", 1)[1])[0]


def upload(url: str, file: Path) -> dict[str, object]:
    """A file as the page hands it over."""
    files = {"files": (file.name, file.read_bytes())}
    (path,) = httpx.post(f"{url}gradio_api/upload", files=files, timeout=60, trust_env=False).json()
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def test_the_functions_behind_the_page_say_what_is_wrong(comparison, labelled, tmp_path: Path) -> None:
    """Every wrong entry must end in a sentence on the page, without the folder that an upload lies in."""
    needs_gradio()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Gradio's own imports
        from peft_vlm.app import page as app_page
    show = app_page.shown_answers(comparison)
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    noise_image(30, 20).save(good)
    bad.write_bytes(b"no image")
    chosen = list(comparison.adapters)
    assert "Choose an image" in show(None, "a\nb", "", chosen)
    assert "peft-error" in show(str(bad), "a\nb", "", chosen)
    assert str(tmp_path) not in show(str(bad), "a\nb", "", chosen)
    assert "got none" in show(str(good), "", "", chosen)
    assert show(str(good), "a\nb", "no place", chosen).count("exactly once") == 2
    assert show(str(good), "\n".join(f"class {i}" for i in range(300)), "", chosen).count("peft-bar") == 10
    long = show(str(good), "a\n" + "very long " * 400, "", chosen)
    assert long.count('role="alert"') == 2
    assert len(long) < 4000
    assert "&lt;b&gt;" in show(str(good), "<b>x</b>\nb", "", chosen)
    measure = app_page.measured(comparison, labelled)
    table, calibration, confusion = measure(chosen[0])
    assert "accuracy" in table
    assert min(*calibration.size, *confusion.size) > 200
    assert "Expected one of" in measure("other")[0]


def test_twenty_quick_requests_are_all_answered(url, tmp_path: Path) -> None:
    """A person who types or drags sends many; each gets the answer to its own image and classes."""
    good, bad = tmp_path / "image.png", tmp_path / "bad.png"
    noise_image(30, 20).save(good)
    bad.write_bytes(b"no image")
    file = upload(url, good)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda number: call(url, file, f"number {number}\nother", "", []), range(20)))
    for number, answer in enumerate(answers):
        assert f">number {number}<" in answer
        assert answer.count("peft-bar") == 2
    assert "peft-error" in call(url, upload(url, bad), "a\nb", "", [])


def test_files_of_the_machine_are_no_images_of_the_page(url) -> None:
    """Whoever reaches the page must not read files of the machine by naming their path."""
    event = httpx.post(
        f"{url}gradio_api/call/compare",
        json={
            "data": [{"path": str(ROOT / "docs/results.png"), "meta": {"_type": "gradio.FileData"}}, "a\nb", "", []]
        },
        trust_env=False,
    ).json()
    answer = httpx.get(f"{url}gradio_api/call/compare/{event['event_id']}", timeout=60, trust_env=False).text
    assert "peft-bar" not in answer


def test_the_page_asks_no_other_machine_for_anything(url) -> None:
    """Whoever opens the app must not be seen by others: no web fonts, no analytics, no share link."""
    config = httpx.get(f"{url}config", trust_env=False).json()
    assert config["analytics_enabled"] is False
    assert not [sheet for sheet in config.get("stylesheets") or [] if "//" in sheet]
    assert "share" not in json.dumps([c["props"].get("buttons") for c in config["components"]])
    css = httpx.get(f"{url}theme.css", trust_env=False).text
    assert len(css) > 1000
    assert "googleapis" not in css
    assert "@import" not in css


def test_without_gradio_the_command_says_what_to_install(app_adapter, monkeypatch, capsys) -> None:
    """The extra is not installed by default; the import error of a file inside would name none."""
    monkeypatch.setattr("peft_vlm.cli.app.find_spec", lambda name: None)
    assert main(["app", str(app_adapter)]) == 2
    assert "pip install 'peft-vlm[app]'" in capsys.readouterr().err
