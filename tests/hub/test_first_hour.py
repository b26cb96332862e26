"""The first hour: the commands of `docs/first_hour.md`, in order, as a newcomer types them, with own images."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.cli import hf

from peft_vlm.cli import main
from peft_vlm.evaluation.report import EvalReport
from tests.hub.server import TOKEN, LoopbackHub
from tests.readme_blocks import NO_RUN, Block, fenced_blocks
from tests.source_tree import ROOT

PAGE = ROOT / "docs" / "first_hour.md"
CLASSES = [
    "estrella peque\u00f1a",
    "gr\u00fcner Kreis",
    "long bar",
    "r\u016f\u017eov\u00fd k\u0159\u00ed\u017e",
    "triangle \u00e9quilat\u00e9ral",
    "\u56db\u89d2 square",
]


def blocks() -> list[Block]:
    """The blocks that the page's reader runs without a second terminal."""
    found = [block for block in fenced_blocks(PAGE, languages=("python", "bash")) if NO_RUN not in block.words]
    commands = " ".join(block.code for block in found)
    for command in ("train", "evaluate", "predict", "publish", "export"):
        assert f"peft-vlm {command} " in commands
    return found


def rows(printed: str) -> list[str]:
    """What stays in a terminal: bars are drawn over themselves and go up a row where they are inside another."""
    screen, row = [""], 0
    for part in re.split(r"(\n|\r|\x1b\[A)", printed):
        if part == "\n":
            row += 1
            screen += [""] * (row == len(screen))
        elif part == "\x1b[A":
            row = max(row - 1, 0)
        elif part != "\r" and part:
            screen[row] = part
    return [line for line in screen if line.strip()]


def check(folder: Path, hub: LoopbackHub, printed: str) -> None:
    """The adapter has learnt, its card says so, all ways to use it agree, and the terminal stayed readable."""
    report, zero_shot = (EvalReport.load(folder / "outputs" / "shapes" / f"{n}.json") for n in ("report", "zero_shot"))
    assert report.scores["accuracy"] >= 75, report.scores
    assert report.scores["accuracy"] >= zero_shot.scores["accuracy"] + 40, (report.scores, zero_shot.scores)
    files = hub.model("me/my-shapes").files
    assert files["class_names.txt"].decode("utf-8").splitlines() == CLASSES
    assert f"| accuracy | {report.scores['accuracy']:.2f} |" in files["README.md"].decode("utf-8")
    assert str(folder) not in files["README.md"].decode("utf-8")
    assert json.loads((folder / "exported" / "classifier.json").read_text("utf-8"))["class_names"] == CLASSES
    lines = rows(printed)
    assert len(lines) < 40, "\n".join(lines)
    assert "Warning" not in printed, printed
    assert printed.count("zero_shot_accuracy") == 2  # by `train` and `evaluate`
    assert sum("Loading weights" in line for line in lines) <= 2  # by the two Python examples, not by the commands
    assert "long bar/image 12.png: long bar " in printed  # by `predict`
    assert "Prediction(label='long bar'" in printed  # by id
    assert "[[('gr\u00fcner Kreis', " in printed  # by the exported file


def test_the_first_hour_works_as_printed(hub, tmp_path, monkeypatch, capfd) -> None:
    """Each command may work alone while a name with a space or an umlaut is lost between two of them."""
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples", target_is_directory=True)
    for number, block in enumerate(blocks()):
        if block.words[0] == "python":
            script = Path(f"block_{number}.py")
            script.write_text(block.code, encoding="utf-8")
            runpy.run_path(str(script))
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line)
            if program == "hf":
                monkeypatch.setattr(sys, "argv", [program, *words])
                with pytest.raises(SystemExit) as end:
                    hf.main()
                assert not end.value.code, line
            else:
                assert program == "peft-vlm"
                assert main(words) == 0, line
    check(tmp_path, hub, "".join(capfd.readouterr()))


@pytest.mark.slow
def test_the_first_hour_works_in_a_shell(hub, tmp_path) -> None:
    """In one process a command can lean on what an earlier one has imported or set; in a terminal it cannot."""
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "PYTHONUTF8": "1"}
    printed = ""
    for number, block in enumerate(blocks()):
        script = tmp_path / f"block_{number}"
        script.write_text(block.code, encoding="utf-8")
        command = [sys.executable] if block.words[0] == "python" else ["bash", "-e"]
        result = subprocess.run(
            [*command, script.name],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        text = result.stdout.decode("utf-8")  # not by `subprocess`, which would make lines of what bars draw over
        assert result.returncode == 0, f"{block.code}\n{text}"
        printed += text
    check(tmp_path, hub, printed)
