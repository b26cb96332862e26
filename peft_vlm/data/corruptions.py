"""Image corruptions at five levels, to measure the robustness of a prompt: noise, blur, light, compression.

Kinds and strengths follow the ImageNet-C benchmark, whose images are 224 px high. Widths of blurs are parts of the
shorter side here, so that a small image suffers as much as a large one; everything is computed with Pillow and numpy.

References:
    Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, 2019, arXiv 1903.12261, Sec. 4.
"""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from peft_vlm.errors import check_choice

#: Pixels of the shorter side that the blur widths below are given for.
REFERENCE_SIDE = 224
LEVELS = (1, 2, 3, 4, 5)

Pixels = np.ndarray  # (rows, cols, 3) in [0, 1]
Offsets = Mapping[tuple[int, int], float]


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption at one level; an augmentation of `ImageQuestionDataset`.

    What is random is drawn from the generator alone, so that all models see the same corrupted images.

    Args:
        kind: One of `CORRUPTIONS`.
        severity: Level from 1 to 5.

    Raises:
        ValueError: If kind or severity is unknown.
    """

    kind: str
    severity: int

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, sorted(CORRUPTIONS))
        if self.severity not in LEVELS:
            raise ValueError(f"Expected `severity` from 1 to 5, got {self.severity!r}.")

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """The corrupted image, of the same size.

        Args:
            image: RGB image.
            generator: The only source of randomness.
        """
        seed = int(torch.randint(0, 2**31, (1,), generator=generator).item())
        damage, strengths = CORRUPTIONS[self.kind]
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
        damaged = damage(pixels, strengths[self.severity - 1], np.random.default_rng(seed))
        return Image.fromarray(np.round(255 * damaged.clip(0, 1)).astype(np.uint8))


def _gaussian_noise(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Normal noise of a standard deviation."""
    return pixels + rng.normal(0, strength, pixels.shape)


def _shot_noise(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Poisson noise of a camera that counts up to so many photons."""
    return rng.poisson(pixels * strength) / strength


def _impulse_noise(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Set a share of all values to 0 or 1, half of it each."""
    draw = rng.random(pixels.shape)
    return np.where(draw < strength / 2, 0.0, np.where(draw < strength, 1.0, pixels))


def _defocus_blur(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Mean over a disc of a radius."""
    radius = strength * min(pixels.shape[:2]) / REFERENCE_SIDE
    reach = range(-math.ceil(radius), math.ceil(radius) + 1)
    # Pixels that the rim cuts count in part, so that radii below one pixel still blur.
    weights = {(dy, dx): min(max(radius + 0.5 - math.hypot(dy, dx), 0.0), 1.0) for dy in reach for dx in reach}
    return _average(pixels, weights)


def _motion_blur(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Mean along a line of a length, whose direction is drawn within 45 degrees of the horizontal."""
    length = strength * min(pixels.shape[:2]) / REFERENCE_SIDE
    angle = rng.uniform(-math.pi / 4, math.pi / 4)
    weights: dict[tuple[int, int], float] = {}
    for step in np.linspace(-length / 2, length / 2, 2 * math.ceil(length) + 1):
        y, x = step * math.sin(angle), step * math.cos(angle)
        top, left = math.floor(y), math.floor(x)
        for dy, share_y in ((top, top + 1 - y), (top + 1, y - top)):
            for dx, share_x in ((left, left + 1 - x), (left + 1, x - left)):
                weights[dy, dx] = weights.get((dy, dx), 0.0) + share_y * share_x
    return _average(pixels, weights)


def contrast(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Scale the distances from the mean of each channel."""
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return (pixels - mean) * strength + mean


def brightness(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Raise the value of hue, saturation and value, up to 1."""
    value = pixels.max(axis=2, keepdims=True)
    brighter = np.minimum(value + strength, 1.0)
    return np.where(value > 0, pixels * brighter / np.maximum(value, 1e-12), brighter)


def jpeg(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Compression at a JPEG quality."""
    file = io.BytesIO()
    Image.fromarray(np.round(255 * pixels).astype(np.uint8)).save(file, "JPEG", quality=int(strength))
    return np.asarray(Image.open(file).convert("RGB"), dtype=np.float64) / 255


def _pixelate(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Shrunk to a share of its size by averaging, and enlarged without smoothing."""
    image = Image.fromarray(np.round(255 * pixels).astype(np.uint8))
    size = max(1, round(image.width * strength)), max(1, round(image.height * strength))
    small = image.resize(size, Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.NEAREST), dtype=np.float64) / 255


#: Kind of damage -> function and its strength at the levels 1 to 5.
CORRUPTIONS: dict[str, tuple[Callable[[Pixels, float, np.random.Generator], Pixels], tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60.0, 25.0, 12.0, 5.0, 3.0)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (_defocus_blur, (3.0, 4.0, 6.0, 8.0, 10.0)),
    "motion_blur": (_motion_blur, (10.0, 15.0, 20.0, 25.0, 30.0)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "jpeg": (jpeg, (25.0, 18.0, 15.0, 10.0, 7.0)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
}


def _average(pixels: Pixels, weights: Offsets) -> Pixels:
    """Weighted mean of the image shifted by each offset; its edges are repeated outwards."""
    reach = max(max(abs(dy), abs(dx)) for dy, dx in weights)
    padded = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    rows, cols = pixels.shape[:2]
    total = np.zeros_like(pixels)
    for (dy, dx), weight in weights.items():
        if weight:
            total += weight * padded[reach + dy : reach + dy + rows, reach + dx : reach + dx + cols]
    return total / sum(weights.values())
