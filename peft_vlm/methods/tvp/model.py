"""TVP as a PEFT tuner: a pixel prompt around the patch embedding, in the normalisation of the model it is put on."""

import logging
import warnings
from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoImageProcessor

from peft_vlm.adapters.config import VLMConfig, architecture_differences
from peft_vlm.adapters.layer import PromptLayer
from peft_vlm.adapters.pixel_prompt import PackedPixelPrompt, PixelPrompt, active_name, prompt_layer_of
from peft_vlm.adapters.tuner import VLMTuner
from peft_vlm.data.shrink import normalization_of
from peft_vlm.errors import AdapterError, PeftVLMWarning, shown
from peft_vlm.methods.tvp.config import TVPConfig
from peft_vlm.models.vision import input_size_of, patch_embedding_of


def _choose_normalization(config: TVPConfig, model: nn.Module, model_config: dict[str, Any]) -> None:
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
    is_recorded = config.base_model_name_or_path in (None, name)
    found = _local_normalization(name, config.revision if is_recorded else None) if name else None
    is_other = bool(architecture_differences(config, model_config))
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
        config.base_model_name_or_path, config.revision = name, config.revision if is_recorded else None


def _local_normalization(name: str, revision: str | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of the image processor stored with a model; None if there is none here.

    Args:
        name: Folder, or Hub id that is looked up in the local cache only.
        revision: Branch, tag or commit of the Hub id; None for the main branch.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name, revision=revision, local_files_only=True)
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


logger = logging.getLogger(__name__)


class TVPModel(VLMTuner):
    """The tuner behind `get_peft_model(model, TVPConfig.for_processor(processor))`.

    An adapter fits every model with one patch embedding over 3 channels. Loading it onto another architecture than it
    was made for is what it is for; the log says what is resized. That takes `PeftModel.from_pretrained`: transformers'
    own `model.load_adapter` looks for the very names of the first model, and reports the prompt as missing on another.
    """

    prefix = "tvp_"

    def target_pattern(self, config: TVPConfig) -> str:
        """Name of the module through which pixels enter.

        Args:
            config: The adapter's configuration.

        Returns:
            Regular expression over full module names.
        """
        return patch_embedding_of(self.model).name.replace(".", r"\.")

    def wrap(self, target: nn.Module) -> PromptLayer:
        """The module with prompts.

        Args:
            target: The patch embedding, or a vision model over packed patches.
        """
        # packed: the processor has cut the images, and patches of all of them come as rows of one matrix
        packed = patch_embedding_of(self.model).kind == "packed"
        return (PackedPixelPrompt if packed else PixelPrompt)(target, prefix=self.prefix)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> VLMConfig:
        """Choose the mean and standard deviation for this model; let go of what belongs to the model before it."""
        _choose_normalization(peft_config, self.model, model_config)
        if peft_config.base_architecture is not None:
            self._report(peft_config, model_config)
            peft_config.target_modules = peft_config.base_architecture = None
        return super()._prepare_adapter_config(peft_config, model_config)

    def _report(self, config: TVPConfig, model_config: dict[str, Any]) -> None:
        """Say once how a loaded prompt meets a model of another architecture."""
        made_for = (config.base_architecture or {}).get("model_type")
        if made_for == model_config.get("model_type"):
            return
        size, canvas = input_size_of(self.model), config.canvas_size
        if size == (canvas, canvas):
            resized = f"its canvas of {canvas} px is used as it is"
        else:
            target = "the size of each image" if size is None else f"inputs of {size[0]}x{size[1]} px"
            resized = f"its canvas of {canvas} px is resized to {target}"
        logger.warning("Prompt made for %s on %s: %s.", shown(made_for), model_config.get("model_type"), resized)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Put the prompt of the file where this model has its patch embedding, whatever the file calls that place."""
        ending = f"{cls.prefix}prompt"
        # The key names the module that the prompt stood before, which every architecture calls differently.
        stored = [key for key in state_dict if key.endswith(ending)]
        own = [key for key in cls._own_tensors(model, adapter_name) if key.endswith(f"{ending}.{adapter_name}")]
        if len(stored) == len(own) == 1:
            state_dict = dict(state_dict)
            state_dict[own[0].removesuffix(f".{adapter_name}")] = state_dict.pop(stored[0])
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
