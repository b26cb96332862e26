"""Configuration of a TVP adapter."""

from dataclasses import dataclass, field
from typing import Any, no_type_check

from peft import PeftType
from PIL import Image
from torch import Tensor

from peft_vlm.adapters.adapter_files import Shape
from peft_vlm.adapters.config import VLMConfig
from peft_vlm.adapters.context import check_count
from peft_vlm.adapters.pixel_prompt import SHAPES, SHRINKS, PixelSettings, draw_prompt
from peft_vlm.data.shrink import normalization_of
from peft_vlm.errors import check_choice
from peft_vlm.registry import extend_peft_type

extend_peft_type("TVP")


@no_type_check  # wrong types get the messages of `__post_init__`, in tests too
@dataclass
class TVPConfig(VLMConfig):
    """A pixel prompt in [0, 1] units that is added to every image; the adapter is this prompt.

    Make one with `TVPConfig.for_processor(processor)`, which reads `image_mean` and `image_std`. Loaded onto another
    model, the prompt is resized to what that model looks at.

    Args:
        canvas_size: Rows and columns of the prompt. Official: 224.
        border: Width of the black border around the shrunken image, and of the frame of `shape="border"`, in canvas
            pixels. Official: 30, which leaves a window of 164.
        shape: Where the prompt is: `"border"`: on the border only (official), `"full"`: everywhere, `"patch"`: in a
            square in the lower right corner.
        patch_size: Side of the square of `shape="patch"`, in canvas pixels.
        shrink: Who shrinks the image into the window: `"model"`: the model, on what its ordinary processor delivers
            (each tile of a tiled input by itself); `"processor"`: a `ShrinkingProcessor` before the model, exactly as
            the official code; `"none"`: nobody, the prompt lies over the image.
        clamp: Cut prompted pixels to [0, 1], with gradients as if they were not cut. Official: False.

    References:
        Exploring the Transferability of Visual Prompting for Multimodal Large Language Models, 2024,
        arXiv 2404.11207.
    """

    canvas_size: int = field(default=224)
    border: int = field(default=30)
    shape: str = field(default="border")
    patch_size: int | None = field(default=None)
    shrink: str = field(default="model")
    clamp: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["TVP"]
        check_count(self, "canvas_size", minimum=1)
        check_count(self, "border")
        check_choice("shape", self.shape, SHAPES)
        check_choice("shrink", self.shrink, SHRINKS)
        if not isinstance(self.clamp, bool):
            raise TypeError(f"Expected `clamp` to be True or False, got {self.clamp!r}.")
        if 2 * self.border >= self.canvas_size:
            raise ValueError(
                f"Expected `border` below half of `canvas_size`={self.canvas_size}, got {self.border!r}: nothing "
                "would be left of the image."
            )
        if self.shape == "border" and not self.border:
            raise ValueError("Expected `border` of 1 or more with `shape`='border', got 0: there is nothing to train.")
        self._check_patch()
        self._check_channels()

    def file_shapes(self) -> dict[str, Shape]:
        """The shape of the prompt, the one tensor of the file."""
        return {r".*\.tvp_prompt": (3, self.canvas_size, self.canvas_size)}

    def _check_patch(self) -> None:
        """Refuse a patch that is missing, unwanted or too large."""
        if self.shape != "patch":
            if self.patch_size is not None:
                raise ValueError(
                    f"Expected `patch_size` only with `shape`='patch', got {self.patch_size!r} with {self.shape!r}."
                )
            return
        check_count(self, "patch_size", minimum=1)
        if int(self.patch_size or 0) > self.canvas_size:
            raise ValueError(f"Expected `patch_size` up to `canvas_size`={self.canvas_size}, got {self.patch_size!r}.")

    def _check_channels(self) -> None:
        """Refuse means and deviations that are not three numbers, or that divide by zero."""
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError(
                f"Expected `image_mean` and `image_std` together, got {self.image_mean!r} and {self.image_std!r}. "
                "`TVPConfig.for_processor(processor)` reads both."
            )
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if values is not None and len(values) != 3:
                raise ValueError(f"Expected `{name}` with 3 values, got {values!r}.")
        if self.image_std is not None and min(self.image_std) <= 0:
            raise ValueError(f"Expected `image_std` above 0, got {self.image_std!r}.")

    @classmethod
    def for_processor(cls, processor: Any, **settings: Any) -> "TVPConfig":
        """A configuration with the mean and standard deviation of a model's processor.

        Args:
            processor: Image processor, or a processor that holds one.
            **settings: Further fields.
        """
        mean, std = normalization_of(processor)
        return cls(**({"image_mean": list(mean), "image_std": list(std)} | settings))

    @property
    def pixel_settings(self) -> PixelSettings:
        """What the layer needs; mean and standard deviation are known by then."""
        return PixelSettings(
            canvas_size=self.canvas_size,
            border=self.border,
            shape=self.shape,
            patch_size=self.patch_size,
            shrink=self.shrink,
            clamp=self.clamp,
            image_mean=tuple(self.image_mean),
            image_std=tuple(self.image_std),
        )

    def prompt_image(self, tensors: dict[str, Tensor]) -> Image.Image:
        """The prompt as an image of at least 448 px.

        Args:
            tensors: The weights file, whose one tensor is the prompt.
        """
        (prompt,) = (tensor for name, tensor in tensors.items() if name.endswith("tvp_prompt"))
        return draw_prompt(prompt.float(), self.pixel_settings.mask(), side=448)
