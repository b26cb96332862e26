"""CoOp as a PEFT tuner: the text tower's token embedding fills the reserved slots with learned vectors."""

from torch import nn

from peft_vlm.adapters.context import complete_context, learned_token_pattern, learned_tokens, read_context_words
from peft_vlm.adapters.layer import PromptLayer
from peft_vlm.adapters.tuner import VLMTuner
from peft_vlm.methods.coop.config import CoOpConfig


class CoOpModel(VLMTuner):
    """The tuner behind `get_peft_model(clip, CoOpConfig(...))`."""

    prefix = "coop_"

    def target_pattern(self, config: CoOpConfig) -> str:
        """Name of the token embedding.

        Args:
            config: The adapter's configuration; gets the ids of its initial words, and their number.

        Returns:
            Regular expression over full module names.
        """
        pattern = learned_token_pattern(self.model, text_depth=1, vision_depth=0)
        read_context_words(config, self.model)
        if config.context_init_ids is not None:
            config.num_text_tokens = len(config.context_init_ids)
        complete_context(config, self.model)
        return pattern

    def wrap(self, target: nn.Module) -> PromptLayer:
        """The token embedding with context.

        Args:
            target: `nn.Embedding` of the text tower.
        """
        return learned_tokens(self.model, target, prefix=self.prefix)
