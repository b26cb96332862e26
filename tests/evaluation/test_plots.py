"""Plots: PNG files of a sensible size for few and many classes, names shown as they are."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from peft_vlm.evaluation import bars_png, confusion_matrix_png, plots


@pytest.mark.parametrize("number", [2, 12, 120, 300])
def test_confusion_matrices_of_any_size_can_be_drawn(number: int, tmp_path: Path) -> None:
    """Names beyond legibility must not make a picture of a hundred megapixels."""
    confusion = torch.diag(torch.arange(number)) + (torch.rand(number, number) < 0.05)
    path = tmp_path / "confusion.png"
    confusion_matrix_png(confusion, [f"class_{index} $x^2" for index in range(number)], path, title="$5 test_a")
    with Image.open(path) as image:
        assert 300 < image.width < 3000
        assert 300 < image.height < 3000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10, "nothing was drawn"


def test_bars_take_gaps_and_spreads(tmp_path: Path) -> None:
    """A linear probe has no new classes, and one seed has no spread."""
    values = {"zero-shot": {"base": 70.0, "new": 74.0, "h": 71.9}, "linear_probe": {"base": 80.0}}
    path = tmp_path / "bars.png"
    bars_png(values, path, spread={"zero-shot": {"base": 1.5, "new": None}}, title="icons_1")
    bars_png({"one": {"accuracy": 50.0}}, tmp_path / "one.png")
    with Image.open(path) as image:
        assert image.width > 300


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A bare ModuleNotFoundError does not say how to get it."""
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        bars_png({"one": {"accuracy": 50.0}}, tmp_path / "one.png")
