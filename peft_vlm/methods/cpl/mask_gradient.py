"""The gradient of the mask, which is no tensor of the model, so that nobody else averages and clears it."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_vlm.distributed import num_processes, sum_over_processes


class MaskGradient(TrainerCallback):
    """Averages the gradient of the mask over the processes, and clears it after the step: the model does not hold it.

    Args:
        mask: The mask.
    """

    def __init__(self, mask: nn.Parameter) -> None:
        self.mask = mask

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average, as DDP does with the model's; nothing moves in a step that is skipped.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **kwargs: The model, among others.
        """
        if self.mask.grad is None or all(p.grad is None for p in kwargs["model"].parameters()):
            self.mask.grad = None
        else:
            self.mask.grad = sum_over_processes(self.mask.grad) / num_processes()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Clear the gradient.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **kwargs: Not used.
        """
        self.mask.grad = None
