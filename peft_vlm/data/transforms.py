"""Image to tensor: the model's own processor for evaluation, random crops and flips for training; no torchvision."""

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageEnhance
from torch import Tensor
from transformers import BaseImageProcessor

from peft_vlm.errors import DataError, shown
from peft_vlm.files import is_of
from peft_vlm.serving.card import MAX_SIDE


@runtime_checkable
class ImageTransform(Protocol):
    """Interface of a transform; its settings are recorded in the adapter, to prepare images the same way.

    `image_size` is (rows, cols); `image_mean` and `image_std` are per channel, in [0, 1] pixel units.
    """

    image_size: tuple[int, int]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def __call__(self, image: Image.Image, generator: torch.Generator, /) -> Float[Tensor, "channels rows cols"]:
        """Normalised pixels of an RGB image; the generator is the only source of randomness."""
        ...


def image_size_of(processor: BaseImageProcessor) -> tuple[int, int]:
    """Rows and columns of the images a processor makes.

    Args:
        processor: Image processor of a CLIP-like model.

    Raises:
        DataError: If they depend on the image, as with the processors of NaFlex and of most generative models.
    """
    settings = processor.to_dict()
    size = settings["crop_size"] if settings.get("do_center_crop") else settings.get("size")
    if not isinstance(size, Mapping) or not size.get("height") or not size.get("width"):
        raise DataError(
            f"Expected an image processor with a fixed output size, got `{type(processor).__name__}` with "
            f"size {settings.get('size')!r} and crop_size {settings.get('crop_size')!r}. Set `size` to a height and "
            "a width, or switch on `do_center_crop`."
        )
    for name in ("size", "crop_size"):
        sides = settings.get(name)
        for side in sides.values() if isinstance(sides, Mapping) else [sides]:
            if side is not None and (not isinstance(side, int) or not 1 <= side <= MAX_SIDE):
                raise DataError(f"Expected `{name}` of 1 to {MAX_SIDE} in an image processor, got {shown(sides)}.")
    return int(size["height"]), int(size["width"])


def mean_and_std_of(processor: BaseImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations a processor normalises with; 0 and 1 when it does not."""
    settings = processor.to_dict()
    if not settings.get("do_normalize"):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = settings.get("image_mean"), settings.get("image_std")
    numbers = list(std or ()) if is_of([mean, std], list[list[float]]) else []
    if len(numbers) != 3 or len(mean) != 3 or 0 in numbers:
        raise DataError(
            "Expected `image_mean` and `image_std` of three finite numbers each, none of `image_std` 0, in an image "
            f"processor, got {shown(mean)} and {shown(std)}."
        )
    return tuple(mean), tuple(std)


class EvalTransform:
    """The model's image processor, applied to one image; nothing is random.

    It calls the processor, so pixel values are equal to those of `processor(image)` and of HF pipelines.

    Args:
        processor: Image processor of the model.
    """

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor
        self.image_size = image_size_of(processor)
        self.image_mean, self.image_std = mean_and_std_of(processor)

    def __call__(
        self, image: Image.Image, generator: torch.Generator | None = None
    ) -> Float[Tensor, "channels rows cols"]:
        """Resized, cropped and normalised pixels."""
        return self.processor(image, return_tensors="pt")["pixel_values"][0].float()


class TrainTransform:
    """A random part of the image at the model's size, randomly mirrored, optionally with changed colours.

    The order and the random draws follow torchvision's `RandomResizedCrop` and `RandomHorizontalFlip` (bicubic, as in
    CoOp's code); size, mean and standard deviation are those of the model's image processor.

    Args:
        processor: Image processor of the model.
        scale: Share of the image's area that a crop covers, smallest and largest.
        ratio: Width over height of a crop, smallest and largest, drawn on a log scale.
        flip_probability: Chance of mirroring left and right. Use 0 where sides matter (arrows, text).
        colour_jitter: Largest relative change of brightness, contrast and saturation; 0 leaves the colours alone.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
        colour_jitter: float = 0.0,
    ) -> None:
        _check_range("scale", scale, upper=1.0)
        _check_range("ratio", ratio, upper=math.inf)
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"Expected `flip_probability` in [0, 1], got {flip_probability!r}.")
        if not 0 <= colour_jitter < 1:
            raise ValueError(f"Expected `colour_jitter` in [0, 1), got {colour_jitter!r}.")
        self.image_size = image_size_of(processor)
        self.image_mean, self.image_std = mean_and_std_of(processor)
        settings = processor.to_dict()
        self.rescale_factor: float = settings["rescale_factor"] if settings["do_rescale"] else 1.0
        self.scale, self.ratio = scale, ratio
        self.flip_probability, self.colour_jitter = flip_probability, colour_jitter

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Float[Tensor, "channels rows cols"]:
        """Augmented and normalised pixels.

        Args:
            image: RGB image.
            generator: The only source of randomness.
        """
        top, left, height, width = random_crop_box(
            (image.height, image.width), scale=self.scale, ratio=self.ratio, generator=generator
        )
        rows, cols = self.image_size
        box = (left, top, left + width, top + height)
        image = image.crop(box).resize((cols, rows), Image.Resampling.BICUBIC)
        if torch.rand(1, generator=generator).item() < self.flip_probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.colour_jitter:
            image = _jitter(image, self.colour_jitter, generator)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() * self.rescale_factor
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return (pixels - mean) / std


def random_crop_box(
    size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> tuple[int, int, int, int]:
    """Place of a random crop, by the rule and in the order of draws of torchvision's `RandomResizedCrop.get_params`.

    An area and an aspect ratio are drawn until a crop of that shape fits, ten times at most; then the largest central
    crop within the range of ratios is taken.

    Args:
        size: Rows and columns of the image.
        scale: Range of the share of the area.
        ratio: Range of width over height.
        generator: Source of the draws.

    Returns:
        Top, left, height and width in pixels.
    """
    rows, cols = size
    log_low, log_high = torch.log(torch.tensor(ratio)).tolist()
    for _ in range(10):
        area = rows * cols * torch.empty(1).uniform_(*scale, generator=generator).item()
        aspect = torch.exp(torch.empty(1).uniform_(log_low, log_high, generator=generator)).item()
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= cols and 0 < height <= rows:
            top = int(torch.randint(0, rows - height + 1, (1,), generator=generator).item())
            left = int(torch.randint(0, cols - width + 1, (1,), generator=generator).item())
            return top, left, height, width
    height = min(rows, round(cols / min(ratio))) if cols / rows < min(ratio) else rows
    width = min(cols, round(rows * max(ratio))) if cols / rows > max(ratio) else cols
    return (rows - height) // 2, (cols - width) // 2, max(height, 1), max(width, 1)


def _jitter(image: Image.Image, strength: float, generator: torch.Generator) -> Image.Image:
    factors = 1 + strength * (2 * torch.rand(3, generator=generator) - 1)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhancer, factor in zip(enhancers, factors.tolist(), strict=True):
        image = enhancer(image).enhance(factor)
    return image


def _check_range(name: str, values: tuple[float, float], *, upper: float) -> None:
    low, high = values
    if not 0 < low <= high <= upper:
        raise ValueError(f"Expected `{name}` as (smallest, largest) above 0 and up to {upper}, got {values!r}.")
