"""The end of a PRE run: the network of the context goes."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_vlm.adapters.learned_tokens import EncodedContext
from peft_vlm.models.towers import towers_of


class Collapse(TrainerCallback):
    """Collapses the network of the active adapter when training has ended, before the final files are written.

    Args:
        model: `PeftModel` with the adapter.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Put the encoded context in the place of the vectors.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **kwargs: Not used.
        """
        layer = towers_of(self.model).token_embedding
        assert isinstance(layer, EncodedContext), "a CoOp adapter is active"
        layer.collapse(self.model.active_adapter)
        self.model.active_peft_config.network = None
