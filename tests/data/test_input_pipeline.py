"""`benchmarks/input_pipeline.py`: what it reports, and that its cache changes no pixel."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPImageProcessorPil

from peft_vlm.data import ImageClassificationDataset, TrainTransform
from tests.source_tree import ROOT

SCRIPT = ROOT / "benchmarks" / "input_pipeline.py"


def test_decoded_images_are_those_of_the_files(tmp_path: Path) -> None:
    """A cache that changed a pixel would be measured against another task, and would train another prompt."""
    names = runpy.run_path(str(SCRIPT))
    rows = names["write_images"](tmp_path, 3, (40, 30))
    decoded = names["DecodedImages"](rows, tmp_path / "decoded.npy")
    assert len(decoded) == 3
    transform = TrainTransform(CLIPImageProcessorPil())
    from_files, from_cache = (
        ImageClassificationDataset(source, ["even", "odd"], transform=transform) for source in (rows, decoded)
    )
    for position in range(3):
        assert np.array_equal(decoded[position]["image"], np.asarray(Image.open(rows[position]["image"])))
        assert_close(from_cache[position]["pixel_values"], from_files[position]["pixel_values"], rtol=0, atol=0)


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
