"""The app in a real browser: Debian's Chromium, headless, driven by Playwright. `make test-browser` runs it.

With APP_SCREENSHOTS=folder every view is written there, at 1400 and 400 px.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import WIDTHS, browser  # noqa: F401 - a fixture
from tests.source_tree import ROOT

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

BUNDLED = ["skip-tuning-emoji", "coop-emoji", "maple-emoji", "promptkd-icons", "tvp-lamplight"]
OPTIONS = ["--test", "examples/assets/emoji", "--models", "examples/assets/mllm_paligemma", "--device", "cpu"]


@pytest.fixture(scope="module")
def url():
    """Address of the app on bundled adapters."""
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    words = ["app", *(f"model_cards/{name}" for name in BUNDLED), *OPTIONS, "--question", "what colour is it?"]
    words += ["--examples", *map(str, sorted(ROOT.glob("docs/images/lamplight/*.png")))]
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_vlm.cli", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    lines = iter(process.stdout.readline, "")
    yield next(line.split()[4] for line in lines if line.startswith("The app is at"))
    process.terminate()
    process.communicate(timeout=30)


@pytest.fixture(params=WIDTHS)
def page(request, browser, url):  # noqa: F811
    """The app as it opens; every request but to its own server fails the test, as do errors in the console."""
    opened = browser.new_page(viewport={"width": request.param, "height": 900})
    asked: list[str] = []
    wrong: list[str] = []
    opened.on("request", lambda sent: asked.append(sent.url))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.goto(url)
    opened.wait_for_selector("#result .peft-card")
    yield opened
    opened.close()
    assert not [address for address in asked if not address.startswith((url, "data:", "blob:"))]
    assert not wrong


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """An image that is not among the test images."""
    from PIL import Image

    path = tmp_path_factory.mktemp("photo") / "red.png"
    Image.new("RGB", (300, 200), (220, 30, 30)).save(path)
    return path


def shoot(page, name: str) -> None:
    """Write a screenshot where one is wanted, and refuse a page that is wider than its window."""
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if folder := os.environ.get("APP_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder, f"{name}_{width}.png")), full_page=True)


def choose_file(page, place: str, path: Path) -> None:
    """Replace the image of an input."""
    clear = page.locator(f"{place} button[aria-label='Remove Image'], {place} button[aria-label='Clear']")
    if clear.count():
        clear.first.click()
    page.locator(f"{place} input[type=file]").first.set_input_files(str(path))


def wait_for_text(page, text: str, *, place: str = "#result") -> None:
    """Wait until a place of the page holds a text."""
    page.wait_for_function(
        "([place, text]) => document.querySelector(place).innerText.includes(text)", arg=[place, text], timeout=120_000
    )


def wait_for_cards(page, count: int, *, place: str = "#result") -> None:
    """Wait until so many cards are there."""
    page.wait_for_function(
        "([place, count]) => document.querySelectorAll(place + ' .peft-card').length == count",
        arg=[place, count],
        timeout=120_000,
    )


def test_upload_edit_and_compare(page, photo: Path) -> None:
    """An image of one's own, other classes, another template, fewer adapters: the cards follow each."""
    page.wait_for_selector("#examples img")
    assert page.locator("#result .peft-card").count() == 4
    assert page.locator("#examples .caption-label").count() == 12
    shoot(page, "compare")
    choose_file(page, "#image", photo)
    page.fill("#classes textarea", "red square\nblue circle\n<b>cat</b>")
    wait_for_text(page, "<b>cat</b>")
    assert page.locator("#result .peft-bar").count() == 12
    page.fill("#template textarea, #template input", "art of the {}")
    wait_for_text(page, "template: art of the {}")
    page.get_by_label("coop-emoji").first.uncheck()
    wait_for_cards(page, 3)


def test_errors_stand_on_the_page(page, tmp_path: Path) -> None:
    """A bad file, no classes, a wrong template, an adapter that cannot: a sentence each, and the page goes on."""
    page.get_by_label("promptkd-icons").first.check()
    page.wait_for_selector("#result .peft-card .peft-error")
    assert "no class vector" in page.locator("#result .peft-error").inner_text()
    page.fill("#template textarea, #template input", "no place")
    wait_for_text(page, "exactly once")
    shoot(page, "errors")
    page.fill("#template textarea, #template input", "")
    page.fill("#classes textarea", "")
    wait_for_text(page, "Write one per line")
    page.fill("#classes textarea", "\n".join(f"class {number} {'long ' * 8}" for number in range(300)))
    wait_for_text(page, "class ")
    page.wait_for_selector("#result .peft-bar .peft-label[title*='long long']")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    choose_file(page, "#image", bad)
    wait_for_text(page, "its content is no image")


def test_measure_and_pixel_prompt(page, photo: Path) -> None:
    """Both plots are drawn; the slider changes the prompted image, and each model answers about both images."""
    page.get_by_role("tab", name="Test").click()
    page.click("#measure")
    page.wait_for_selector("#confusion img", timeout=120_000)
    assert "accuracy" in page.locator("#scores").inner_text()
    shoot(page, "test_images")
    page.get_by_role("tab", name="Pixel prompt").click()
    wait_for_cards(page, 4, place="#prompt_result")
    page.wait_for_selector("#prompted img")
    shoot(page, "prompt")
    before = page.locator("#prompted img").first.get_attribute("src")
    page.locator("#strength input[type=number]").fill("0.3")
    page.locator("#strength input[type=number]").press("Tab")
    page.wait_for_function(f"document.querySelector('#prompted img').src != {before!r}")
    choose_file(page, "#prompt_image", photo)
    wait_for_cards(page, 4, place="#prompt_result")
