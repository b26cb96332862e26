"""The domains of the TVP example: what the light does, and that splits and classes are as its page says."""

import sys
from pathlib import Path

import numpy as np
import pytest

from peft_vlm.data.dataset import ImageClassificationDataset

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from tvp_domains import INKS, LIGHTS, inked_icons, load_domain, named_icons  # noqa: E402


def test_warm_light_scales_every_colour():
    """Daylight times the light, up to the rounding of a byte."""
    day, warm = (inked_icons("val", LIGHTS[light]) for light in ("daylight", "warm_light"))
    assert day["label"] == warm["label"]
    for row in range(0, 220, 20):
        plain, lit = (np.asarray(data[row]["image"], dtype=float) for data in (day, warm))
        np.testing.assert_allclose(lit, plain * LIGHTS["warm_light"], atol=1.01)


def test_as_many_icons_of_each_ink():
    data = inked_icons("val", LIGHTS["daylight"])
    assert data.features["label"].names == list(INKS)
    assert np.bincount(data["label"]).tolist() == [20] * len(INKS)


def test_ink_is_where_the_icon_is_dark():
    """The darkest and the lightest pixel of an icon are ink and ground, or nearly so."""
    data = inked_icons("val", LIGHTS["daylight"])
    for row in range(len(INKS)):
        pixels = np.asarray(data[row]["image"], dtype=float).reshape(-1, 3) / 255
        ink = np.array(list(INKS.values())[data[row]["label"]])
        assert np.abs(pixels - ink).max(axis=1).min() < 0.2


def test_named_icons_keep_their_names():
    data = named_icons("val", LIGHTS["warm_light"])
    assert data.features["label"].names[:2] == ["airplane", "building"]
    assert max(data["label"]) < len(data.features["label"].names) == 11


@pytest.mark.parametrize(("name", "classes", "images"), [("lamplight", 11, 220), ("fashion", 10, 160)])
def test_domains_are_labelled_images(name, classes, images):
    data = load_domain(name, split="val")
    assert isinstance(data, ImageClassificationDataset)
    assert (len(data.class_names), len(data)) == (classes, images)
