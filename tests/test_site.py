"""What the site makes of the repository's pages, and that broken ones are found; `make docs` builds it."""

import importlib.util
import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.browser import WIDTHS, browser  # noqa: F401 - a fixture
from tests.source_tree import ROOT


@pytest.fixture
def build(tmp_path, monkeypatch) -> Any:
    """The building script, which writes below a folder of the test."""
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs/site/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAGES", tmp_path / "pages")
    monkeypatch.setattr(module, "SITE", tmp_path / "site")
    return module


def test_pages_keep_their_places_and_lose_what_only_the_repository_knows(build) -> None:
    """A fence with a second word is no fence for the site: everything behind it became code."""
    build.stage()
    pages = {path.relative_to(build.PAGES).as_posix(): path.read_text() for path in build.PAGES.rglob("*.md")}
    assert {"README.md", "docs/index.md", "docs/methods/tvp.md", "examples/notebooks/first_adapter.md"} <= set(pages)
    assert "```python no-run" in (ROOT / "docs/methods/skip_tuning.md").read_text()
    assert not [name for name, text in pages.items() if "\n```python " in text]
    assert "](examples)" in (ROOT / "README.md").read_text()
    assert "](examples)" not in pages["README.md"]  # there is no such page
    assert "](methods/index.md)" in pages["docs/first_hour.md"]
    assert not [name for name, text in pages.items() if ".ipynb)" in text]


def test_a_notebook_becomes_a_page_with_its_outputs(build, tmp_path) -> None:
    """Cells without their outputs would show a reader half of it."""
    image = {"data": {"image/png": "iVBORw0KGgo=", "text/plain": ["<image>"]}, "output_type": "display_data"}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text."]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [{"output_type": "stream", "text": ["1\n"]}, image]},
    ]
    notebook = tmp_path / "one.ipynb"
    notebook.write_text(json.dumps({"cells": cells}))
    expected = "# Title\nText.\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n![output](one-1-1.png)\n"
    assert build.as_markdown(notebook) == expected
    assert (tmp_path / "one-1-1.png").read_bytes().startswith(b"\x89PNG")


def test_dead_links_anchors_and_foreign_files_are_found(build) -> None:
    """MkDocs lets an anchor of a heading that a broken fence swallowed pass."""
    build.SITE.mkdir()
    for number in range(20):
        (build.SITE / f"{number}.html").write_text('<h1 id="here">x</h1><a href="0.html#here">y</a>')
    assert build.problems() == []
    (build.SITE / "1.html").write_text(
        '<a href="0.html#gone">a</a><a href="gone.html">b</a><script src="https://cdn.example/x.js"></script>'
        '<a href="https://example.org">fine</a>'
    )
    found = build.problems()
    assert [problem.partition(":")[0].partition(" loads")[0] for problem in found] == ["1.html"] * 3
    assert "no anchor for 0.html#gone" in " ".join(found)


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address():
    """The built site on a server of its own."""
    subprocess.run([sys.executable, "docs/site/build.py"], cwd=ROOT, check=True, capture_output=True, timeout=300)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(ROOT / "build" / "site")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.browser
@pytest.mark.timeout(600)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_reader_finds_a_method_by_the_front_page_and_by_search(width, address, browser) -> None:  # noqa: F811
    """In a real browser, on a screen and on a phone, without a request to another machine."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/index.html")
    assert page.locator("h1").first.inner_text().startswith("peft_vlm")
    page.locator("article a", has_text="Skip Tuning").first.click()
    page.wait_for_url("**/docs/methods/skip_tuning.html")
    assert page.locator("h1").first.inner_text().startswith("Skip Tuning")
    assert page.locator("article").bounding_box()["width"] <= width
    if width < 600:
        page.locator(".md-header__button[for=__search]").click()
    page.locator("[data-md-component=search-query]").press_sequentially("counterfactual")
    page.wait_for_selector(".md-search-result__item")
    assert "CPL" in page.locator(".md-search-result__list").inner_text()
    page.close()
    assert len(asked) >= 10
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
