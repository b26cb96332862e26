"""TVP as a PEFT tuner: the patch embedding of any vision-language model sees images with a learned picture on them."""

import logging
from typing import Any

from torch import Tensor, nn

from peft_vlm.adapters.config import VLMConfig
from peft_vlm.adapters.layer import PromptLayer
from peft_vlm.adapters.pixel_prompt import PackedPixelPrompt, PixelPrompt
from peft_vlm.adapters.tuner import VLMTuner
from peft_vlm.methods.tvp.config import TVPConfig
from peft_vlm.methods.tvp.normalization import choose_normalization
from peft_vlm.models.patch_embedding import input_size_of, patch_embedding_of

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
        packed = patch_embedding_of(self.model).kind == "packed"
        return (PackedPixelPrompt if packed else PixelPrompt)(target, prefix=self.prefix)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> VLMConfig:
        """Choose the mean and standard deviation for this model; let go of what belongs to the model before it."""
        choose_normalization(peft_config, self.model, model_config)
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
        logger.warning("Prompt made for %s on %s: %s.", made_for, model_config.get("model_type"), resized)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Put the prompt of the file where this model has its patch embedding, whatever the file calls that place."""
        ending = f"{cls.prefix}prompt"
        stored = [key for key in state_dict if key.endswith(ending)]
        own = [key for key in cls._own_tensors(model, adapter_name) if key.endswith(f"{ending}.{adapter_name}")]
        if len(stored) == len(own) == 1:
            state_dict = dict(state_dict)
            state_dict[own[0].removesuffix(f".{adapter_name}")] = state_dict.pop(stored[0])
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
