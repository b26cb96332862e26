"""Whatever stands for an image, as an RGB picture in memory."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from peft_vlm.errors import DataError
from peft_vlm.serving.pictures import to_rgb

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""What counts as an image in a folder. Pillow registers more, PDF and video among them, which it cannot read."""


def read_image(value: Any, *, where: str = "image") -> Image.Image:
    """Open an image and convert it to RGB.

    Grey and palette images get three channels, transparent ones are laid over white, 16-bit grey is scaled to 8 bits,
    and the EXIF orientation of photos is applied (as `datasets` does). What was converted is logged once per kind.

    Args:
        value: A path, file content as `bytes`, a mapping with `bytes` or `path` (an undecoded `datasets` image), a PIL
            image, or an array of shape (rows, cols), (rows, cols, 1), (rows, cols, 3) or (rows, cols, 4) with integers
            in [0, 255].
        where: What the value is, for the error message, such as `"image 17"`.

    Raises:
        DataError: If there is no such file, it is no image or a damaged one, or the image has no pixels.
    """
    name = f"{where} ({_source_name(value)})"
    try:
        image = _open(value)
        image.load()
        image = ImageOps.exif_transpose(image)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist. Check the path and the folder relative paths start from.") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them stumble over
        raise DataError(
            f"{name} cannot be read as an image: {error}. Replace the file or take it out of the dataset."
        ) from error
    if 0 in image.size:
        raise DataError(f"{name} has no pixels: its size is {image.size}. Take it out of the dataset.")
    return to_rgb(image)


def _source_name(value: Any) -> str:
    if isinstance(value, str | Path):
        return f"file {str(value)!r}"
    if isinstance(value, Mapping) and value.get("path"):
        return f"file {value['path']!r}"
    return type(value).__name__


def _open(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str | Path):
        return Image.open(value)
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    if isinstance(value, Mapping) and (value.get("bytes") is not None or value.get("path") is not None):
        return _open(value["bytes"] if value.get("bytes") is not None else value["path"])
    if isinstance(value, np.ndarray):
        return _from_array(value)
    raise DataError(
        f"Expected an image as a path, bytes, PIL image or numpy array, got {type(value).__name__}. "
        "Tensors: pass `tensor.permute(1, 2, 0).numpy()` with values from 0 to 255 as uint8."
    )


def _from_array(array: np.ndarray) -> Image.Image:
    is_picture = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not is_picture:
        raise DataError(
            "Expected a uint8 array of shape (rows, cols) or (rows, cols, 1, 3 or 4), "
            f"got {array.dtype} of shape {array.shape}. Scale to 0..255 and put the channels last."
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
