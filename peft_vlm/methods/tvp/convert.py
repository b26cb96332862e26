"""Official TVP checkpoint to adapter folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from peft_vlm.adapters.pixel_prompt import prompt_of
from peft_vlm.conversion.export import OfficialCheckpoint
from peft_vlm.conversion.official_file import ConversionReport, OfficialFile
from peft_vlm.errors import AdapterError
from peft_vlm.files import CONVERSION_NAME, new_folder, write_json
from peft_vlm.methods.tvp.config import TVPConfig
from peft_vlm.registry import OfficialFormat

KIND = "TVP"
OFFICIAL_KEY = "perturbation"
OFFICIAL_ARCHITECTURE = {"model_type": "minigpt4"}
"""The model family of the official trainer, which is not in transformers: for every model the prompt is a guest."""


def convert_checkpoint(
    source: str | Path | OfficialFile,
    folder: str | Path,
    *,
    border: int | None = None,
    shape: str | None = None,
    patch_size: int | None = None,
    shrink: str | None = None,
) -> ConversionReport:
    """Write an adapter folder that `PeftModel.from_pretrained(model, folder)` loads onto any model TVP works on.

    Canvas and border are read off the tensor: the border is what the largest square of zeros in the middle leaves; a
    prompt without zeros in its middle becomes `shape="full"`. Mean and standard deviation are CLIP's, as in the
    official code; on a model with another image processor its own are taken.

    Args:
        source: `checkpoint_best.pth` of the official code: one tensor (3, size, size) under `perturbation`.
        folder: New folder.
        border: Width of the border around the image, where the tensor does not show it.
        shape: `"border"`, `"full"` or `"patch"`, where the tensor does not show it.
        patch_size: Side of the square of `shape="patch"`.
        shrink: Who shrinks the image into the window, see `TVPConfig`.

    Raises:
        AdapterError: If the prompt is not zero outside a shape that was given.
    """
    file = OfficialFile.open(source)
    prompt = _official_prompt(file)
    size, found = prompt.shape[-1], _border_of(prompt)
    settings: dict[str, Any] = {"canvas_size": size} | ({"border": found} if found else {"shape": "full", "border": 0})
    settings |= {"image_mean": list(OPENAI_CLIP_MEAN), "image_std": list(OPENAI_CLIP_STD)}
    given = {"border": border, "shape": shape, "patch_size": patch_size, "shrink": shrink}
    config = TVPConfig(**(settings | {name: value for name, value in given.items() if value is not None}))
    outside = prompt * (1 - config.pixel_settings.mask())
    if outside.any():
        raise AdapterError(
            f"Expected a prompt that is zero outside its shape, got {int(outside.count_nonzero())} values outside "
            f"`shape`={config.shape!r} with `border`={config.border}. Leave the shape out: it is read off the tensor."
        )
    config.base_architecture = dict(OFFICIAL_ARCHITECTURE)
    config.inference_mode = True
    file.note(f"Canvas of {size} pixels, `shape`={config.shape!r}, `border`={config.border}.")
    report = file.report(KIND, config)
    with new_folder(folder) as part:
        config.save_pretrained(part)
        save_file({"base_model.model.tvp_prompt": prompt}, part / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        write_json(part / CONVERSION_NAME, report.to_dict())
    return report


def to_official(model: PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> OfficialCheckpoint:
    """`checkpoint_best.pth` of the official TVP: the prompt as it acts, and nothing else.

    Args:
        model: Model with the active adapter.
        tokenizer: The base model's; the file holds no texts.

    Raises:
        AdapterError: If the adapter cuts prompted pixels to [0, 1], which the official code does not.
    """
    settings = model.active_peft_config.pixel_settings
    if settings.clamp:
        raise AdapterError("Expected an adapter with `clamp`=False, as in the official code, got True.")
    sizes = {"canvas": settings.canvas_size, "border": settings.border}
    return OfficialCheckpoint({OFFICIAL_KEY: prompt_of(model).float()}, sizes, is_wrapped=False)


def _official_prompt(file: OfficialFile) -> Float[Tensor, "channels canvas canvas"]:
    """The prompt in an official checkpoint, in [0, 1] pixel units.

    Args:
        file: File with one tensor under `perturbation`.

    Raises:
        AdapterError: If it holds something else.
    """
    if set(file.tensors) != {OFFICIAL_KEY}:
        raise AdapterError(
            f"Expected one tensor {OFFICIAL_KEY!r} in {str(file.path)!r}, got {sorted(file.tensors)!r}. Official TVP "
            "checkpoints hold nothing else."
        )
    prompt = file.take(OFFICIAL_KEY)
    if prompt.ndim != 3 or prompt.shape[0] != 3 or prompt.shape[1] != prompt.shape[2]:
        raise AdapterError(
            f"Expected a prompt of shape (3, size, size), got {tuple(prompt.shape)} in {str(file.path)!r}."
        )
    return prompt


def _is_tvp(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file is a pixel prompt."""
    return OFFICIAL_KEY in tensors


def _border_of(prompt: Float[Tensor, "channels canvas canvas"]) -> int:
    """Width of the frame outside of which a prompt is zero; 0 when its middle is not."""
    used = prompt.abs().sum(dim=0) > 0
    size = len(used) if used.any() else 0
    for border in range(1, (size + 1) // 2):
        if not used[border : size - border, border : size - border].any():
            return border
    return 0


OFFICIAL_FORMATS = (OfficialFormat(KIND, _is_tvp, convert_checkpoint),)
