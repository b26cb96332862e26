"""PromptSRC as a PEFT tuner: learned tokens at the entrance of both towers and at the input of their lower layers."""

from torch import nn

from peft_vlm.adapters.context import complete_context, learned_token_pattern, learned_tokens
from peft_vlm.adapters.layer import PromptLayer
from peft_vlm.adapters.tuner import VLMTuner
from peft_vlm.methods.promptsrc.config import PromptSRCConfig


class PromptSRCModel(VLMTuner):
    """The tuner behind `get_peft_model(clip, PromptSRCConfig(...))`."""

    prefix = "promptsrc_"

    def target_pattern(self, config: PromptSRCConfig) -> str:
        """Names of the embeddings and layers with learned tokens.

        Args:
            config: The adapter's configuration; gets the ids of its initial words.

        Returns:
            Regular expression over full module names.
        """
        text_depth, vision_depth = config.depths
        pattern = learned_token_pattern(self.model, text_depth=text_depth, vision_depth=vision_depth)
        if text_depth:
            complete_context(config, self.model)
        return pattern

    def wrap(self, target: nn.Module) -> PromptLayer:
        """An embedding or a transformer layer with learned tokens.

        Args:
            target: Module of the base model.
        """
        return learned_tokens(self.model, target, prefix=self.prefix)
