"""A model's pixel prompt from outside: switch it off for a moment, take it off, read it, show it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from peft_vlm.errors import AdapterError
from peft_vlm.prompting.pixel_prompt import PixelPrompt, prompted_images

SHOWN_SHARE = 0.999
"""Share of a prompt's values that `render_prompt` shows uncut."""


def prompt_layer_of(model: nn.Module) -> PixelPrompt:
    """The layer that holds a model's pixel prompts.

    Args:
        model: `PeftModel` with a pixel prompt.

    Raises:
        AdapterError: If the model has none.
    """
    for module in model.modules():
        if isinstance(module, PixelPrompt):
            return module
    raise AdapterError(
        f"Expected a model with a pixel prompt, got `{type(model).__name__}` without. Add one with "
        "`get_peft_model(model, TVPConfig.for_processor(processor))`, or load one with `PeftModel.from_pretrained`."
    )


def remove_prompts(model: nn.Module) -> None:
    """Give a base model back as it was before pixel prompts were put on it, with nothing that PEFT left there.

    Args:
        model: The base model itself, not the `PeftModel` around it.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, PixelPrompt):
            model.set_submodule(name, module.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config


@contextmanager
def without_prompt(model: nn.Module) -> Iterator[None]:
    """Inside, the model sees images as the adapter shrinks them, without its prompt: what the prompt is compared with.

    `disable_adapter()` is something else, namely the base model on images at full size.

    Args:
        model: `PeftModel` with a pixel prompt.
    """
    layer = prompt_layer_of(model)
    before, layer.prompt_is_off = layer.prompt_is_off, True
    try:
        yield
    finally:
        layer.prompt_is_off = before


def active_name(layer: PixelPrompt) -> str:
    """Name of the adapter whose prompt a layer applies, or would apply while adapters are disabled.

    Args:
        layer: The prompt's layer.

    Raises:
        AdapterError: If none is active.
    """
    for name in layer.active_adapters:
        if name in layer.settings:
            return name
    raise AdapterError(f"Expected an active adapter out of {sorted(layer.settings)!r}, got {layer.active_adapters!r}.")


def prompt_of(model: nn.Module) -> Float[Tensor, "channels canvas canvas"]:
    """The active prompt as it acts, in [0, 1] pixel units on its canvas (unbounded), zero outside its shape.

    Args:
        model: `PeftModel` with a pixel prompt.
    """
    layer = prompt_layer_of(model)
    return layer.effective_prompt(active_name(layer)).detach().cpu()


def render_prompt(model: nn.Module, *, limit: float | None = None) -> Image.Image:
    """The active prompt as a picture: grey is zero, brighter adds, darker takes away.

    Args:
        model: `PeftModel` with a pixel prompt.
        limit: See `draw_prompt`.
    """
    layer = prompt_layer_of(model)
    return draw_prompt(prompt_of(model), layer.settings[active_name(layer)].mask(), limit=limit)


def draw_prompt(
    prompt: Float[Tensor, "channels canvas canvas"],
    mask: Float[Tensor, "1 canvas canvas"],
    *,
    limit: float | None = None,
    side: int = 1,
) -> Image.Image:
    """A prompt as a picture: grey is zero, brighter adds, darker takes away.

    Args:
        prompt: In [0, 1] pixel units.
        mask: 1 where the prompt is.
        limit: Value shown as full brightness, in [0, 1] pixel units; by default the one that 99.9 % of the prompt's
            own values stay below.
        side: Least rows and columns of the picture, which is enlarged to a whole multiple of the canvas.

    Raises:
        ValueError: If the limit is not above 0.
    """
    if limit is None:
        values = prompt[(mask > 0).expand_as(prompt)].abs().sort().values
        limit = float(values[int(SHOWN_SHARE * (len(values) - 1))]) or 1.0
    if limit <= 0:
        raise ValueError(f"Expected `limit` above 0, got {limit!r}.")
    shown = (0.5 + 0.5 * prompt * mask / limit).clamp(0, 1)
    picture = Image.fromarray((255 * shown).round().to(torch.uint8).permute(1, 2, 0).numpy())
    factor = -(-side // picture.width)
    return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)


def show_prompted(model: nn.Module, images: Sequence[Image.Image], *, side: int = 112) -> Image.Image:
    """Pictures as they are in the upper row, and below as a model of that input size would look at them.

    Args:
        model: `PeftModel` with a pixel prompt.
        images: At least one picture; each is resized to a square.
        side: Rows and columns of a square.
    """
    layer = prompt_layer_of(model)
    settings = layer.settings[active_name(layer)]
    shrink = "none" if settings.shrink == "none" else "model"
    settings = replace(settings, image_mean=(0.0,) * 3, image_std=(1.0,) * 3, shrink=shrink)
    squares = [image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for image in images]
    plain = torch.stack([torch.from_numpy(np.array(square)).permute(2, 0, 1) for square in squares]).float() / 255
    rows = torch.stack([plain, prompted_images(plain, prompt_of(model), settings).clamp(0, 1)])
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return Image.fromarray((255 * sheet).round().to(torch.uint8).numpy())
