"""CoCoOp as a PEFT tuner: a context that a network of two layers shifts by the image."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.adapters.context import ContextTuner
from peft_vlm.adapters.layer import PromptLayer, own_module
from peft_vlm.adapters.learned_tokens import ShiftedContext
from peft_vlm.models.towers import towers_of

REDUCTION = 16
"""The network's hidden layer is this many times narrower than an image feature, in the paper and the official code."""


class ImageContext(ShiftedContext):
    """CLIP's token embedding whose reserved slots are filled with context vectors plus a shift by the image.

    Args:
        base_layer: `nn.Embedding` of the text tower.
        prefix: The method's parameter prefix.
        dim: Numbers of an image feature.
    """

    without_shift = (
        "Class prompts of a CoCoOp adapter depend on the image, so there are no class features without one. "
        "Classify with `PromptedClassifier`, or `conditioned_logits(model, prompts, image_features)` of "
        "`peft_vlm.text`; an adapter without the image in its prompts (CoOp) can be exported."
    )

    def __init__(self, base_layer: nn.Module, *, prefix: str, dim: int) -> None:
        super().__init__(base_layer, prefix=prefix)
        network = tuple(f"{prefix}{name}" for name in ("weight1", "bias1", "weight2", "bias2"))
        self.adapter_layer_names = (f"{prefix}prompt", *network)
        for name in network:
            setattr(self, name, nn.ParameterDict())
        self.dim = dim

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """The context, and a network that begins as `nn.Linear` does.

        Args:
            adapter_name: Key of the new tensors.
            config: A `CoCoOpConfig`, completed by `complete_whole_context`.
        """
        super().add_adapter(adapter_name, config)
        like = self.prompts[adapter_name]
        hidden, width = max(1, self.dim // REDUCTION), like.shape[-1]
        shapes = ((hidden, self.dim), (hidden,), (width, hidden), (width,))
        fan_in = (self.dim, self.dim, hidden, hidden)
        for name, shape, count in zip(self.adapter_layer_names[1:], shapes, fan_in, strict=True):
            start = torch.empty(shape).uniform_(-(count**-0.5), count**-0.5)  # drawn on the CPU in float32
            own_module(self, name)[adapter_name] = nn.Parameter(start if like.is_meta else start.to(like))

    @property
    def sees_image(self) -> bool:
        """Always."""
        return True

    def shifts(self, image_features: Float[Tensor, "images dim"] | None) -> Float[Tensor, "images 1 width"]:
        """What the network makes of each image.

        Args:
            image_features: Features of the images, not normalised.
        """
        assert image_features is not None, "its context sees the image"
        networks = self.adapter_layer_names[1:]
        weight1, bias1, weight2, bias2 = (own_module(self, part)[self.current_adapter] for part in networks)
        unit = nn.functional.normalize(image_features.to(weight1.dtype), dim=-1)
        hidden = nn.functional.linear(unit, weight1, bias1).relu()  # (images, dim / 16)
        return nn.functional.linear(hidden, weight2, bias2)[:, None]  # one shift for all context vectors


class CoCoOpModel(ContextTuner):
    """The tuner behind `get_peft_model(clip, CoCoOpConfig(...))`."""

    prefix = "cocoop_"

    def wrap(self, target: nn.Module) -> PromptLayer:
        """The token embedding with an image-conditioned context.

        Args:
            target: `nn.Embedding` of the text tower.
        """
        return ImageContext(target, prefix=self.prefix, dim=towers_of(self.model).model.config.projection_dim)
