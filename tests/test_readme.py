"""The README is executable: its Python runs, its make targets, scripts and links exist."""

import json
import re
from pathlib import Path

import pytest

from peft_vlm.evaluation.report import EvalReport
from peft_vlm.evaluation.run import EvaluationArguments, run_evaluation
from peft_vlm.files import BASELINE_NAME
from tests.readme_blocks import NO_RUN, fenced_blocks, run_outside_repository, runnable_code
from tests.source_tree import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)|!\[[^\]]*\]\((?P<image>[^)\s]+)\)")


def shell_lines(page: Path) -> list[str]:
    """Commands of a page's shell blocks, without prompts, comments and continuation marks."""
    lines = "\n".join(block.code for block in fenced_blocks(page, languages=("bash", "sh", "shell", "console")))
    return [line.strip().removeprefix("$ ") for line in lines.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_readme_example_runs(tmp_path: Path) -> None:
    """The first code a reader tries must work as printed, outside the repository, and must learn something."""
    code = runnable_code(README)
    assert code.strip(), "README.md has no runnable ```python block"
    result = run_outside_repository(code, folder=tmp_path)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert "Warning" not in result.stderr, "a first run that begins with warnings looks broken"
    evaluation = EvaluationArguments(
        protocol="few-shot",
        dataset=["examples/assets/emoji"],
        adapter=str(tmp_path / "outputs" / "readme"),
        model=str(ROOT / "examples/assets/clip_student"),
        output_dir=str(tmp_path / "evaluation"),
        split=["test"],
        baseline=True,
    )
    scores = run_evaluation(evaluation).scores
    zero_shot = EvalReport.load(tmp_path / "evaluation" / BASELINE_NAME).scores
    assert scores["accuracy"] >= zero_shot["accuracy"] + 5, (scores, zero_shot)


def test_the_first_readme_example_is_short() -> None:
    """The README promises a first example of 15 lines."""
    first = fenced_blocks(README)[0]
    lines = [line for line in first.code.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert 3 <= len(lines) <= 15, f"{len(lines)} lines of code"
    assert NO_RUN not in first.words
    assert "peft_vlm" in first.code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_compile(page: Path) -> None:
    """A block that cannot run here (it needs a hub) must still be Python."""
    assert len(PAGES) >= 5
    for block in fenced_blocks(page):
        compile(block.code, f"{page.name}:{block.line}", "exec")


def test_make_targets_in_the_pages_exist() -> None:
    """A command that a page promises must be there."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {
        name for page in PAGES for line in shell_lines(page) for name in re.findall(r"^make ([a-z][a-z-]*)", line)
    }
    assert len(targets) >= 8
    assert {"demo", "test"} <= named, "the README shows `make demo` and `make test`"
    assert named <= targets


def test_scripts_in_the_pages_exist() -> None:
    """`python examples/x.py` in a page points to a file of the repository."""
    named = {
        n
        for page in PAGES
        for line in shell_lines(page)
        for n in re.findall(r"\b((?:examples|benchmarks)/\S+\.py)", line)
    }
    assert len(named) >= 1
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]


def test_local_links_lead_somewhere() -> None:
    """A page that was moved or renamed leaves dead links behind."""
    dead, checked = [], 0
    for page in PAGES:
        for match in LINK.finditer(re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)):
            target = (match["target"] or match["image"]).partition("#")[0]
            if not target or "://" in target or target.startswith("mailto:"):
                continue
            checked += 1
            if not (page.parent / target).exists():
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert checked >= 3
    assert not dead


def test_the_results_of_the_readme_are_those_of_its_pages() -> None:
    """A number that was measured again would be corrected in one place and stay old in another."""
    results = json.loads((ROOT / "docs" / "results.json").read_text(encoding="utf-8"))
    assert len(results) >= 8
    readme = README.read_text(encoding="utf-8")
    for entry in results:
        assert f"{entry['gain']:+.1f} +- {entry['std']:.1f} |" in readme, entry
        assert entry["quote"] in (ROOT / "docs" / entry["page"]).read_text(encoding="utf-8"), entry


def test_the_changelog_has_whole_entries_each_once() -> None:
    """Two lists that were merged left half an entry, one twice, and a bullet that was none."""
    lines = (ROOT / "CHANGELOG.md").read_text().partition("\n## Unreleased\n")[2].partition("\n## ")[0].splitlines()
    entries = [line for line in lines if line.startswith("- ")]
    assert len(set(entries)) == len(entries)
    odd = [line for line in lines if line and not line.startswith(("### ", "- ", "  ", "|"))]
    assert not odd
