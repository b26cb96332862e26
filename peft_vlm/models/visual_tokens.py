"""Visual tokens: what a multimodal model's language model gets of an image, recorded while the model runs.

Every image-text-to-text model of transformers makes them in `get_image_features` (vision tower, projection or
Q-Former, merging of patches and tiles), which its own forward pass calls.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.errors import UnsupportedModelError
from peft_vlm.models.towers import unwrap

_METHOD = "get_image_features"


class RecordedTokens:
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
def record_visual_tokens(model: nn.Module) -> Iterator[RecordedTokens]:
    """Inside, every forward pass leaves the visual tokens it computed anyway, with their gradients.

    Args:
        model: Image-text-to-text model, with or without adapters.
    """
    owner, recorded = _owner(model), RecordedTokens()
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
