"""Text of strangers on cards and terminals: headings, links, HTML, front matter, escape sequences, directions."""

import csv
import io
import json
import logging
import re
import shutil
import unicodedata
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from peft_vlm.cli import main
from peft_vlm.data.splits import few_shot_indices
from peft_vlm.errors import DataError, HubError, PeftVLMWarning
from peft_vlm.evaluation.plots import bars_png, confusion_matrix_png
from peft_vlm.evaluation.transfer import PromptEffect, TransferReport, transfer_table
from peft_vlm.files import BASELINE_NAME, CONFIG_NAME, REPORT_NAME, SUMMARY_NAME
from peft_vlm.hub import AdapterFolder, render_card
from peft_vlm.serving.errors import ExportedFileError
from peft_vlm.serving.escape import (
    code_span,
    markdown,
    one_line,
    printable,
    printable_json,
    python_string,
    spreadsheet_cell,
)
from peft_vlm.serving.images import say_left_out
from tests.hostile.attack import obeyed
from tests.hostile.folders import change
from tests.tiny import noise_image

#: What a stranger writes where a name belongs.
INJECTIONS = {
    "heading": "x\n\n# Official release",
    "heading-at-once": "# Official release",
    "underlined-heading": "x\n===",
    "list": "- x\n- y",
    "numbers": "1. x",
    "link": "[log in](https://evil.example)",
    "image": "![x](https://evil.example/x.png)",
    "reference": "[x]\n\n[x]: https://evil.example",
    "address": "<https://evil.example>",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "entity": "&lt;b&gt; &#60;b&#62;",
    "emphasis": "*a* _b_ **c** __d__ ~~e~~",
    "code": "` <b>x</b> `` ```",
    "fence": "```\n<b>x</b>\n```",
    "quote": '"); import os; os.system("x")  # \\',
    "backslash": "\\`<b>\\|",
    "table": "a | b |\n| --- | --- |",
    "front-matter": "x\n---\nlicense: mit\n---\n",
    "yaml": "x: [y, {z: !!python/object/apply:os.system [ls]}]",
    "template": "{{ config }} {% raw %} {}",
    "maths": "$x$ $$y$$",
    "colours": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "one-byte-sequence": "\x9b31m",
    "return": "ok\r\rfailed",
    "lines": "a\r\nb\nc\x0bd\x0ce\x85f\u2028g\u2029h",
    "direction": "\u202egnp.exe\u202c \u2066x\u2069",
    "nothing-seen": "a\u200b\ufeffb\x00",
    "half-a-letter": "\udcff",
    "tags": "\U000e0041",
}
#: What is no attack, and is read as it was written.
HARMLESS = [
    "a photo of a {}.",
    "caf\u00e9",
    "\u732b",
    "\u0645\u06cc\u200c\u062e\u0648\u0627",
    "my_icons",
    "\U0001f468\u200d\U0001f469",
    "3-d",
    "1",
]
RENDER = MarkdownIt("gfm-like", {"html": True, "linkify": False})


def shown_as(rendered: str) -> str:
    """The text of a rendered paragraph."""
    return re.sub(r"</?(p|code)>", "", rendered).strip("\n")


@pytest.mark.parametrize("name", INJECTIONS)
def test_no_text_is_more_than_text(name: str) -> None:
    """A heading, a link or a script on somebody's card; a command to somebody's terminal."""
    text = INJECTIONS[name]
    for line in (printable(text), one_line(text), markdown(text), code_span(text), python_string(text)):
        assert "\n" not in line
        assert not obeyed(line)
    assert eval(python_string(text), {}) == text
    for escape in (markdown, code_span):
        for before, after in (
            ("", ""),
            ("- ", ""),
            ("# ", ""),
            (
                "Made of ",
                ", ",
            ),
        ):
            rendered = RENDER.render(f"{before}{escape(text)}{after}\n")
            allowed = {"p", "code", *({"li", "ul"} if before == "- " else {"h1"} if before == "# " else ())}
            assert set(re.findall(r"</?([a-z0-9]+)", rendered)) <= allowed, rendered
        row = RENDER.render(f"| a | b |\n| --- | --- |\n| {escape(text)} | end |\n")
        assert row.count("<td>") == 2, row
        assert "<td>end</td>" in row
        assert not set(re.findall(r"</?([a-z0-9]+)", row)) - {"table", "thead", "tbody", "tr", "th", "td", "code"}, row


@pytest.mark.parametrize("text", HARMLESS)
def test_usual_names_stay_as_they_are(text: str) -> None:
    """Escaped wherever one can, a card would be unreadable as a file."""
    assert printable(text) == one_line(text) == text
    assert shown_as(RENDER.render(markdown(text))) == shown_as(RENDER.render(code_span(text))) == text
    assert spreadsheet_cell(text) == text


@pytest.mark.parametrize("name", INJECTIONS)
def test_json_for_a_terminal_has_the_same_values(name: str) -> None:
    """A script must read what is there, a terminal must not obey it."""
    value = {INJECTIONS[name]: [INJECTIONS[name], "caf\u00e9"]}
    text = printable_json(json.dumps(value, ensure_ascii=False, indent=2))
    assert json.loads(text) == value
    assert not obeyed(text)
    assert "caf\u00e9" in text


@pytest.mark.parametrize("cell", ["=cmd|' /C calc'!A0", "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_cell_is_no_formula(cell: str) -> None:
    """A spreadsheet runs what stands in a class name."""
    file = io.StringIO()
    csv.writer(file).writerow([spreadsheet_cell(cell), "x"])
    file.seek(0)
    assert next(csv.reader(file)) == [f"'{cell}", "x"]


@pytest.mark.parametrize("kind", [DataError, HubError, ExportedFileError, PeftVLMWarning])
def test_messages_are_one_line(kind: type[Exception]) -> None:
    """A traceback, a log and a terminal show what a file of a stranger says."""
    text = "\n".join(INJECTIONS.values())
    assert "\n" not in str(kind(text))
    assert not obeyed(str(kind(text)))
    assert str(kind("a\n  b")) == "a b"
    if issubclass(kind, Warning):
        assert not obeyed(warnings.formatwarning(kind(text), kind, "x.py", 1, ""))


def test_log_lines_are_one_line(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A second line in a log is a line that nobody wrote."""
    names = list(INJECTIONS.values())
    with caplog.at_level(logging.WARNING):
        few_shot_indices([0, 1], shots=2, seed=1, class_names=names[:2], strict=False)
        say_left_out(tmp_path, {f"files {name!r} and {name}": 1 for name in names})
    assert len(caplog.records) == 2
    for record in caplog.records:
        assert "\n" not in record.getMessage()
        assert not obeyed(record.getMessage())


def poison(folder: Path, text: str) -> None:
    """Write a text wherever a stranger can write one into an adapter folder."""
    change(
        template=f"{text} {{}}",
        class_names=["a", f"b {readable_of(text)}", "c", "d", "e", "f"],
        base_model_name_or_path=text,
        revision=text,
        peft_vlm_version=text,
    )(folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["base_architecture"]["model_type"] = "clip"
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    summary = {
        "objective": {text: text, "weight": text},
        "training": {"seed": text, text + "2": text},
        "data": {"num_images": 3, "num_classes": 2},
        "steps": 4,
        "metrics": {"train_loss": 1.0},
        "environment": {text: text},
    }
    (folder / SUMMARY_NAME).write_text(json.dumps(summary))
    report = {
        **{"protocol": text, "model": text, "adapter": text, "dataset": f"{text} ({text})", "template": [text]},
        **{"scores": {text: 50.0}, "parts": {text: {"num_images": 3}, f"{text}2": {"num_images": 4}}},
        **{"note": text, "versions": {text: text}},
    }
    for name in (REPORT_NAME, BASELINE_NAME):
        (folder / name).write_text(json.dumps(report))


def readable_of(text: str) -> str:
    """What may stand in a class name: those that shift the lines of a list are refused."""
    return "".join(letter for letter in text if unicodedata.category(letter) not in ("Cc", "Zl", "Zp", "Cs"))


def outline(card: str) -> list[tuple[str, str, str]]:
    """Blocks of a card, and what its links lead to."""
    blocks = RENDER.parse(card.split("\n---\n", 1)[1])
    found = [(token.type, token.tag, token.info) for token in blocks if token.type not in ("inline", "html_block")]
    found += [(token.type, token.content, "") for token in blocks if token.type == "html_block"]
    for token in blocks:
        for child in token.children or ():
            if child.type in ("link_open", "image", "html_inline", "em_open", "strong_open", "s_open"):
                found.append((child.type, str(child.attrs.get("href", "")), child.content))
    return found


@pytest.mark.parametrize("name", INJECTIONS)
def test_a_card_has_the_parts_that_the_package_writes(copy_of, name: str) -> None:
    """The publisher signs what stands on a card."""
    cards = []
    for text in ("sound", INJECTIONS[name]):
        folder = copy_of("coop")
        poison(folder, text)
        place = {"repo_id": f"me/{text}", "subfolder": text, "license": text}
        cards.append(str(render_card(AdapterFolder.read(folder), **place)))
        shutil.rmtree(folder)
    sound, card = cards
    assert not obeyed(card)
    head = yaml.safe_load(card.split("---\n")[1])
    assert (
        {"license", "library_name", "tags", "model-index"} <= set(head) <= set(yaml.safe_load(sound.split("---\n")[1]))
    )
    assert ModelCard(card).data.license == printable(INJECTIONS[name])
    links = [entry for entry in outline(sound) if "huggingface.co/sound" not in entry[1]]
    assert [entry for entry in outline(card) if "huggingface.co" not in entry[1]] == [
        entry for entry in links if "huggingface.co" not in entry[1]
    ]
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    compile(code, "card", "exec")


@pytest.mark.parametrize("as_json", [False, True])
def test_info_obeys_no_adapter(copy_of, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    """Looking at a folder must be safe."""
    folder = copy_of("coop")
    poison(folder, "".join(INJECTIONS.values()).replace("\udcff", ""))
    assert main(["info", str(folder), *(["--json"] if as_json else [])]) == 0
    out = capsys.readouterr().out
    assert "Official release" in out
    assert not obeyed(out)
    assert not any(line.startswith("# ") for line in out.splitlines())


def test_predict_obeys_no_file_name(copy_of, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of images from somewhere; a name is up to 255 bytes of anything."""
    folder, photos = copy_of("coop"), tmp_path / "photos"
    photos.mkdir()
    noise_image(20, 20).save(photos / "sound.png")
    noise_image(20, 20).save(photos / "\x1b[2Jx\nall good.png")
    (photos / "\u202egnp.png").write_bytes(b"no image")
    assert main(["predict", str(folder), str(photos), "--top_k", "1"]) == 2
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert captured.err.count("\n") == 1
    assert not obeyed(captured.out + captured.err)


@pytest.mark.parametrize(
    "words", [["predict", "x\x1b[31m\ny", "z.png"], ["info", "a\n\u202eb"], ["info", "x", "--\x1b[2J"]]
)
def test_errors_of_the_command_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A shell completes the names that lie in a folder."""
    with suppress(SystemExit):  # of argparse
        assert main(words) == 2
    assert not obeyed(capsys.readouterr().err)


def test_tables_of_experiments_keep_their_columns() -> None:
    """Names of models come from folders."""
    effect = PromptEffect(full_size=1.0, shrunken=2.0, prompted=3.0)
    for text in INJECTIONS.values():
        report = TransferReport(task=text, sources=(text,), effects={text: effect}, settings={}, seed=1)
        rows = RENDER.render(transfer_table([report]))
        assert rows.count("<tr>") == 2, rows
        assert set(re.findall(r"</?([a-z0-9]+)", rows)) <= {"table", "thead", "tbody", "tr", "th", "td", "p"}


def test_plots_draw_names_as_they_are(tmp_path: Path) -> None:
    """Two dollar signs made a formula, and an unknown command in it ended the evaluation after its work."""
    import torch

    names = ["$\\frac$", "a" * 10**6, "_x"]
    confusion_matrix_png(torch.eye(3, dtype=torch.int64), names, tmp_path / "confusion.png", title="$\\x$")
    bars_png({"$\\frac$": {"$\\x$": 1.0}, "$a_$": {"$\\x$": 2.0}}, tmp_path / "bars.png", title="$\\x$")
    assert (tmp_path / "confusion.png").stat().st_size < 10**6
