"""`peft-vlm reproduce`: plans like the papers', grids that survive a kill, tables that say what was compared."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from peft_vlm.cli import main
from peft_vlm.evaluation.metrics import harmonic_mean
from peft_vlm.experiments.comparison import Line
from peft_vlm.experiments.recipes import AVERAGE, ELEVEN, Grid, grid_of, read_recipe, recipe_names
from peft_vlm.registry import METHODS
from peft_vlm.settings import TABLES
from tests.source_tree import ROOT

#: Two runs of a second each.
SMALL = ["coop", "--stand-in", "--datasets", "emoji", "--seeds", "1", "2", "--protocol", "base_to_new"]
SMALL += ["--max_steps", "2", "--use_cpu"]
#: Runs of the papers' tables: data sets x shots x seeds, with the teachers of PromptKD.
RUNS = {"base_to_new": 11 * 3, "few_shot": 11 * 5 * 3, "cross_dataset": 3, "domain_shift": 3}
RUNS_OF: dict[tuple[str, str], int] = {
    ("promptkd", "base_to_new"): 11 + 11 * 3,
    ("promptkd", "cross_dataset"): 1 + 10 * 3,
    ("promptkd", "domain_shift"): 1 + 4 * 3,
    ("rpp", "cross_dataset"): 1,
    ("rpp", "domain_shift"): 1,
    ("tvp", "mllm_transfer"): 1,
}


#: The paper's own H is another than that of its base and new accuracies.
PRINTED_OTHERWISE = {("promptkd", "stanford_cars"), ("promptkd", "ucf101")}


def all_grids() -> list[Grid]:
    """The grid of every protocol of every recipe."""
    return [grid_of(method, protocol) for method in recipe_names() for protocol in read_recipe(method)["protocols"]]


def table_of(folder: Path) -> dict[str, Any]:
    """The table of a folder."""
    return json.loads((folder / "table.json").read_text())


@pytest.mark.parametrize("grid", all_grids(), ids=lambda grid: f"{grid.method}-{grid.protocol}")
def test_a_plan_has_as_many_runs_as_the_paper(grid: Grid, capsys: pytest.CaptureFixture[str]) -> None:
    """A grid that lacks a seed or a data set would be compared with an average that has it."""
    assert main(["reproduce", grid.method, "--protocol", grid.protocol, "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    runs = RUNS_OF.get((grid.method, grid.protocol), RUNS[grid.protocol] if grid.protocol in RUNS else 0)
    assert plan["runs"] == runs == sum(row["runs"] for row in plan["rows"])
    assert all(row["images"] > 0 and row["steps"] > 0 and row["tests"] > 0 for row in plan["rows"])


def test_every_method_has_a_recipe() -> None:
    """A method without one could not be compared with its paper, and nothing would say so."""
    assert set(recipe_names()) == set(METHODS)


def test_a_plan_counts_images_and_steps_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """Hours are estimated from it: 16 shots of the 24 base classes of DTD, 4 a step, 20 epochs, are 1,920 steps."""
    words = ["--protocol", "base_to_new", "--plan", "--json", "--datasets", "dtd", "imagenet"]
    assert main(["reproduce", "skip_tuning", *words]) == 0
    imagenet, dtd = json.loads(capsys.readouterr().out)["rows"]
    assert (dtd["images"], dtd["steps"], dtd["tests"]) == (16 * 24, 16 * 24 // 4 * 20, 1_692)
    assert (imagenet["images"], imagenet["steps"]) == (16 * 500, 16 * 500 // 4 * 5), "a quarter of the epochs"


def test_what_the_paper_does_not_report_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Hours of training for a table that has nothing to compare with."""
    assert main(["reproduce", "clip_lora", "--protocol", "base_to_new", "--plan"]) == 2
    assert "does not report 'base_to_new'" in capsys.readouterr().err
    assert main(["reproduce", "coopp", "--plan"]) == 2
    assert "Did you mean 'coop'" in capsys.readouterr().err
    assert main(["reproduce", "coop", "--plan", "--datasets", "dtdd"]) == 2
    assert "'dtdd'" in capsys.readouterr().err
    assert main(["reproduce", "coop", "--plan", "--teacher", "m"]) == 2
    assert "has no teacher" in capsys.readouterr().err
    assert main(["reproduce", "coop", "--select-on-test-as-official", "--plan"]) == 2
    assert "does not select on test images" in capsys.readouterr().err
    assert main(["reproduce", "coop"]) == 2
    assert "output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", TABLES)
def test_published_numbers_recompute_to_the_printed_averages(protocol: str) -> None:
    """A digit that was copied wrongly would be reported as our failure to reproduce."""
    checked = 0
    for grid in all_grids():
        if grid.protocol != protocol:
            continue
        for row, scores in grid.published.items():
            assert row in (*grid.rows, *grid.averages), f"{grid.method}: no row {row!r}"
            assert set(scores) <= set(grid.columns)
            if set(scores) == {"base", "new", "h"} and (grid.method, row) not in PRINTED_OTHERWISE:
                assert harmonic_mean(scores["base"], scores["new"]) == pytest.approx(scores["h"], abs=0.011), row
                checked += 1
        for average, rows in grid.averages.items():
            for column in set(grid.columns) - {"h"}:
                known = [grid.published.get(row, {}).get(column) for row in (average, *rows)]
                if None not in known:
                    assert fmean(known[1:]) == pytest.approx(known[0], abs=0.011), f"{grid.method}: {average}"
                    checked += 1
    assert checked >= {"base_to_new": 16, "cross_dataset": 1, "domain_shift": 1}.get(protocol, 0)


def test_recipes_name_what_is_there() -> None:
    """A misspelt data set or preset would be found after hours, in the run that needs it."""
    for grid in all_grids():
        method = METHODS[grid.method]
        for cell in grid.cells:
            one = METHODS[cell.settings["method"]]
            assert cell.settings.get("preset") in (None, *one.presets), cell
        for standard in ("base_to_new", "few_shot"):
            if grid.protocol == standard and not grid.averages.get(AVERAGE):
                assert len(grid.rows) % len(ELEVEN) == 0, method.name


@pytest.mark.parametrize(
    ("values", "paper", "verdict"),
    [
        ([80.0, 81.0, 82.0], 82.9, "within"),
        ([80.0, 81.0, 82.0], 83.1, "below"),
        ([80.0, 81.0, 82.0], 78.9, "above"),
        ([80.0, 80.0, 80.0], 80.04, "within"),
        ([80.0, 81.0], 81.0, "-"),
        ([80.0], 80.0, "-"),
        ([80.0, 81.0, 82.0], None, "-"),
        ([], 80.0, "not run"),
    ],
)
def test_verdicts_follow_the_spread_of_our_seeds(values: list[float], paper: float | None, verdict: str) -> None:
    """A verdict from too few seeds, or within any distance, would say that a paper reproduces."""
    line = Line("dtd", "accuracy", dict(enumerate(values)), fmean(values) if values else None, paper, wanted=3)
    assert line.verdict == verdict


def test_a_killed_grid_continues_and_its_table_equals_an_unbroken_one(tmp_path: Path) -> None:
    """Days of training would begin anew, or a half-written run would count."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["reproduce", *SMALL, "--output_dir", str(whole)]) == 0
    kill_when(broken / "emoji/seed1/cell.json", SMALL, broken)
    first = (broken / "emoji/seed1/cell.json").stat().st_mtime_ns
    assert main(["reproduce", *SMALL, "--output_dir", str(broken)]) == 0
    assert (broken / "emoji/seed1/cell.json").stat().st_mtime_ns == first
    assert table_of(broken) == table_of(whole)
    assert (broken / "table.md").read_text() == (whole / "table.md").read_text()
    assert "nothing to compare with" in (whole / "table.md").read_text()
    assert "max_steps=2" in (whole / "table.md").read_text()
    assert (whole / "table.png").stat().st_size > 1000
    assert (whole / "emoji/seed2/adapter_model.safetensors").is_file()
    assert {row["verdict"] for row in table_of(whole)["rows"] if row["row"] == "emoji"} == {"-"}
    assert {row["verdict"] for row in table_of(whole)["rows"] if row["row"] == "icons"} == {"not run"}


def kill_when(path: Path, words: list[str], folder: Path) -> None:
    """Start a grid, and kill it as soon as a file is there."""
    command = [sys.executable, "-m", "peft_vlm.cli", "reproduce", *words, "--output_dir", str(folder)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
    assert path.exists()
