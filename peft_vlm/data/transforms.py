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


@runtime_checkable
class ImageAugmentation(Protocol):
    """Interface of what changes an image before the model's own processor sees it."""

    def __call__(self, image: Image.Image, generator: torch.Generator, /) -> Image.Image:
        """The changed RGB image; the generator is the only source of randomness."""
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
        _check_view(scale, ratio, flip_probability)
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
        image = _random_view(image, self.image_size, self, generator)
        if self.colour_jitter:
            image = _jitter(image, self.colour_jitter, generator)
        # (rows, cols, channels) of bytes -> (channels, rows, cols)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() * self.rescale_factor
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return (pixels - mean) / std


class RandomCrop:
    """A random part of the image, randomly mirrored, in the size of the image or a fixed one.

    Args:
        scale: Share of the image's area that a crop covers, smallest and largest.
        ratio: Width over height of a crop, smallest and largest.
        flip_probability: Chance of mirroring left and right. Use 0 where sides matter (text, "left or right").
        size: Rows and columns of the result; None: those of the image.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        *,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
        size: tuple[int, int] | None = None,
    ) -> None:
        _check_view(scale, ratio, flip_probability)
        self.scale, self.ratio, self.flip_probability, self.size = scale, ratio, flip_probability, size

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """The cropped image.

        Args:
            image: RGB image.
            generator: The only source of randomness.
        """
        return _random_view(image, self.size or (image.height, image.width), self, generator)


def _check_view(scale: tuple[float, float], ratio: tuple[float, float], flip_probability: float) -> None:
    """Refuse settings of a random view that are out of range."""
    _check_range("scale", scale, upper=1.0)
    _check_range("ratio", ratio, upper=math.inf)
    if not 0 <= flip_probability <= 1:
        raise ValueError(f"Expected `flip_probability` in [0, 1], got {flip_probability!r}.")


def _random_view(
    image: Image.Image, size: tuple[int, int], settings: TrainTransform | RandomCrop, generator: torch.Generator
) -> Image.Image:
    """A random part of an image at some (rows, cols), randomly mirrored."""
    top, left, height, width = random_crop_box(
        (image.height, image.width), scale=settings.scale, ratio=settings.ratio, generator=generator
    )
    rows, cols = size
    image = image.crop((left, top, left + width, top + height)).resize((cols, rows), Image.Resampling.BICUBIC)
    is_flipped = torch.rand(1, generator=generator).item() < settings.flip_probability  # drawn in any case
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped else image


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
    # Drawn on a log scale, so that wide and high crops are equally likely.
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
