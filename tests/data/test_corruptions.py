"""Damaged images: each kind by hand, levels in order, reproducible."""

import numpy as np
import pytest
import torch
from PIL import Image

from peft_vlm.data.corruptions import CORRUPTIONS, Corruption, brightness, contrast
from tests.tiny_questions import colour_questions

DAMAGE = {kind: function for kind, (function, _) in CORRUPTIONS.items()}


def rng(seed: int = 0) -> np.random.Generator:
    """A seeded source of draws."""
    return np.random.default_rng(seed)


def scene(size: int = 56) -> Image.Image:
    """Stripes of several widths and a smooth ramp, so that every kind of damage shows."""
    y, x = np.mgrid[0:size, 0:size] / size
    channels = [0.5 + 0.4 * np.sign(np.sin(40 * x)), y, 0.5 + 0.3 * np.sin(12 * (x + y))]
    return Image.fromarray((255 * np.stack(channels, axis=2).clip(0, 1)).astype(np.uint8))


def damage(kind: str, severity: int) -> float:
    """Mean absolute change of the scene in [0, 1] units."""
    image = scene()
    changed = Corruption(kind, severity)(image, torch.Generator().manual_seed(0))
    assert changed.size == image.size
    assert changed.mode == "RGB"
    return float(np.abs(np.asarray(changed, float) - np.asarray(image, float)).mean() / 255)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_level_damages_more_than_the_one_before(kind: str) -> None:
    """A curve over levels means nothing otherwise."""
    changes = [damage(kind, severity) for severity in range(1, 6)]
    assert len(CORRUPTIONS) == 9
    assert changes[0] > 0.005
    assert changes == sorted(changes)
    assert changes[-1] > 1.3 * changes[0]


def test_noise_has_the_strength_it_says() -> None:
    """Standard deviation, share of struck values, photons."""
    grey = np.full((200, 200, 3), 0.5)
    assert (DAMAGE["gaussian_noise"](grey, 0.1, rng()) - grey).std() == pytest.approx(0.1, rel=0.02)
    struck = DAMAGE["impulse_noise"](grey, 0.2, rng())
    assert (struck == 0).mean() == pytest.approx(0.1, rel=0.05)
    assert (struck == 1).mean() == pytest.approx(0.1, rel=0.05)
    counted = DAMAGE["shot_noise"](grey, 10.0, rng())
    assert counted.mean() == pytest.approx(0.5, rel=0.02)
    assert counted.var() == pytest.approx(0.5 / 10, rel=0.05), "a Poisson count has the variance of its mean"
    np.testing.assert_allclose(counted * 10, np.round(counted * 10), atol=1e-9)


def test_contrast_and_brightness_by_hand() -> None:
    """Two pixels: 0.2 and 0.6 around the mean 0.4; black becomes grey."""
    pixels = np.array([[[0.2, 0.0, 0.4], [0.6, 0.0, 0.4]]])
    np.testing.assert_allclose(contrast(pixels, 0.5, rng())[0, :, 0], [0.3, 0.5])
    np.testing.assert_allclose(contrast(pixels, 0.5, rng())[0, :, 2], [0.4, 0.4])
    np.testing.assert_allclose(brightness(pixels, 0.2, rng())[0, 0], [0.3, 0.0, 0.6])
    np.testing.assert_allclose(brightness(pixels, 0.5, rng())[0, 1], [1.0, 0.0, 0.4 / 0.6])
    np.testing.assert_allclose(brightness(np.zeros((1, 1, 3)), 0.3, rng())[0, 0], [0.3, 0.3, 0.3])


def test_blurs_spread_a_point_and_lose_nothing() -> None:
    """A disc of radius 2 holds 13 whole pixels and 8 halved ones; a line has its length. Flat areas stay."""
    point = np.zeros((224, 224, 3))
    point[112, 112] = 1
    disc = DAMAGE["defocus_blur"](point, 2.0, rng())[..., 0]
    assert disc.sum() == pytest.approx(1)
    spread = disc[110:115, 110:115] / disc[112, 112]
    inner = 2.5 - 5**0.5
    expected = [
        [0, inner, 0.5, inner, 0],
        [inner, 1, 1, 1, inner],
        [0.5, 1, 1, 1, 0.5],
        [inner, 1, 1, 1, inner],
        [0, inner, 0.5, inner, 0],
    ]
    np.testing.assert_allclose(spread, expected, atol=1e-12)
    line = DAMAGE["motion_blur"](point, 20.0, rng())[..., 0]
    assert line.sum() == pytest.approx(1)
    y, x = np.nonzero(line)
    assert np.hypot(np.ptp(y), np.ptp(x)) == pytest.approx(20, abs=2.5)
    flat = np.full((30, 40, 3), 0.3)
    for blur in (DAMAGE["defocus_blur"], DAMAGE["motion_blur"]):
        np.testing.assert_allclose(blur(flat, 10.0, rng()), flat)


def test_a_small_image_suffers_as_much_as_a_large_one() -> None:
    """Blur widths are parts of the side; a fixed number of pixels would wipe out an icon."""
    small, large = scene(56), scene(224)
    values = []
    for image in (small, large):
        blurred = Corruption("defocus_blur", 5)(image, torch.Generator())
        values.append(np.asarray(blurred, float)[..., 0].std() / np.asarray(image, float)[..., 0].std())
    assert values[0] == pytest.approx(values[1], rel=0.25)


def test_pixels_become_blocks() -> None:
    """Half the size: every second pixel repeats the one before."""
    pixels = rng().random((8, 8, 3))
    blocks = DAMAGE["pixelate"](pixels, 0.5, rng())
    np.testing.assert_array_equal(blocks[0::2, 0::2], blocks[1::2, 1::2])
    np.testing.assert_allclose(blocks[0, 0], pixels[:2, :2].mean(axis=(0, 1)), atol=1.01 / 255)


def test_all_models_see_the_same_damaged_images() -> None:
    """As an augmentation of a dataset the noise depends on the position alone."""
    noisy = [colour_questions(1).with_augmentation(Corruption("gaussian_noise", 3)) for _ in range(2)]
    first, again, other = noisy[0][2]["image"], noisy[1][2]["image"], noisy[0][3]["image"]
    np.testing.assert_array_equal(np.asarray(first), np.asarray(again))
    assert (np.asarray(first) != np.asarray(other)).any()


def test_unknown_kinds_and_levels_are_refused() -> None:
    """With what there is."""
    with pytest.raises(ValueError, match=r"one of \('brightness', 'contrast'.*got 'snow'"):
        Corruption("snow", 1)
    with pytest.raises(ValueError, match="`severity` from 1 to 5, got 6"):
        Corruption("jpeg", 6)
