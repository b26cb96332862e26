"""A learned pixel prompt that is added to every image, before the patch embedding of a model.

The prompt lives on a square canvas in [0, 1] pixel units, before normalisation, and is resized to whatever the model
looks at; so the same tensor acts on models with other sizes, means and standard deviations.

References:
    Exploring the Transferability of Visual Prompting for Multimodal Large Language Models, 2024, arXiv 2404.11207;
    Visual Prompting, 2022, arXiv 2203.17274 (frame and patch in pixel space).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from peft_vlm.adapters.layer import LearnedPrompt
from peft_vlm.errors import AdapterError, UnsupportedModelError

SHAPES = ("border", "full", "patch")
"""Shapes of the prompt on the canvas: a frame, all of it, or a square in the lower right corner."""

SHRINKS = ("model", "processor", "none")
"""Who shrinks the image into the window inside the border: this layer, a processor before the model, or nobody."""

INIT_STD = 0.1
"""Standard deviation of a prompt that starts perturbed (`init_weights=False`)."""


@dataclass(frozen=True)
class PixelSettings:
    """Settings by which one adapter's prompt is drawn and added.

    Args:
        canvas_size: Rows and columns of the canvas.
        border: Width of the frame around the window, in canvas pixels.
        shape: One of `SHAPES`.
        patch_size: Side of the square of `shape="patch"`.
        shrink: One of `SHRINKS`.
        clamp: Whether prompted pixels are cut to [0, 1]; gradients pass as if they were not.
        image_mean: Channel means of the model's image processor.
        image_std: Channel standard deviations of that processor.
    """

    canvas_size: int
    border: int
    shape: str
    patch_size: int | None
    shrink: str
    clamp: bool
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def mask(self, device: torch.device | None = None) -> Float[Tensor, "1 canvas canvas"]:
        """1 where the prompt is, 0 elsewhere."""
        size, border = self.canvas_size, self.border
        mask = torch.ones(1, size, size, device=device)
        if self.shape == "border":
            mask[:, border : size - border, border : size - border] = 0
        elif self.shape == "patch":
            start = size - (self.patch_size or size)
            mask[:, :start], mask[:, :, :start] = 0, 0
        return mask


def window_of(size: int, settings: PixelSettings) -> tuple[int, int]:
    """Start and length of the window along one side of an image.

    Args:
        size: Rows or columns of the image.
        settings: Canvas and border.
    """
    start = int(size * settings.border / settings.canvas_size + 0.5)
    return start, size - 2 * start


def shrink_into_window(
    images: Float[Tensor, "batch channels rows cols"], settings: PixelSettings
) -> Float[Tensor, "batch channels rows cols"]:
    """Images made smaller (bicubic, antialiased, within [0, 1] as PIL does it) on a black ground of their old size.

    Args:
        images: Pixel values in [0, 1] before normalisation.
        settings: Canvas and border, which give the window.
    """
    top, rows = window_of(images.shape[-2], settings)
    left, cols = window_of(images.shape[-1], settings)
    if (rows, cols) == images.shape[-2:]:
        return images
    small = interpolate(images, size=(rows, cols), mode="bicubic", align_corners=False, antialias=True)
    return pad(small.clamp(0, 1), (left, left, top, top))


def resized_prompt(
    prompt: Float[Tensor, "channels canvas canvas"], size: tuple[int, int]
) -> Float[Tensor, "channels rows cols"]:
    """The prompt at an image's size, bilinear and antialiased: no ringing where its values are large.

    Args:
        prompt: Prompt on its canvas.
        size: Rows and columns.
    """
    if prompt.shape[-2:] == size:
        return prompt
    return interpolate(prompt[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def prompted_images(
    images: Float[Tensor, "batch channels rows cols"],
    prompt: Float[Tensor, "channels canvas canvas"] | None,
    settings: PixelSettings,
) -> Float[Tensor, "batch channels rows cols"]:
    """Normalised images with the prompt.

    Formula: x' = (w(x * std + mean) + prompt - mean) / std, with w the shrinking of `shrink="model"`; without it,
        x' = x + prompt / std, which leaves images alone bit for bit where the prompt is zero.

    Args:
        images: Normalised pixel values in float32 or float64.
        prompt: In [0, 1] pixel units; None only shrinks.
        settings: How it is added.
    """
    mean, std = (  # (channels, 1, 1)
        torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)
        for values in (settings.image_mean, settings.image_std)
    )
    shrinks = settings.shrink == "model" and settings.border > 0
    raw = shrink_into_window(images * std + mean, settings) if shrinks else None
    if prompt is None:
        return images if raw is None else (raw - mean) / std
    prompt = resized_prompt(prompt.to(images), tuple(images.shape[-2:]))  # (channels, rows, cols), one for all images
    if settings.clamp:  # straight-through: the value is cut, the gradient is not
        pixels = images * std + mean if raw is None else raw
        seen = pixels + prompt
        prompt = prompt + (seen.clamp(0, 1) - seen).detach()
    return images + prompt / std if raw is None else (raw + prompt - mean) / std


class PixelPrompt(LearnedPrompt):
    """A convolution over 3 channels that sees every image with the active adapter's prompt.

    The parameter is the whole canvas. What lies outside the shape never reaches the image, but gets the gradient it
    would have there: the official update divides by the norm over all pixels before it masks.

    Args:
        base_layer: The patch embedding.
        prefix: The method's parameter prefix.
    """

    def __init__(self, base_layer: nn.Module, *, prefix: str) -> None:
        super().__init__(base_layer, prefix=prefix)
        self.settings: dict[str, PixelSettings] = {}
        self.other_param_names = ("settings",)  # PEFT forgets an entry together with its adapter
        self.prompt_is_off = False

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """A prompt of zeros.

        Args:
            adapter_name: Key of the new tensor.
            config: Configuration with `pixel_settings`.
        """
        settings: PixelSettings = config.pixel_settings
        device = next(self.base_layer.parameters()).device
        prompt = torch.zeros(len(settings.image_mean), settings.canvas_size, settings.canvas_size, device=device)
        if not config.init_weights:
            prompt += INIT_STD * torch.randn(prompt.shape).to(device) * settings.mask(device)
        self.prompts[adapter_name], self.settings[adapter_name] = nn.Parameter(prompt), settings

    def effective_prompt(self, adapter_name: str) -> Float[Tensor, "channels canvas canvas"]:
        """The prompt as it acts: zero outside its shape in value, though not in gradient.

        Args:
            adapter_name: Which adapter.
        """
        prompt = self.prompts[adapter_name].float()
        masked = prompt * self.settings[adapter_name].mask(prompt.device)
        return prompt + (masked - prompt).detach()  # the value is masked, the gradient is not

    def prompted(self, images: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch channels rows cols"]:
        """Images as the base layer gets them, computed in float32 and returned in their own dtype."""
        name = self.current_adapter
        if name is None:
            return images
        with torch.autocast(images.device.type, enabled=False):
            prompt = None if self.prompt_is_off else self.effective_prompt(name)
            # In half precision a step of the prompt can be smaller than what a pixel can hold.
            wide = images.to(torch.promote_types(images.dtype, torch.float32))
            return prompted_images(wide, prompt, self.settings[name]).to(images.dtype)

    def forward(self, images: Float[Tensor, "batch channels rows cols"]) -> Tensor:
        """The base layer on prompted images.

        Args:
            images: Normalised pixel values.
        """
        return self.base_layer(self.prompted(images))

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        """PEFT's override point: the prompt follows the base to its device, and stays in float32."""
        return next(base_layer.parameters()).device, None


class PackedPixelPrompt(PixelPrompt):
    """A vision model over packed patches (Qwen2-VL and its successors) that sees every image with the prompt.

    The frames of a video are images too.

    Args:
        base_layer: Vision model that gets flattened patches and `grid_thw`.
        prefix: The method's parameter prefix.
    """

    def forward(
        self, patches: Float[Tensor, "patches width"], grid_thw: Int[Tensor, "images 3"], *args: Any, **kwargs: Any
    ) -> Any:
        """The vision model on prompted patches.

        Args:
            patches: Flattened patches of all images.
            grid_thw: Per image its number of frame groups, patch rows and patch columns.
            *args: Passed on.
            **kwargs: Passed on.
        """
        if self.current_adapter is not None:
            counts = grid_thw.prod(dim=-1).tolist()  # patches per image
            parts = zip(patches.split(counts), grid_thw.tolist(), strict=True)
            patches = torch.cat([self._prompted_patches(part, tuple(grid)) for part, grid in parts])
        return self.base_layer(patches, grid_thw, *args, **kwargs)

    def _prompted_patches(
        self, patches: Float[Tensor, "patches width"], grid: tuple[int, int, int]
    ) -> Float[Tensor, "patches width"]:
        """One image out of its patches, prompted, and cut again.

        Patches come in squares of `merge` by `merge`, each patch as (channels, frames, rows, cols).
        """
        groups, rows, cols = grid
        merge, (frames, height, width) = self._patch_shape()
        split = (groups, rows // merge, cols // merge, merge, merge, -1, frames, height, width)
        # (groups, frames, channels, rows/m, m, height, cols/m, m, width): frames first, then the pixels of an image
        images = patches.view(split).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        flat = images.reshape(groups * frames, -1, rows * height, cols * width)
        prompted = self.prompted(flat).view(images.shape)
        # The inverse of the permutation above.
        return prompted.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(patches.shape)

    def _patch_shape(self) -> tuple[int, tuple[int, ...]]:
        """Side of the squares in which patches are merged, and the kernel over frames, rows and columns."""
        kernels = [m.kernel_size for m in self.base_layer.modules() if isinstance(m, nn.Conv3d)]
        if len(kernels) != 1:
            raise UnsupportedModelError(f"Expected one convolution over patches, got {len(kernels)}.")
        return int(self.base_layer.spatial_merge_size), kernels[0]


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
    """The active prompt as an image: grey is zero, brighter adds, darker takes away.

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
    """A prompt as an image: grey is zero, brighter adds, darker takes away.

    Args:
        prompt: In [0, 1] pixel units.
        mask: 1 where the prompt is.
        limit: Value shown as full brightness, in [0, 1] pixel units; by default the one that 99.9 % of the prompt's
            own values stay below.
        side: Least rows and columns of the image, which is enlarged to a whole multiple of the canvas.

    Raises:
        ValueError: If the limit is not above 0.
    """
    if limit is None:
        values = prompt[(mask > 0).expand_as(prompt)].abs().sort().values
        limit = float(values[int(SHOWN_SHARE * (len(values) - 1))]) or 1.0
    if limit <= 0:
        raise ValueError(f"Expected `limit` above 0, got {limit!r}.")
    # [-limit, limit] becomes [0, 1], so that zero is mid-grey
    shown = (0.5 + 0.5 * prompt * mask / limit).clamp(0, 1)
    image = Image.fromarray((255 * shown).round().to(torch.uint8).permute(1, 2, 0).numpy())
    factor = -(-side // image.width)  # rounded up
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def show_prompted(model: nn.Module, images: Sequence[Image.Image], *, side: int = 112) -> Image.Image:
    """Images as they are in the upper row, and below as a model of that input size would look at them.

    Args:
        model: `PeftModel` with a pixel prompt.
        images: At least one image; each is resized to a square.
        side: Rows and columns of a square.
    """
    layer = prompt_layer_of(model)
    settings = layer.settings[active_name(layer)]
    shrink = "none" if settings.shrink == "none" else "model"
    settings = replace(settings, image_mean=(0.0,) * 3, image_std=(1.0,) * 3, shrink=shrink)
    squares = [image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for image in images]
    plain = torch.stack([torch.from_numpy(np.array(square)).permute(2, 0, 1) for square in squares]).float() / 255
    # (2, images, 3, side, side): plain above prompted
    rows = torch.stack([plain, prompted_images(plain, prompt_of(model), settings).clamp(0, 1)])
    # (2, side, images, side, 3), of which the first two and the next two axes are the rows and columns of one sheet
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return Image.fromarray((255 * sheet).round().to(torch.uint8).numpy())
