"""The patch embedding: the one convolution by which a vision-language model cuts an image into patches.

Models differ in what their own forward gets: one image per row, tiles beside it, padding images, packed patches. At
the patch embedding the same thing arrives everywhere: images of 3 channels, or (Qwen2-VL and its successors) patches
that a grid puts back into images.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_vlm.errors import UnsupportedModelError
from peft_vlm.models.towers import unwrap

RGB = 3


@dataclass(frozen=True)
class PatchEmbedding:
    """The module through which pixels enter.

    Args:
        name: Its full name in the Hugging Face model, the same before and after an adapter wraps it.
        module: The module, or the adapter layer around it.
        kind: `"image"`: a convolution that gets (images, 3, rows, cols). `"packed"`: a vision model that gets
            flattened patches and `grid_thw`.
    """

    name: str
    module: nn.Module
    kind: str


def patch_embedding_of(model: nn.Module) -> PatchEmbedding:
    """Find the patch embedding of a model by what it is, whatever it is called.

    Args:
        model: Any Hugging Face model, with or without a `PeftModel` around it.

    Raises:
        UnsupportedModelError: If no convolution takes 3 channels, or several do, or one takes videos without a grid.
    """
    base = unwrap(model)
    modules = dict(base.named_modules())
    names = [n for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Conv3d) and m.in_channels == RGB]
    if len(names) != 1:
        found = f"{len(names)}: {', '.join(map(_plain, names))}" if names else "none"
        advice = (
            "A pixel prompt needs a single way in; wrap the vision tower you mean as a model of its own."
            if names
            else "Text models have none; models that embed flattened patches by a linear layer (NaFlex) do not keep "
            "the rows and columns that a pixel prompt needs."
        )
        raise UnsupportedModelError(
            f"Expected one convolution over 3 colour channels in `{type(base).__name__}`, got {found}. {advice}"
        )
    (name,) = names
    kind = "image"
    if isinstance(modules[name], nn.Conv3d):  # frames, rows and columns of packed patches
        kind, name = "packed", _owner_of_grid(modules, name)
    return PatchEmbedding(_plain(name), base.get_submodule(_plain(name)), kind)


def input_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of the images that reach the patch embedding; None where they depend on the image.

    Args:
        model: Any Hugging Face model, with or without a `PeftModel` around it.
    """
    settings: dict[str, Any] = unwrap(model).config.to_dict()
    size = (settings.get("vision_config") or settings).get("image_size")
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None


def _plain(name: str) -> str:
    """A module's name in the model without adapters."""
    return name.replace(".base_layer", "")


def _owner_of_grid(modules: dict[str, nn.Module], name: str) -> str:
    """The innermost module around a convolution over time that is told the grid of its patches."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        owner = ".".join(parts[:end])
        if "grid_thw" in inspect.signature(type(modules[owner]).forward).parameters:
            return owner
    raise UnsupportedModelError(
        f"Expected a vision model that gets `grid_thw` around the convolution over time {_plain(name)!r}, got none. "
        "Video encoders without a grid of patches are not supported."
    )
