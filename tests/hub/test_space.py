"""A Space that shows a published adapter: its three files, and a Hub that takes them."""

import ast
import json

import pytest
import yaml
from markdown_it import MarkdownIt

from peft_vlm.cli import main
from peft_vlm.errors import HubError
from peft_vlm.hub.publish import SDK_VERSION, publish_space, write_space
from peft_vlm.serving.escape import one_line
from tests.hostile.test_shown_text import INJECTIONS
from tests.hub.adapters import BASE, put_base_model
from tests.source_tree import ROOT
from tests.test_classifier import save_adapter
from tests.tiny import clip_processor, tiny_clip, tiny_tokenizer

FILES = {"app.py", "requirements.txt", "README.md"}


def front_matter(text: str) -> dict:
    """The metadata of a card."""
    return yaml.safe_load(text.split("---\n")[1])


def test_the_command_makes_adapter_and_space(hub, tmp_path, capsys) -> None:
    """The Space must name the adapter as it was published, and a second call change nothing."""
    put_base_model(hub)
    base = tmp_path / "base"
    for part in (tiny_clip(), tiny_tokenizer(), clip_processor()):
        part.save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter")
    words = ["publish", str(adapter), "me/adapter", "--base_model", BASE, "--incomplete", "--license", "mit", "--json"]
    words += ["--space", "me/app", "--space_package", "peft-vlm[app] @ git+https://example.org/x"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["repo_id"] == "me/adapter"
    assert printed["space"]["changed"]
    stored = hub.repositories["space", "me/app"].branches["main"][-1].files
    assert FILES <= set(stored)
    text = {name: stored[name].content.decode() for name in FILES}
    facts = front_matter(text["README.md"])
    assert (facts["sdk"], facts["app_file"], facts["models"]) == ("gradio", "app.py", ["me/adapter"])
    assert facts["license"] == "mit"
    assert text["requirements.txt"] == "peft-vlm[app] @ git+https://example.org/x\n"
    calls = [node for node in ast.walk(ast.parse(text["app.py"])) if isinstance(node, ast.Call)]
    assert any(ast.unparse(call) == "load(['me/adapter'])" for call in calls)
    assert main(words) == 0
    assert not json.loads(capsys.readouterr().out)["space"]["changed"]


@pytest.mark.parametrize("title", INJECTIONS.values())
def test_a_title_of_strangers_stays_text(title: str, tmp_path) -> None:
    """A title comes from a file or a form as often as from a keyboard."""
    write_space(tmp_path, ["me/adapter"], title=title)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert front_matter(card)["title"] == one_line(title)
    page = MarkdownIt().render(card.split("\n---\n\n", 1)[1])
    assert page.count("<h1>") == 1
    assert not [
        mark for mark in ("<script", "<img", '"https://evil.example', "<code", "<em", "<table") if mark in page
    ]


def test_what_cannot_become_a_space_is_refused_before_any_request(hub, tmp_path, capsys) -> None:
    """A wrong name found after the adapter is up would leave half of what was asked for."""
    hub.requests.clear()
    with pytest.raises(HubError, match="`space` to be 'owner/name'"):
        publish_space("no-owner", ["me/adapter"])
    with pytest.raises(HubError, match="`adapters` to be 'owner/name'"):
        publish_space("me/app", ['me/x"]); import os  #'])
    with pytest.raises(HubError, match="one line"):
        write_space(tmp_path, ["me/adapter"], title="t", package="peft-vlm\n--index-url https://evil.example")
    assert main(["publish", "folder", "me/adapter", "--space", "app"]) == 2
    assert "`--space` to be 'owner/name'" in capsys.readouterr().err
    assert main(["publish", "folder", "me/adapter", "--space", "me/app", "--subfolder", "x"]) == 2
    assert "head of its repository" in capsys.readouterr().err
    assert hub.requests == []


def test_the_space_runs_the_version_that_is_tested() -> None:
    """Another version of Gradio may draw another page, or none."""
    assert f"gradio=={SDK_VERSION}" in (ROOT / "constraints.txt").read_text()
