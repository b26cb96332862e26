"""Official TVP checkpoint to adapter folder."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from peft_vlm.conversion.checkpoint import read_checkpoint
from peft_vlm.errors import AdapterError
from peft_vlm.methods.tvp.config import TVPConfig

OFFICIAL_KEY = "perturbation"
OFFICIAL_ARCHITECTURE = {"model_type": "minigpt4"}
"""The model family of the official trainer, which is not in transformers: for every model the prompt is a guest."""


def convert_checkpoint(path: str | Path, folder: str | Path, **settings: Any) -> TVPConfig:
    """Write an adapter folder that `PeftModel.from_pretrained(model, folder)` loads onto any model TVP works on.

    Canvas and border are read off the tensor: the border is what the largest square of zeros in the middle leaves; a
    prompt without zeros in its middle becomes `shape="full"`. Mean and standard deviation are CLIP's, as in the
    official code; on a model with another image processor its own are taken.

    Args:
        path: `checkpoint_best.pth` of the official code: one tensor (3, size, size) under `perturbation`.
        folder: Where the adapter goes; it is made if need be.
        **settings: Further fields of `TVPConfig`, such as `shrink="processor"`, or `border` where the tensor has none.

    Returns:
        The adapter's configuration.

    Raises:
        AdapterError: If the prompt is not zero outside a shape given in `settings`.
    """
    prompt = official_prompt(path)
    size, border = prompt.shape[-1], border_of(prompt)
    shape = {"canvas_size": size} | ({"border": border} if border else {"shape": "full", "border": 0})
    normalization = {"image_mean": list(OPENAI_CLIP_MEAN), "image_std": list(OPENAI_CLIP_STD)}
    config = TVPConfig(**(shape | normalization | settings))
    outside = prompt * (1 - config.pixel_settings.mask())
    if outside.any():
        raise AdapterError(
            f"Expected a prompt that is zero outside its shape, got {int(outside.count_nonzero())} values outside "
            f"`shape`={config.shape!r} with `border`={config.border}. Leave the shape out: it is read off the tensor."
        )
    config.base_architecture = dict(OFFICIAL_ARCHITECTURE)
    config.inference_mode = True
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file({"base_model.model.tvp_prompt": prompt}, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return config


def official_prompt(path: str | Path) -> Float[Tensor, "channels canvas canvas"]:
    """The prompt in an official checkpoint, in [0, 1] pixel units.

    Args:
        path: File with one tensor under `perturbation`.

    Raises:
        AdapterError: If it holds something else.
    """
    tensors = read_checkpoint(path)
    prompt = tensors.get(OFFICIAL_KEY)
    unused = sorted(set(tensors) - {OFFICIAL_KEY})
    if prompt is None or unused:
        raise AdapterError(
            f"Expected one tensor {OFFICIAL_KEY!r} in {str(path)!r}, got {sorted(tensors)!r}. Official TVP "
            "checkpoints hold nothing else."
        )
    if prompt.ndim != 3 or prompt.shape[0] != 3 or prompt.shape[1] != prompt.shape[2]:
        raise AdapterError(f"Expected a prompt of shape (3, size, size), got {tuple(prompt.shape)} in {str(path)!r}.")
    return prompt.detach().to(torch.float32).contiguous()


def border_of(prompt: Float[Tensor, "channels canvas canvas"]) -> int:
    """Width of the frame outside of which a prompt is zero; 0 when its middle is not."""
    used = prompt.abs().sum(dim=0) > 0
    size = len(used) if used.any() else 0
    for border in range(1, (size + 1) // 2):
        if not used[border : size - border, border : size - border].any():
            return border
    return 0
