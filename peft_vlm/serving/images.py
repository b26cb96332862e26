"""Find and read image files, and prepare pixels for a classifier, with numpy and Pillow only."""

import io
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ImageError
from .escape import one_line

logger = logging.getLogger(__name__)

#: Pillow's names of the image formats that are opened anywhere in this package. A file's content decides which of them
#: it is, never its name. Pillow knows more: vector formats that start other programs (EPS), video, scientific data.
RASTER_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

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


@cache
def _raster_suffixes() -> frozenset[str]:
    """File endings of `RASTER_FORMATS`, in lower case."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in RASTER_FORMATS)


@cache
def log_once(message: str, level: int = logging.WARNING) -> None:
    """Log what a process has to say when it says it first: training, test and every further seed come to it again.

    Args:
        message: Text, in which names of files and classes may be a stranger's.
        level: Level of the log.
    """
    logger.log(level, "%s", one_line(message))


def say_left_out(root: Path, counts: Mapping[str, int]) -> None:
    """Log what is left out of a folder, once per process.

    Args:
        root: The folder.
        counts: Numbers by what it is.
    """
    if counts:
        listed = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
        log_once(f"Left out of {str(root)!r}: {listed}.")


def find_images(root: Path, *, read_elsewhere: Collection[str] = ()) -> list[Path]:
    """Image files below a folder in sorted order: those whose name or content says so.

    Links are followed; hidden files and folders, `__MACOSX`, circles of links, empty folders and other files are left
    out and counted in the log.

    Args:
        root: The folder.
        read_elsewhere: Names of files that are not counted.
    """
    left_out: Counter[str] = Counter()
    files = []
    for path in sorted(folder / name for folder, names in walk(root, left_out) for name in names):
        if is_image_file(path):
            files.append(path)
        elif path.name not in read_elsewhere:
            left_out[f"files {path.suffix.lower()!r}" if path.suffix else "files without ending"] += 1
    say_left_out(root, left_out)
    return files


def walk(root: Path, left_out: Counter[str]) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it, each with the names of its files; nothing that is hidden.

    Links are followed, but never in a circle, and into one folder a few times only: links beside each other that lead
    to one folder, again and again, would make a small folder endless.

    Args:
        root: The folder.
        left_out: Counts what is left out, by what it is.
    """
    entered: Counter[tuple[int, int]] = Counter()
    waiting = [(root, frozenset([_place(root)]))]
    while waiting:
        folder, above = waiting.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            left_out["folders that cannot be read"] += 1
            continue
        left_out.update([] if entries else ["empty folders"])
        names = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                left_out["hidden files and folders"] += 1
            elif not os.path.isdir(entry.path):
                names.append(entry.name)
            elif (place := _place(entry.path)) in above:
                left_out["links in a circle"] += 1
            elif entered[place] == MAX_ENTRANCES:
                left_out["folders that many links lead to"] += 1
            else:
                entered[place] += 1
                waiting.append((folder / entry.name, above | {place}))
        yield folder, names


def _place(folder: str | Path) -> tuple[int, int]:
    """What a folder is, on whatever way one comes to it."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


#: How often one folder is entered, by different links.
MAX_ENTRANCES = 16


def is_image_file(path: Path) -> bool:
    """True if name or content of a file say that it is a raster image; which one, its content decides.

    Args:
        path: A path; links are followed, and pipes and devices are no files.
    """
    if not os.path.isfile(path):  # which takes a name that is too long as well
        return False
    if path.suffix.lower() in _raster_suffixes():
        return True
    try:
        with path.open("rb") as file:
            return is_raster_image(file.read(16))
    except OSError:
        return False


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
    except UnidentifiedImageError as error:  # whose message names an object of Python instead of the file
        raise ImageError("its content is no image of a kind that is read") from error
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


class PixelError(ImageError):
    """The numbers of an image are none that can be shown: no pixels, or a range that nobody has said."""


#: Colours of 16 bits a channel, which Pillow reads as 8: it drops the lower half.
_DEEP_COLOUR = re.compile(r"\b(RGB[AXa]?|LA|CMYK);16[BLN]")
DEEP_WHITE = 65535.0


def white_of(image: Image.Image) -> float | None:
    """The number that is white by the type of an image alone; None for 8 bits and less.

    Args:
        image: As Pillow opened it, before it is decoded.
    """
    if image.mode.startswith("I;16") or any(_DEEP_COLOUR.search(str(tile)) for tile in getattr(image, "tile", ())):
        return DEEP_WHITE
    if image.mode == "I":  # files of these formats hold 16 bits at most, and Pillow scales them to that
        return DEEP_WHITE if image.format in ("PNG", "PPM", "JPEG2000") else 2.0**31 - 1
    return 1.0 if image.mode == "F" else None


def extrema_of(image: Image.Image) -> tuple[float, float]:
    """Smallest and largest number of a decoded image over all channels; of 16-bit colours, the upper half.

    Args:
        image: Decoded image.
    """
    values = np.asarray(image)
    return float(values.min()), float(values.max())


def decode_rgb(image: Image.Image, value_range: tuple[float, float] | None = None) -> Image.Image:
    """Decode an image, turn it upright, and convert it to three channels of 8 bits.

    Args:
        image: As Pillow opened it.
        value_range: Which numbers are black and white in images of more than 8 bits; None: 0 and the highest number
            of the type for integers, 0 and 1 for decimal numbers.

    Raises:
        PixelError: If the image has no pixels, or numbers that the range does not fit.
    """
    check_size(image)
    white = white_of(image)
    image.load()
    upright = ImageOps.exif_transpose(image)
    if 0 in upright.size:
        raise PixelError(f"has no pixels: its size is {upright.size}. Take it out of the dataset.")
    return _to_rgb(upright if white is None else _as_8_bits(upright, white, value_range))


def _as_8_bits(image: Image.Image, white: float, value_range: tuple[float, float] | None) -> Image.Image:
    low, high = extrema_of(image)
    held = f"holds numbers from {low:g} to {high:g}"
    if white == DEEP_WHITE and not image.mode.startswith("I"):
        if value_range not in (None, (0, DEEP_WHITE)) or (value_range is None and high == 0):
            raise PixelError(
                f"has 16-bit colours, of which only the upper half is read, so that `value_range`={value_range!r} "
                f"does not fit. Convert the files to 8 bits, or pass `value_range=(0, {DEEP_WHITE:.0f})`."
            )
        return image
    if not np.isfinite([low, high]).all():
        raise PixelError(f"{held}, which are not all finite.")
    values = np.asarray(image)
    if value_range is not None:
        black, white = value_range
        scaled = (values.astype(np.float64) - black) / (white - black)
    elif white == 1:
        if low < 0 or high > 1:
            raise PixelError(f"{held}, beyond 0 to 1. Pass `value_range=(black, white)`.")
        scaled = values
    else:
        lowest = (int(white) + 1) // 256
        if low < 0 or 0 < high < lowest:
            raise PixelError(
                f"{held}, all black where {white:g} is white. Pass `value_range=(black, white)`, for example (0, 255)."
            )
        log_once(f"grey images of up to {white:g} are scaled to 8 bits (said once)", logging.INFO)
        return Image.fromarray((values.astype(np.int64) // lowest).clip(0, 255).astype(np.uint8))
    log_once(f"images of mode {image.mode} are scaled to 8 bits (said once)", logging.INFO)
    return Image.fromarray((scaled.clip(0, 1) * 255).round().astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    """An image with three channels; what was converted is logged once per kind.

    Grey and palette images get three channels, transparent ones are laid over white.

    Args:
        image: PIL image of 8 bits a channel.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        log_once("transparent images are laid over white (said once)", logging.INFO)
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    log_once(f"images of mode {image.mode} are converted to RGB (said once)", logging.INFO)
    return image.convert("RGB")


#: What is opened as an image: a path, the content of a file, or a PIL image.
ImageSource = str | Path | bytes | Image.Image


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
        value_range: Which numbers are black and white in images of more than 8 bits; None: see `decode_rgb`.
    """

    image_size: tuple[int, int]
    resize: tuple[int, ...]
    resample: int
    rescale_factor: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    value_range: tuple[float, float] | None = None

    def __call__(self, image: ImageSource) -> np.ndarray:
        """Pixels of shape (3, rows, cols) in float32, normalised.

        Args:
            image: A path, the content of a file, or a PIL image; the orientation that a photo records is applied.
                What is none is an `ImageError`.

        Raises:
            ImageError: If it is no image, or one too large.
        """
        image = _decoded(image, self.value_range)
        (rows, cols), (height, width) = self._resized(image.height, image.width), self.image_size
        top, left, resample = (rows - height) // 2, (cols - width) // 2, Image.Resampling(self.resample)
        largest = max(cols * min(image.height, rows), rows * (width if rows >= image.height else cols))
        if Image.MAX_IMAGE_PIXELS is not None and largest > Image.MAX_IMAGE_PIXELS:
            limit = f"{Image.MAX_IMAGE_PIXELS:,}"
            raise ImageError(f"Expected at most {limit} pixels after resizing, got {cols} x {rows}. Cut the image.")
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


def pixels_of(images: Sequence[ImageSource], preprocessing: Preprocessing) -> np.ndarray:
    """Pixels of several images in one array.

    Args:
        images: Paths, contents of files, or PIL images.
        preprocessing: Makes the pixels of each.

    Raises:
        ImageError: If it is a single image and no list.
    """
    if isinstance(images, str | Path | bytes | Image.Image):
        raise ImageError("expected a list of images, got a single one. Put it into brackets.")
    return np.stack([preprocessing(image) for image in images])


def _decoded(image: ImageSource, value_range: tuple[float, float] | None) -> Image.Image:
    name = "the image" if isinstance(image, bytes | Image.Image) else repr(str(image))
    try:
        return decode_rgb(image if isinstance(image, Image.Image) else open_raster(image), value_range)
    except PixelError as error:
        raise ImageError(f"{name} {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them stumble over
        raise ImageError(f"{name} cannot be read as an image: {error}") from error
