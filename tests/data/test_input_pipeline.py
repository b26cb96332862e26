"""`benchmarks/input_pipeline.py`: what it reports."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.source_tree import ROOT

SCRIPT = ROOT / "benchmarks" / "input_pipeline.py"


def test_the_report_has_the_figures_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key that is gone breaks whoever compares two machines."""
    file = tmp_path / "result.json"
    words = ["--images", "4", "--size", "40", "30", "--workers", "0", "--epochs", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    result = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["images_per_second"] > 0
    assert result["cached_factor"] == result["cached_images_per_second"] / result["images_per_second"]
    assert result["bytes_per_image"] == 40 * 30 * 3
