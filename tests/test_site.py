"""What the site makes of the repository's pages, and that broken ones are found; `make docs` builds it."""

import importlib.util
import json
from typing import Any

import pytest

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
