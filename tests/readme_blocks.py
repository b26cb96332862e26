"""Finds the Python examples of a Markdown page and runs them the way a reader would: as a script, in an own folder."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.source_tree import ROOT

FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
#: Fence "```python no-run": an example that needs a model hub. It is compiled, not run.
NO_RUN = "no-run"


@dataclass(frozen=True)
class Block:
    """One fenced block of a page.

    Args:
        code: Text between the fences.
        line: Line of the page at which the code begins, from 1.
        words: Info string of the fence, split: language first.
    """

    code: str
    line: int
    words: tuple[str, ...]


def fenced_blocks(page: Path, *, languages: tuple[str, ...] = ("python",)) -> list[Block]:
    """Fenced blocks of a Markdown file in the given languages."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        words = tuple(match["info"].split())
        if words and words[0] in languages:
            blocks.append(Block(match["code"], text.count("\n", 0, match.start("code")) + 1, words))
    return blocks


def runnable_code(page: Path) -> str:
    """The page's runnable Python blocks joined in order, so that a later block can use names of an earlier one."""
    return "\n".join(block.code for block in fenced_blocks(page) if NO_RUN not in block.words)


def run_outside_repository(
    code: str, *, folder: Path, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run code as a script in `folder`, where `examples/` leads to the bundled models and data but no package lies.

    Args:
        code: Script.
        folder: An empty folder; what the script writes stays there.
        python: Interpreter, whose environment has the package installed.
    """
    (folder / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    script = folder / "readme_example.py"
    script.write_text(code, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    command = [python, script.name]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
