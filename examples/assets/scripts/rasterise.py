"""Draw icons as small RGBA images: iconify JSON bodies through resvg, and bitmap files through Pillow."""

import io
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from pixels import IMAGE_SIZE


def svg_of(icon: dict, defaults: dict) -> str:
    """Complete SVG document of one iconify icon in a square view box; `currentColor` becomes black."""
    width, height, left, top = (
        icon.get(key, defaults.get(key, fallback))
        for key, fallback in (("width", 16), ("height", 16), ("left", 0), ("top", 0))
    )
    side = max(width, height)
    view_box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    body = icon["body"].replace("currentColor", "#000")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side}" height="{side}" viewBox="{view_box}">{body}</svg>'
    )


def draw_svg(svg: str) -> np.ndarray:
    """RGBA image (48, 48, 4), uint8, straight alpha, of an SVG document."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=IMAGE_SIZE, height=IMAGE_SIZE, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def draw_bitmap(path: Path) -> np.ndarray:
    """RGBA image (48, 48, 4), uint8, of a bitmap file, resampled with Lanczos."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGBA").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))
