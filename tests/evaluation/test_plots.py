"""Plots: PNG files of a sensible size for few and many classes, names shown as they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from PIL import Image

from peft_vlm.evaluation import bars_png, confusion_matrix_png, lines_png, plots, reliability_png


@pytest.mark.parametrize("number", [2, 12, 120, 300])
def test_confusion_matrices_of_any_size_can_be_drawn(number: int, tmp_path: Path) -> None:
    """Names beyond legibility must not make an image of a hundred megapixels."""
    confusion = torch.diag(torch.arange(number)) + (torch.rand(number, number) < 0.05)
    path = tmp_path / "confusion.png"
    confusion_matrix_png(confusion, [f"class_{index} $x^2" for index in range(number)], path, title="$5 test_a")
    with Image.open(path) as image:
        assert 300 < image.width < 3000
        assert 300 < image.height < 3000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10, "nothing was drawn"


def test_many_classes_show_their_most_frequent_confusions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hundred names at the edge of a matrix are no text; the pairs that matter must be."""
    texts: list[str] = []

    def keep(figure: Any, path: Path) -> None:
        texts.extend(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(plots, "save_figure", keep)
    confusion = torch.diag(torch.full((100,), 5))
    confusion[3, 7], confusion[8, 2] = 9, 1
    confusion_matrix_png(confusion, [f"class {i}" for i in range(100)], tmp_path / "x.png")
    assert {text for text in texts if " as " in text} == {"class 3 as class 7", "class 8 as class 2"}
    assert "most frequent of 10 confusions" in texts
    assert {"9", "1"} <= set(texts)


def test_reliability_is_the_share_of_right_answers_per_bin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By hand: of two bins the upper one holds three predictions, two of them right."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.2])
    reliability_png(confidence, torch.tensor([True, True, False, False]), tmp_path / "x.png", num_bins=2)
    above, below = figures[0].axes
    assert [bar.get_height() for bar in above.patches] == pytest.approx([0.0, 200 / 3])
    assert [bar.get_height() for bar in below.patches] == [1, 3]
    assert above.get_legend().get_title().get_text() == "calibration error 15.0 points"


def test_curves_have_bands_where_there_is_a_spread(tmp_path: Path) -> None:
    """Half of the seeds' spread drawn as none would look exact."""
    curves = {"a": {1.0: 30.0, 2.0: 40.0}, "b": {1.0: 20.0}}
    lines_png(curves, tmp_path / "plain.png", x_label="shots")
    lines_png(curves, tmp_path / "bands.png", x_label="shots", spread={"a": {1.0: 5.0, 2.0: 5.0}})
    plain, bands = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("plain", "bands"))
    changed = (plain != bands).any(axis=-1).mean()
    assert changed > 0.01


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


def test_names_in_any_script_are_drawn_without_a_warning(tmp_path: Path) -> None:
    """Where no font has the letters, boxes must do: a warning per letter and plot buries the results."""
    names = ["\u65e5\u672c", "\ud55c\uad6d", "\u0e44\u0e17\u0e22", "\U0001f60a", "caf\u00e9", "\ue000"]
    confusion_matrix_png(torch.eye(6, dtype=torch.long), names, tmp_path / "confusion.png", title=" ".join(names))
    bars_png({name: {"accuracy": 50.0} for name in names}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").is_file()


def test_a_font_of_the_system_is_taken_where_it_has_the_letters(tmp_path: Path, monkeypatch) -> None:
    """matplotlib draws boxes for Chinese and Japanese even where the system has a font for them."""
    letter = "\u65e5"
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(point)
    pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(letter): "square"})
    font.setupGlyf({".notdef": pen.glyph(), "square": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (800, 0), "square": (800, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "square.ttf")
    own = [font for font in fontManager.ttflist if font.name.startswith("DejaVu")]
    monkeypatch.setattr(fontManager, "ttflist", own)
    assert plots.font_families(f"abc {letter}") == ["DejaVu Sans"]
    fontManager.addfont(tmp_path / "square.ttf")
    assert plots.font_families("abc") == ["DejaVu Sans"]
    assert plots.font_families(f"abc {letter}") == ["DejaVu Sans", "Square"]
    pixels = []
    for name in ("with", "without"):
        bars_png({letter: {"accuracy": 50.0}, "b": {"accuracy": 40.0}}, tmp_path / f"{name}.png")
        pixels.append((tmp_path / f"{name}.png").read_bytes())
        monkeypatch.undo()
    assert pixels[0] != pixels[1], "the font was found and not used"
