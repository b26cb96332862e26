"""Size and background of all images."""

import numpy as np

IMAGE_SIZE = 48


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Images (..., 4) composed over white: uint8 RGB (..., 3)."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
