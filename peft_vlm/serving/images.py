"""Read image files and prepare pixels for a classifier, with numpy and Pillow only."""

import io
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .errors import ImageError

logger = logging.getLogger(__name__)
_said: set[str] = set()

#: Pillow's names of the image formats that are opened anywhere in this package. A file's content decides which of them
#: it is, never its name. Pillow knows more: vector formats that start other programs (EPS), video, scientific data.
RASTER_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

#: What counts as an image in a folder. Pillow registers more, PDF and video among them, which it cannot read.
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

#: First bytes of these formats; JPEG 2000 is either a bare code stream or a box.
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0{4}|II[*+]\0|MM\0[*+]|P[1-6f]\s+[#\d]"
    rb"|\xff\x4f\xff\x51|\0\0\0\x0cjP  |....ftyp(avif|avis|mif1|msf1)",
    re.DOTALL,
)


def is_raster_image(head: bytes) -> bool:
    """True if the first bytes of a file are those of one of `RASTER_FORMATS`.

    Args:
        head: The first 16 bytes, at least.
    """
    return _SIGNATURE.match(head) is not None


def raster_suffixes() -> frozenset[str]:
    """File endings of `RASTER_FORMATS`, in lower case."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in RASTER_FORMATS)


MAX_ASPECT = 200
"""Longest side of an image over its shortest. Resized by its shorter side, a line of 8000 x 1 pixels takes 2 GB."""

MAX_FILE_BYTES = 2**29
"""Largest image file that is read."""


def open_raster(source: str | Path | bytes) -> Image.Image:
    """Open an image of one of `RASTER_FORMATS` without decoding it; Pillow's errors for other files pass through.

    Args:
        source: Path, which is read in full so that no file stays open, or content.

    Raises:
        ImageError: If it is no regular file, or the image is too large (see `check_size`).
    """
    if not isinstance(source, bytes):
        path = Path(source)
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise ImageError("it is no file. Leave folders and pipes out.")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise ImageError(f"expected a file of at most {MAX_FILE_BYTES:,} bytes, got {size:,}. Shrink the image.")
        source = path.read_bytes()
    try:
        image = Image.open(io.BytesIO(source), formats=RASTER_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own look at the size
        limit = Image.MAX_IMAGE_PIXELS or 0
        raise ImageError(f"expected an image of at most {limit:,} pixels, got more. Shrink it.") from error
    check_size(image)
    return image


def check_size(image: Image.Image) -> None:
    """Refuse an image that would take gigabytes or seconds, by its size alone, before it is decoded.

    The number of pixels is Pillow's own limit, `PIL.Image.MAX_IMAGE_PIXELS` (89 million by default, None for any).

    Args:
        image: An image, decoded or not.

    Raises:
        ImageError: If it has too many pixels, or is too long for its width.
    """
    limit, (cols, rows) = Image.MAX_IMAGE_PIXELS, image.size
    if limit is not None and cols * rows > limit:
        raise ImageError(
            f"expected an image of at most {limit:,} pixels, got {cols} x {rows}. Shrink it, or raise "
            "`PIL.Image.MAX_IMAGE_PIXELS` where you trust your images."
        )
    if max(cols, rows) > MAX_ASPECT * max(min(cols, rows), 1):
        raise ImageError(
            f"expected an image at most {MAX_ASPECT} times as long as wide, got {cols} x {rows}. Cut it into parts."
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to three channels of 8 bits; each kind of conversion is logged once.

    Grey and palette images get three channels, transparent ones are laid over white, 16-bit grey is scaled to 8 bits.

    Args:
        image: PIL image of any mode.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        _say_once("16-bit grey images are scaled to 8 bits")
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        _say_once("transparent images are laid over white")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    _say_once(f"images of mode {image.mode} are converted to RGB")
    return image.convert("RGB")


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.info("%s (said once)", message)


@dataclass(frozen=True)
class Preprocessing:
    """The steps of the model's image processor, without transformers.

    Args:
        image_size: Rows and columns of what the model takes.
        resize: One number: the shorter side becomes this long; two: rows and columns, whatever the proportions. The
            middle of the result is cut out where it is larger than `image_size`.
        resample: Pillow's number of the filter.
        rescale_factor: Brings pixels of 0 to 255 to the unit of `image_mean`.
        image_mean: Channel means.
        image_std: Channel standard deviations.
    """

    image_size: tuple[int, int]
    resize: tuple[int, ...]
    resample: int
    rescale_factor: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def __call__(self, image: str | Path | bytes | Image.Image) -> np.ndarray:
        """Pixels of shape (3, rows, cols) in float32, normalised.

        Args:
            image: A path, the content of a file, or a PIL image; the orientation that a photo records is applied.
                What is none is an `ImageError`.
        """
        image = to_rgb(ImageOps.exif_transpose(_open(image)))
        (rows, cols), (height, width) = self._resized(image.height, image.width), self.image_size
        top, left, resample = (rows - height) // 2, (cols - width) // 2, Image.Resampling(self.resample)
        if rows >= image.height:
            # Pillow then resizes columns, rounds, and resizes rows: what the crop cuts off at the sides need not be
            # made high. Where rows shrink it may begin with them (13.0), but nothing gets large.
            image = image.resize((cols, image.height), resample).crop((left, 0, left + width, image.height))
            left, cols = 0, width
        image = image.resize((cols, rows), resample).crop((left, top, left + width, top + height))
        pixels = (np.asarray(image).transpose(2, 0, 1) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(v, dtype=np.float32).reshape(-1, 1, 1) for v in (self.image_mean, self.image_std))
        return (pixels - mean) / std

    def _resized(self, rows: int, cols: int) -> tuple[int, int]:
        if len(self.resize) == 2:
            return self.resize[0], self.resize[1]
        (short,) = self.resize
        return (short, int(short * cols / rows)) if rows <= cols else (int(short * rows / cols), short)


def _open(image: str | Path | bytes | Image.Image) -> Image.Image:
    name = "the image" if isinstance(image, bytes | Image.Image) else repr(str(image))
    try:
        if not isinstance(image, Image.Image):
            image = open_raster(image)
        check_size(image)
        image.load()
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them stumble over
        raise ImageError(f"{name} cannot be read as an image: {error}") from error
    return image
