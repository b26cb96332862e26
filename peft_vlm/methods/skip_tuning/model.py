"""Skip Tuning as a PEFT tuner: upper layers, final norms and projections get trainable copies.

In a multimodal model these are the upper layers of its language model.
"""

import re

from torch import nn

from peft_vlm.adapters.layer import LayerCopy, PromptLayer
from peft_vlm.adapters.tuner import VLMTuner
from peft_vlm.methods.skip_tuning.config import SkipTuningConfig
from peft_vlm.models.language_layers import is_multimodal, language_layers_of
from peft_vlm.models.towers import LEAVES_OF_A_LAYER, towers_of


class SkipTuningModel(VLMTuner):
    """The tuner behind `get_peft_model(clip, SkipTuningConfig(...))`.

    Deviation: The official code trains the layers of the model itself. Copies give the base back bit for bit, allow
    several adapters, and cost the memory of one more copy of the upper layers; `merge_and_unload()` is exact.
    """

    prefix = "skip_tuning_"

    def target_pattern(self, config: SkipTuningConfig) -> str:
        """Names of the tuned leaf modules.

        Args:
            config: The adapter's configuration.

        Returns:
            Regular expression over full module names.

        Raises:
            ValueError: If a start layer leaves no layer to tune.
        """
        if is_multimodal(self.model):
            return self._language_pattern(config)
        towers = towers_of(self.model)
        starts = dict(zip(("vision", "text"), config.start_layers, strict=True))
        paths = towers.layers_paths
        counts = {"vision": len(towers.vision_layers), "text": len(towers.text_layers)}
        leaves = "|".join(re.escape(leaf) for leaf in LEAVES_OF_A_LAYER)
        heads = [re.escape(path) for path in (*towers.vision_head_paths, *towers.text_head_paths)]
        for tower, start in starts.items():
            field = "text_start_layer" if tower == "text" and config.text_start_layer is not None else "start_layer"
            if start >= counts[tower]:
                raise ValueError(
                    f"Expected `{field}` from 0 to {counts[tower] - 1} for the {tower} tower, which has "
                    f"{counts[tower]} "
                    f"layers, got {start!r}. `text_start_layer` sets the text tower apart where depths differ."
                )
            layers = "|".join(str(index) for index in range(start, counts[tower]))
            heads.append(rf"{re.escape(paths[tower])}\.({layers})\.({leaves})")
        return "|".join(f"({head})" for head in heads)

    def _language_pattern(self, config: SkipTuningConfig) -> str:
        """Names of the tuned leaf modules of a multimodal model: language layers from the start layer on, final norm.

        Args:
            config: The adapter's configuration; `text_start_layer`, if given, goes before `start_layer`.

        Returns:
            Regular expression over full module names.

        Raises:
            ValueError: If the start layer leaves no layer to tune.
        """
        language, start = language_layers_of(self.model), config.start_layers[1]
        count = len(language.layers)
        if start >= count:
            field = "start_layer" if config.text_start_layer is None else "text_start_layer"
            raise ValueError(
                f"Expected `{field}` from 0 to {count - 1} for a language model of {count} layers, got {start!r}."
            )
        return "|".join(re.escape(name) for name in language.leaves(start))

    def wrap(self, target: nn.Module) -> PromptLayer:
        """A trainable copy of one leaf layer.

        Args:
            target: `Linear` or `LayerNorm` of the base model.
        """
        return LayerCopy(target, prefix=self.prefix)
