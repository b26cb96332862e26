"""The vision side of a vision-language model where its architectures differ: patch embedding and visual tokens.

Models differ in what their own forward gets: one image per row, tiles beside it, padding images, packed patches. At
the patch embedding the same thing arrives everywhere: images of 3 channels, or (Qwen2-VL and its successors) patches
that a grid puts back into images. Behind it, every image-text-to-text model of transformers makes its visual tokens in
`get_image_features` (vision tower, projection or Q-Former, merging of patches and tiles), which its own forward pass
calls.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.errors import UnsupportedModelError
from peft_vlm.models.towers import unwrap

RGB = 3


@dataclass(frozen=True)
class _PatchEmbedding:
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


def patch_embedding_of(model: nn.Module) -> _PatchEmbedding:
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
    return _PatchEmbedding(_plain(name), base.get_submodule(_plain(name)), kind)


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


_METHOD = "get_image_features"


class _RecordedTokens:
    """Visual tokens of the forward passes inside `record_visual_tokens`."""

    def __init__(self) -> None:
        self.calls: list[Tensor] = []

    @property
    def tokens(self) -> Float[Tensor, "tokens width"]:
        """Tokens of all images in their order, one below the other.

        Raises:
            UnsupportedModelError: If the model ran without making any.
        """
        if not self.calls:
            raise UnsupportedModelError(
                "Expected visual tokens, got none: no forward pass ran, the batch has no images, or the model does "
                f"not call its own `{_METHOD}`."
            )
        return torch.cat(self.calls)


@contextmanager
def record_visual_tokens(model: nn.Module) -> Iterator[_RecordedTokens]:
    """Inside, every forward pass leaves the visual tokens it computed anyway, with their gradients.

    Args:
        model: Image-text-to-text model, with or without adapters.
    """
    owner, recorded = _owner(model), _RecordedTokens()
    before = owner.__dict__.get(_METHOD)  # another recording may be going on around this one
    original = getattr(owner, _METHOD)

    def recording(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        recorded.calls.append(_one_below_the_other(output.pooler_output))
        return output

    owner.__dict__[_METHOD] = recording
    try:
        yield recorded
    finally:
        if before is None:
            del owner.__dict__[_METHOD]
        else:
            owner.__dict__[_METHOD] = before


def encode_visual_tokens(model: nn.Module, columns: Mapping[str, Tensor]) -> Float[Tensor, "tokens width"]:
    """The visual tokens of a batch, without running the language model.

    Args:
        model: Image-text-to-text model, with or without adapters.
        columns: Columns of a batch; those that are not for the vision side are left out.
    """
    owner = _owner(model)
    parameters = inspect.signature(getattr(owner, _METHOD)).parameters
    names = set(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        names.add("image_sizes")  # LLaVA hands it on to towers that take images of any size
    given = {name: value for name, value in columns.items() if name in names}
    return _one_below_the_other(getattr(owner, _METHOD)(**given, return_dict=True).pooler_output)


def _owner(model: nn.Module) -> nn.Module:
    """The innermost module with `get_image_features`, which the outer ones only hand on to."""
    base = unwrap(model)
    owners = [module for module in base.modules() if inspect.isroutine(getattr(type(module), _METHOD, None))]
    if not owners:
        raise UnsupportedModelError(
            f"Expected a model that makes visual tokens (`{_METHOD}`), got `{type(base).__name__}`. Load it with "
            "`AutoModelForImageTextToText`."
        )
    return owners[-1]


def _one_below_the_other(features: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Float[Tensor, "tokens width"]:
    """Visual tokens in the order in which they take their places in the text, whatever the model groups them by."""
    # A tensor (images, tokens, width), or a list with another number of tokens per image.
    parts = [features] if isinstance(features, Tensor) else features
    return torch.cat([part.flatten(0, -2) for part in parts])
