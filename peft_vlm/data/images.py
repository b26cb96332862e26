"""An image as a model sees it: opened from wherever it lies, with numbers whose black and white are known."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from peft_vlm.errors import DataError
from peft_vlm.serving.images import (
    MAX_FILE_BYTES,
    PixelError,
    check_size,
    decode_rgb,
    extrema_of,
    open_raster,
    white_of,
)

#: Training images that are looked at before a run.
SAMPLE = 256


def as_value_range(value: Sequence[int | float] | None) -> tuple[float, float] | None:
    """A range as a pair.

    Args:
        value: Number that is black and number that is white.

    Raises:
        DataError: If it is no pair of finite numbers, the first below the second.
    """
    if value is None:
        return None
    pair = tuple(value)
    if len(pair) != 2 or not all(isinstance(end, int | float) and math.isfinite(end) for end in pair):
        raise DataError(f"Expected `value_range` as (black, white), got {value!r}.")
    if not pair[0] < pair[1]:
        raise DataError(f"Expected `value_range` as (black, white) with black below white, got {value!r}.")
    return float(pair[0]), float(pair[1])


def check_value_range(
    tops: Sequence[tuple[float, float] | None], *, value_range: tuple[float, float] | None, are_all: bool
) -> None:
    """Refuse images whose numbers leave open what is white, and a range that none of them needs.

    An integer type of which no image uses the upper half may hold numbers of fewer bits, such as those of a 12-bit
    camera; taken by the range of the type they are nearly black.

    Args:
        tops: Of each image the number that is white by its type, and its highest number; None for 8 bits.
        value_range: The range that was said.
        are_all: True if these are all images there are.

    Raises:
        DataError: If the range is missing, too small, or not needed.
    """
    highest: dict[float, float] = {}
    for white, top in filter(None, tops):
        highest[white] = max(highest.get(white, 0), top)
    if value_range is not None:
        if not highest and are_all:
            raise DataError(
                f"`value_range`={value_range!r} is for images of more than 8 bits, and all images have 8 or less. "
                "Leave it out."
            )
        if any(top > value_range[1] for top in highest.values()):
            raise DataError(
                f"Images hold numbers up to {max(highest.values()):g}, beyond `value_range`={value_range!r}."
            )
        return
    for white, top in highest.items():
        if white != 1 and top <= white // 2:
            likely = 2 ** max(8, math.ceil(math.log2(top + 1))) - 1
            raise DataError(
                f"The training images hold numbers up to {top:g} in a type that reaches {white:.0f}, so what is white "
                f"is not clear. Pass `value_range=(0, {likely})` or another (black, white); the type's is "
                f"`(0, {white:.0f})`."
            )


def read_image(value: Any, *, where: str = "image", value_range: Sequence[int | float] | None = None) -> Image.Image:
    """Open an image and convert it to RGB.

    Grey and palette images get three channels, transparent ones are laid over white, more than 8 bits are scaled to 8,
    and the EXIF orientation of photos is applied (as `datasets` does). What was converted is logged once per kind.

    Args:
        value: A path, also one that `datasets` opens such as `zip://0.png::images.zip`, file content as `bytes`, a
            mapping with `bytes` or `path` (an undecoded `datasets` image), a PIL image, or an array of shape
            (rows, cols), (rows, cols, 1), (rows, cols, 3) or (rows, cols, 4) with integers in [0, 255].
        where: What the value is, for the error message, such as `"image 17"`.
        value_range: Which numbers are black and white in images of more than 8 bits. None: 0 and the highest number of
            the type for integers, 0 and 1 for decimal numbers; it is never guessed from one image.

    Raises:
        DataError: If there is no such file, it is no image or a damaged one, the image has no pixels, or its numbers
            do not fit their range.
    """
    black_and_white = as_value_range(value_range)
    with _reading(f"{where} ({_source_name(value)})"):
        return decode_rgb(_open(value), black_and_white)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Within this, whatever opening or decoding an image raises is a `DataError` that names it."""
    try:
        yield
    except DataError:
        raise
    except PixelError as error:
        raise DataError(f"{name} {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist. Check the path and the folder relative paths start from.") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them stumble over
        raise DataError(
            f"{name} cannot be read as an image: {error}. Replace the file or take it out of the dataset."
        ) from error


def top_of(value: Any) -> tuple[float, float] | None:
    """Number that is white by the type of an image, and its highest number; None for 8 bits.

    Args:
        value: What `read_image` opens. An image that cannot be read is named when it is needed.
    """
    try:
        with _reading("image"):
            image = _open(value)
            check_size(image)
        white = white_of(image)
        if white is None or 0 in image.size:
            return None
        with _reading("image"):
            image.load()
    except DataError:
        return None
    top = extrema_of(image)[1]
    return white, (top if image.mode[0] in "IF" else 257 * top)  # of 16-bit colours the upper half is read


def num_pixels(value: Any) -> int:
    """Pixels of an image by its header, which is read without decoding the image.

    Args:
        value: What `read_image` opens. An image that cannot be read has none here, and is named when it is needed.
    """
    try:
        with _reading("image"):
            image = _open(value)
            return image.size[0] * image.size[1]
    except DataError:
        return 0


def _source_name(value: Any) -> str:
    if isinstance(value, str | Path):
        return f"file {str(value)!r}"
    if isinstance(value, Mapping) and value.get("path"):
        return f"file {value['path']!r}"
    return type(value).__name__


def _open(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str) and "://" in value:  # as in `zip://0.png::images.zip`
        return _open_archived(value)
    if isinstance(value, str | Path | bytes):
        return open_raster(value)
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return _open(value["bytes"])
    if isinstance(value, Mapping) and value.get("path") is not None:
        path = value["path"]  # a stream names the place in the repository that was asked for
        return _open_archived(path, hub=True) if isinstance(path, str) and "hf://" in path else _open(path)
    if isinstance(value, np.ndarray):
        return _from_array(value)
    raise DataError(
        f"Expected an image as a path, bytes, PIL image or numpy array, got {type(value).__name__}. "
        "Tensors: pass `tensor.permute(1, 2, 0).numpy()` with values from 0 to 255 as uint8."
    )


def _open_archived(path: str, *, hub: bool = False) -> Image.Image:
    """Open an image inside an archive; addresses in a list of anybody's would be requested one by one."""
    *inside, place = path.split("::")
    is_local = "://" not in place or (hub and place.startswith("hf://"))
    if not is_local or not all(_IN_ARCHIVE.match(part) for part in inside):
        raise DataError(f"Expected an image of this computer, got the address {path!r}. Download it first.")
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"Expected an image file of at most {MAX_FILE_BYTES:,} bytes, got {path!r} with more.")
    return open_raster(content)


_IN_ARCHIVE = re.compile(r"(zip|tar|gzip|bz2|xz|lz4|zstd)://")


def _from_array(array: np.ndarray) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not is_image:
        raise DataError(
            "Expected a uint8 array of shape (rows, cols) or (rows, cols, 1, 3 or 4), "
            f"got {array.dtype} of shape {array.shape}. Scale to 0..255 and put the channels last."
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
