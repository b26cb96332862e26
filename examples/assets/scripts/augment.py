"""Random recolouring and affine warps of RGBA batches, as pure tensor functions (CPU or GPU)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_model import IMAGE_MEAN, IMAGE_STD


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(count).uniform_(low, high, generator=generator)


def random_affine(count: int, generator: torch.Generator) -> Tensor:
    """Sampling matrices (count, 2, 3): rotation to 15 degrees, scale 0.7 to 1.15, stretch, shift to 10 %; no flips."""
    angle = _uniform(count, -0.26, 0.26, generator)
    scale = 1 / _uniform(count, 0.7, 1.15, generator)
    stretch = _uniform(count, 0.88, 1.14, generator)
    shear = _uniform(count, -0.12, 0.12, generator)
    shift = torch.empty(count, 2).uniform_(-0.2, 0.2, generator=generator)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack(
        [torch.stack([cos, shear - sin], 1) * (scale * stretch)[:, None], torch.stack([sin, cos], 1) * scale[:, None]],
        dim=1,
    )
    return torch.cat([matrix, shift[:, :, None]], dim=2)


def _random_colours(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Foreground and background colours (count, 3): dark on light, light on dark, or any pair with contrast."""
    first = torch.rand(count, 3, generator=generator)
    second = torch.rand(count, 3, generator=generator)
    # Push the pair apart in brightness, so that the drawing stays visible.
    dark, light = first * 0.55, 1 - second * 0.45
    swap = (torch.rand(count, generator=generator) < 0.35)[:, None]
    foreground, background = torch.where(swap, light, dark), torch.where(swap, dark, light)
    plain = torch.rand(count, generator=generator)[:, None]
    background = torch.where((plain < 0.5) & ~swap, torch.ones(()), background)
    foreground = torch.where((plain < 0.35) & ~swap, torch.zeros(()), foreground)
    return foreground, background


def augment(rgba: Tensor, monochrome: Tensor, generator: torch.Generator) -> Tensor:
    """Normalised pixel values (batch, 3, 48, 48) of randomly warped and recoloured images.

    Args:
        rgba: uint8 (batch, 48, 48, 4), straight alpha.
        monochrome: bool (batch,): one-colour drawings, whose colour says nothing.
        generator: CPU generator of all random draws.
    """
    count, device = len(rgba), rgba.device
    foreground, background = (colour.to(device) for colour in _random_colours(count, generator))
    grid = F.affine_grid(random_affine(count, generator).to(device), [count, 4, 48, 48], align_corners=False)
    image = rgba.permute(0, 3, 1, 2).float().div_(255)
    colour, alpha = image[:, :3], image[:, 3:]
    # Two-tone icons keep their second tone in the brightness of the (black to grey) ink.
    ink = torch.where(monochrome[:, None, None, None], colour + (1 - colour) * foreground[:, :, None, None], colour)
    premultiplied = torch.cat([ink * alpha, alpha], dim=1)
    warped = F.grid_sample(premultiplied, grid, mode="bilinear", align_corners=False)
    pixels = warped[:, :3] + (1 - warped[:, 3:]) * background[:, :, None, None]
    return normalise(_random_grey(pixels, generator))


def _random_grey(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Turn 20 % of the images grey and change the contrast of all a little."""
    count, device = len(pixels), pixels.device
    grey = (torch.rand(count, generator=generator) < 0.2).to(device)[:, None, None, None]
    pixels = torch.where(grey, pixels.mean(dim=1, keepdim=True).expand_as(pixels), pixels)
    contrast = _uniform(count, 0.8, 1.1, generator).to(device)[:, None, None, None]
    brightness = _uniform(count, -0.06, 0.06, generator).to(device)[:, None, None, None]
    return ((pixels - 0.5) * contrast + 0.5 + brightness).clamp_(0, 1)


def normalise(pixels: Tensor) -> Tensor:
    """Pixel values in [0, 1] to model input, with the processor's mean and standard deviation."""
    mean = pixels.new_tensor(IMAGE_MEAN)[:, None, None]
    return (pixels - mean) / pixels.new_tensor(IMAGE_STD)[:, None, None]
