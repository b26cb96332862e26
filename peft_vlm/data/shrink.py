"""Images shrunk into a window with a black border before a model's own processor sees them, as TVP's official code
does."""

import copy
from typing import Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor, ProcessorMixin

from peft_vlm.data.images import read_image
from peft_vlm.errors import DataError

PIXEL_STEP = 1 / 255


def normalization_of(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations by which a processor turns pixels in [0, 1] into a model's input.

    Args:
        processor: Image processor, or a processor that holds one.

    Returns:
        Three means and three standard deviations; 0 and 1 where the processor does not normalise.

    Raises:
        DataError: If the processor names none, or its input is not in [0, 1] pixel units before it normalises.
    """
    settings = _image_processor_of(processor).to_dict()
    kind = type(processor).__name__
    if abs((settings.get("rescale_factor") or 0.0) - PIXEL_STEP) > 1e-6 or not settings.get("do_rescale", True):
        raise DataError(
            f"Expected an image processor that rescales pixels to [0, 1] first, got `{kind}` with "
            f"do_rescale={settings.get('do_rescale')!r} and rescale_factor={settings.get('rescale_factor')!r}. "
            "A prompt in [0, 1] pixel units would have another size there; switch rescaling by 1/255 on."
        )
    if settings.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if mean is None or std is None:
        raise DataError(
            f"Expected an image processor with `image_mean` and `image_std`, got `{kind}` with {mean!r} and {std!r}. "
            "Give both to `TVPConfig(image_mean=..., image_std=...)`; with do_normalize=False they are 0 and 1."
        )
    triples = tuple(tuple(map(float, v)) if isinstance(v, list | tuple) else (float(v),) * 3 for v in (mean, std))
    return triples[0], triples[1]


def _image_processor_of(processor: Any) -> Any:
    """The image processor inside a processor of texts and images; an image processor as it is.

    Args:
        processor: Processor of a model.

    Raises:
        DataError: If there is none.
    """
    if isinstance(processor, ShrinkingProcessor):
        return _image_processor_of(processor.processor)
    if isinstance(processor, ProcessorMixin) and "image_processor" in processor.get_attributes():
        return _image_processor_of(processor.image_processor)
    if not isinstance(processor, BaseImageProcessor):
        raise DataError(
            f"Expected an image processor with a mean and a standard deviation, got `{type(processor).__name__}`. "
            "Load the model's own: `AutoImageProcessor.from_pretrained(name)`."
        )
    return processor


def shrunken_image(image: Image.Image, *, canvas_size: int, border: int, upscale: bool = False) -> Image.Image:
    """An image resized (bicubic) into the window of a black square.

    Formula: window = canvas_size - 2 * border; the shorter side becomes the window's, the longer is cut to its middle.

    Args:
        image: RGB image.
        canvas_size: Rows and columns of the square.
        border: Width of the black border.
        upscale: True enlarges smaller images, as the official code does with its 32-pixel ones.

    Raises:
        DataError: If the image is smaller than the window and must not be enlarged.
    """
    window = canvas_size - 2 * border
    if min(image.size) < window and not upscale:
        raise DataError(
            f"Expected images of {window}x{window} px or more for the window of a canvas of {canvas_size} px with a "
            f"border of {border} px, got {image.width}x{image.height}. Use a smaller canvas, or enlarge small images "
            "by `upscale=True`."
        )
    scale = window / min(image.size)
    size = max(window, round(image.width * scale)), max(window, round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - window) // 2, (image.height - window) // 2
    canvas = Image.new("RGB", (canvas_size, canvas_size))
    canvas.paste(image.crop((left, top, left + window, top + window)), (border, border))
    return canvas


class ShrinkingProcessor:
    """A processor whose images are shrunk into a window with a black border first; everything else is its own.

    Belongs to adapters with `shrink="processor"`. A processor that cuts an image into tiles is refused, because the
    border would not be where the prompt is: switch tiles off, or let the model shrink (`shrink="model"`).

    Args:
        processor: Image processor, or a processor of texts and images; it is not changed.
        canvas_size: Rows and columns of the canvas, as in `TVPConfig`.
        border: Width of the border, as in `TVPConfig`.
        upscale: Enlarge images that are smaller than the window instead of refusing them.

    Raises:
        ValueError: If the border leaves no window.
    """

    def __init__(self, processor: Any, *, canvas_size: int, border: int, upscale: bool = False) -> None:
        if not 0 <= 2 * border < canvas_size:
            raise ValueError(
                f"Expected `border` from 0 to below half of `canvas_size`={canvas_size!r}, got {border!r}."
            )
        self.canvas_size, self.border, self.upscale = canvas_size, border, upscale
        images = _image_processor_of(processor)
        if images is processor:
            self.processor = processor
        else:  # the processor calls its image processor, also for chat templates
            self.processor = copy.copy(processor)
            inner = ShrinkingProcessor(images, canvas_size=canvas_size, border=border, upscale=upscale)
            self.processor.image_processor = inner
        self._is_image_processor = images is processor

    def __getattr__(self, name: str) -> Any:
        if name == "processor" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Outputs of the processor for the shrunken images.

        Args:
            images: One PIL image or array, or (nested) lists of them.
            *args: Passed on.
            **kwargs: Passed on.

        Raises:
            DataError: If an image is too small, or is cut into tiles.
        """
        if not self._is_image_processor or images is None:
            return self.processor(images, *args, **kwargs)
        outputs = self.processor(self._shrunken(images), *args, **kwargs)
        outputs_count, count = _num_outputs(outputs), _count(images)
        if outputs_count > count:
            raise DataError(
                f"Expected one output per image, got {outputs_count} of {count} images: the processor "
                f"`{type(self.processor).__name__}` cuts images into tiles, and the border is not around each. "
                "Switch tiles off, or use `shrink='model'`."
            )
        return outputs

    def _shrunken(self, images: Any) -> Any:
        """The images, in the nesting they came in."""
        if isinstance(images, list | tuple):
            return [self._shrunken(image) for image in images]
        return shrunken_image(
            read_image(images), canvas_size=self.canvas_size, border=self.border, upscale=self.upscale
        )


def _count(images: Any) -> int:
    """Number of images in nested lists."""
    return sum(map(_count, images)) if isinstance(images, list | tuple) else 1


def _num_outputs(outputs: Any) -> int:
    """Number of images that a processor made; each tile counts, padding does not."""
    if "image_grid_thw" in outputs:
        return len(outputs["image_grid_thw"])
    parts = [np.asarray(part) for part in outputs["pixel_values"]]
    tiles = [tile for part in parts for tile in part.reshape(-1, *part.shape[-3:])]
    return sum(bool(tile.any()) for tile in tiles)
