"""The comparison of all methods as a user runs it: a few images, one epoch, and a second start."""

import json
from pathlib import Path

from tests.scripts import run_script
from tests.source_tree import ROOT
from tests.tiny import colour_names, colour_rows


def test_a_comparison_goes_on_with_the_cells_that_are_missing(tmp_path: Path) -> None:
    """Hours of training would be repeated after an interruption, or cells of other settings mixed into one table."""
    for number, row in enumerate(colour_rows(4, classes=3)):
        part = "train" if number % 4 < 2 else "test"
        path = tmp_path / "colours" / part / colour_names()[row["label"]] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    words = [
        "examples/compare.py",
        "--use_cpu",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--shots",
        "2",
        "--tasks",
        "few_shot",
    ]
    words += ["--datasets", str(tmp_path / "colours"), "--templates", "a {}"]
    words += ["--model", str(ROOT / "examples/assets/clip_student"), "--output_dir", str(tmp_path / "out")]
    first = run_script(*words, "--methods", "coop")
    assert first.code == 0, first.printed
    cell = tmp_path / "out" / "colours" / "coop" / "seed1" / "cell.json"
    written = cell.stat().st_mtime_ns
    second = run_script(*words, "--methods", "coop", "clip_lora")
    assert second.code == 0, second.printed
    assert cell.stat().st_mtime_ns == written
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(report["methods"]) == ["zero_shot", "coop", "clip_lora"]
    assert report["methods"]["coop"]["trainable_parameters"] == 4 * 160
    assert 0 <= report["methods"]["clip_lora"]["accuracy"][0] <= 100
    for name in ("table.md", "results.png", "costs.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    other = run_script(*words, "--methods", "coop", "--shots", "1")
    assert other.code != 0
    assert "holds the run of other settings" in other.printed
