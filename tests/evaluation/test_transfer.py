"""Reports of one prompt on many models: gains by hand, tables, files, images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peft_vlm.adapters.pixel_prompt import prompt_layer_of, show_prompted, window_of
from peft_vlm.errors import DataError
from peft_vlm.evaluation import (
    PromptEffect,
    TransferReport,
    comparison_table,
    effect_curves,
    lines_png,
    prompt_png,
    transfer_png,
    transfer_table,
)
from peft_vlm.methods.tvp import render_prompt
from tests.evaluation.test_mllm import prompted_llava


def report(seed: int = 0, extra: float = 0.0) -> TransferReport:
    """One source and two unseen models; the prompt gives `extra` more on the unseen ones."""
    effects = {
        "llava": PromptEffect(60.0, 50.0, 70.0),
        "smolvlm": PromptEffect(40.0, 30.0, 34.0 + extra),
        "blip2": PromptEffect(55.0, 52.0, 51.0 + extra),
    }
    return TransferReport("emoji", ("llava",), effects, seed=seed, settings={"fca_weight": 0.005})


def test_mean_gains_are_those_of_unseen_models() -> None:
    """(4 - 1) / 2 over the shrunken images, (-6 - 4) / 2 over full size; the source does not count."""
    assert report().unseen == ("smolvlm", "blip2")
    assert report().mean_gain() == pytest.approx(1.5)
    assert report().mean_gain(over="full_size") == pytest.approx(-5.0)
    alone = TransferReport("emoji", ("llava",), {"llava": PromptEffect(1.0, 2.0, 3.0)})
    assert alone.mean_gain() is None
    with pytest.raises(ValueError, match=r"\('shrunken', 'full_size'\), got 'clean'"):
        report().mean_gain(over="clean")
    with pytest.raises(DataError, match=r"without \['qwen'\]"):
        TransferReport("emoji", ("qwen",), report().effects)


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    """And the file holds the gains for readers without this package."""
    report().save(tmp_path / "transfer.json")
    assert TransferReport.load(tmp_path / "transfer.json") == report()
    assert '"shrunken": 1.5' in (tmp_path / "transfer.json").read_text()
    (tmp_path / "other.json").write_text('{"task": 1}')
    with pytest.raises(DataError, match="to be a transfer report"):
        TransferReport.load(tmp_path / "other.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="to be a transfer report"):
        TransferReport.load(tmp_path / "list.json")


def test_the_table_of_one_seed() -> None:
    """Word for word."""
    assert report().table().splitlines() == [
        "| model | full size | shrunken, no prompt | prompted | gain | gain over full size |",
        "|---|---|---|---|---|---|",
        "| llava (source) | 60.0 | 50.0 | 70.0 | +20.0 | +10.0 |",
        "| smolvlm (unseen) | 40.0 | 30.0 | 34.0 | +4.0 | -6.0 |",
        "| blip2 (unseen) | 55.0 | 52.0 | 51.0 | -1.0 | -4.0 |",
        "| mean of 2 unseen | | | | +1.5 | -5.0 |",
        "",
        "emoji; 1 seed; percent.",
    ]


def test_the_table_of_several_seeds_has_spreads() -> None:
    """Extra 0 and 2: the mean rises by 1, the standard deviation is sqrt(2)."""
    lines = transfer_table([report(0), report(1, 2.0)]).splitlines()
    assert lines[3] == "| smolvlm (unseen) | 40.0 +- 0.0 | 30.0 +- 0.0 | 35.0 +- 1.4 | +5.0 +- 1.4 | -5.0 +- 1.4 |"
    assert lines[5] == "| mean of 2 unseen | | | | +2.5 +- 1.4 | -4.0 +- 1.4 |"
    assert lines[-1] == "emoji; 2 seeds, mean +- standard deviation; percent."
    other = TransferReport("emoji", ("llava",), {"llava": PromptEffect(1.0, 2.0, 3.0)})
    with pytest.raises(DataError, match="same sources and models"):
        transfer_table([report(), other])
    with pytest.raises(DataError, match="at least one"):
        transfer_table([])


def test_variants_are_compared_by_their_gains() -> None:
    """The worst seed stands beside the mean."""
    table = comparison_table({"all terms": [report(0), report(1, 2.0)], "no FCA": [report(0, -3.0)]})
    assert table.splitlines()[2:] == [
        "| all terms | +20.0 | +2.5 | +1.5 | 2 |",
        "| no FCA | +20.0 | -1.5 | -1.5 | 1 |",
    ]
    alone = TransferReport("emoji", ("llava",), {"llava": PromptEffect(1.0, 2.0, 3.0)})
    with pytest.raises(DataError, match="unseen models in the runs of 'alone'"):
        comparison_table({"alone": [alone]})


def test_curves_and_bars_are_drawn(tmp_path: Path) -> None:
    """Something of a sensible size, for one seed and for several."""
    curves = effect_curves({1: PromptEffect(3.0, 2.0, 2.5), 5: PromptEffect(1.0, 0.5, 0.7)})
    assert curves["prompted"] == {1.0: 2.5, 5.0: 0.7}
    assert list(curves) == ["full size", "shrunken, no prompt", "prompted"]
    lines_png(curves, tmp_path / "levels.png", x_label="level", title="noise")
    lines_png(curves, tmp_path / "sizes.png", x_label="training questions", logarithmic=True)
    transfer_png([report()], tmp_path / "one.png")
    transfer_png([report(0), report(1, 2.0)], tmp_path / "two.png", title="two seeds")
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 4
    for path in pictures:
        with Image.open(path) as image:
            assert 300 < image.width < 3000
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10


def test_the_prompt_is_written_as_an_enlarged_image(tmp_path: Path) -> None:
    """Every pixel of the canvas becomes a square."""
    model = prompted_llava()
    prompt_png(model, tmp_path / "prompt.png", side=100)
    with Image.open(tmp_path / "prompt.png") as image:
        assert image.size == (128, 128)
        np.testing.assert_array_equal(np.asarray(image)[::4, ::4], np.asarray(render_prompt(model)))
        np.testing.assert_array_equal(np.asarray(image)[3::4, 3::4], np.asarray(render_prompt(model)))


def test_images_are_shown_with_and_without_the_prompt() -> None:
    """Above the image, below the same shrunken with the prompt around it."""
    model = prompted_llava()
    settings = prompt_layer_of(model).settings["default"]
    grey = Image.new("RGB", (20, 20), (128, 128, 128))
    sheet = np.asarray(show_prompted(model, [grey, grey], side=64), dtype=float)
    assert sheet.shape == (128, 128, 3)
    assert (sheet[:64] == 128).all()
    start, length = window_of(64, settings)
    inside = slice(start + 1, start + length - 1)
    np.testing.assert_allclose(sheet[64:][inside, inside], 128, atol=1)
    assert sheet[64:].std() > 5
