"""RPP as a PEFT tuner: slots at the entrance of both towers, and prompts in the attention of their lower layers."""

from typing import Any

from torch import nn

from peft_vlm.adapters.config import architecture_of
from peft_vlm.adapters.context import complete_context, learned_token_pattern
from peft_vlm.adapters.layer import PromptLayer
from peft_vlm.adapters.learned_tokens import TextSlots, VisionSlots
from peft_vlm.adapters.qkv_prompt import ProjectionPrompts
from peft_vlm.adapters.tuner import VLMTuner
from peft_vlm.methods.rpp.config import RPPConfig
from peft_vlm.methods.rpp.initialise import start_from_words
from peft_vlm.models.towers import Side, towers_of


class RPPModel(VLMTuner):
    """The tuner behind `get_peft_model(clip, RPPConfig(...))`."""

    prefix = "rpp_"

    def target_pattern(self, config: RPPConfig) -> str:
        """Names of the embeddings and layers that prompts enter.

        Args:
            config: The adapter's configuration; gets the ids of its initial words.

        Returns:
            Regular expression over full module names.
        """
        depths = config.depths
        pattern = learned_token_pattern(
            self.model, text_depth=depths["text"], vision_depth=depths["vision"], first_layer=0
        )
        config.base_architecture = architecture_of(self.model.config.to_dict())
        config.check_dead_prompts()
        if depths["text"]:
            complete_context(config, self.model)
        return pattern

    def wrap(self, target: nn.Module) -> PromptLayer:
        """An embedding with slots, or a transformer layer with prompts.

        Args:
            target: Module of the base model.
        """
        towers = towers_of(self.model)
        if target is towers.token_embedding:
            return TextSlots(target)
        if target is towers.vision_embeddings:
            return VisionSlots(target)
        layers: dict[Side, list[nn.Module]] = {"text": [*towers.text_layers], "vision": [*towers.vision_layers]}
        (place,) = [(tower, layers[tower].index(target)) for tower in layers if target in layers[tower]]
        return ProjectionPrompts(target, prefix=self.prefix, tower=place[0], number=place[1])

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, its text prompts at the states of their words.

        Args:
            model: The base model.
            adapter_name: Name of the adapter.
            *args: Passed on.
            **kwargs: Passed on.
        """
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        start_from_words(model, adapter_name, self.peft_config[adapter_name])

    def fold(self) -> None:
        """Project all prompts once, for inference: queries, keys and values of the slots become constants.

        Outputs stay the same bit for bit; under autocast folded rows are not used. `unfold()` and `train()` undo it,
        and so do loading and deleting adapters; changing a prompt in any other way while it is folded has no effect
        until then.
        """
        for layer in self._prompted_layers():
            layer.fold()

    def unfold(self) -> None:
        """Project the prompts in every forward pass again."""
        for layer in self._prompted_layers():
            layer.unfold()

    def _prompted_layers(self) -> list[ProjectionPrompts]:
        return [module for module in self.model.modules() if isinstance(module, ProjectionPrompts)]
