"""Which mean and standard deviation a prompt in [0, 1] pixel units is added with."""

import warnings
from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoImageProcessor

from peft_vlm.adapters.config import architecture_of
from peft_vlm.adapters.pixel_prompt import active_name, prompt_layer_of
from peft_vlm.data.shrink import normalization_of
from peft_vlm.errors import AdapterError, PeftVLMWarning
from peft_vlm.methods.tvp.config import TVPConfig


def choose_normalization(config: TVPConfig, model: nn.Module, model_config: dict[str, Any]) -> None:
    """Fill `image_mean` and `image_std` for the model an adapter is put on.

    A new adapter keeps what it was given. A loaded one keeps it on the model it was made for; on another model the
    values of that model's own image processor are taken, if it lies on this computer.

    Args:
        config: Configuration; its mean and standard deviation may change.
        model: The base model.
        model_config: `model.config.to_dict()`.

    Raises:
        AdapterError: If the configuration has no values and the model's image processor is not found.
    """
    name = model_config.get("_name_or_path") or None
    is_new = config.base_architecture is None
    if config.image_mean is not None and (is_new or (name is not None and name == config.base_model_name_or_path)):
        return
    found = local_normalization(name) if name else None
    is_other = not is_new and config.base_architecture != architecture_of(model_config)
    if found is not None:
        config.image_mean, config.image_std = list(found[0]), list(found[1])
    elif config.image_mean is None:
        raise AdapterError(
            "Expected `image_mean` and `image_std` of the model's image processor, got none, and no image processor "
            f"beside {name!r}. Make the configuration with `TVPConfig.for_processor(processor)`."
        )
    elif is_other:
        warnings.warn(
            f"No image processor was found beside the model {name!r}, so the prompt is added with the mean "
            f"{config.image_mean} and standard deviation {config.image_std} of the model it was made for. If this "
            "model's processor has others, call `set_normalization(model, processor)`.",
            PeftVLMWarning,
            stacklevel=2,
        )
    if not is_new and (is_other or found is not None):
        config.base_model_name_or_path = name


def local_normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of the image processor stored with a model; None if there is none here.

    Args:
        name: Folder, or Hub id that is looked up in the local cache only.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        return None
    return normalization_of(processor)


def set_normalization(model: PeftModel, processor: Any) -> None:
    """Add the active prompt with the mean and standard deviation of a processor, and record them in the configuration.

    Args:
        model: `PeftModel` with an active TVP adapter.
        processor: The model's image processor, or a processor that holds one.
    """
    mean, std = normalization_of(processor)
    layer = prompt_layer_of(model)
    name = active_name(layer)
    layer.settings[name] = replace(layer.settings[name], image_mean=mean, image_std=std)
    config = model.peft_config[name]
    config.image_mean, config.image_std = list(mean), list(std)
