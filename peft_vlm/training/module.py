"""The one module that the trainer wraps: model and objective together, so that DDP sees every forward pass."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_vlm.objective import Objective
from peft_vlm.shapes import Batch
from peft_vlm.towers import unwrap


class TrainingModule(nn.Module):
    """`forward(batch)` gives the loss, its terms and the logits.

    Calling the unwrapped model from a loss function would bypass the gradient averaging of DDP without any error.

    Args:
        model: `PeftModel`, or a plain model for full fine-tuning.
        objective: What is minimised; not a submodule.
    """

    #: Read by transformers' trainer, which takes `**batch` for a sign that the loss of accumulated batches is already
    #: divided by their number, and would sum them.
    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    @property
    def config(self) -> Any:
        """Configuration of the inner model, which transformers and DeepSpeed read."""
        return unwrap(self.model).config

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Run the objective on one batch; keyword arguments are its columns."""
        output = self.objective(self.model, cast(Batch, batch))
        terms = {f"loss_{name}": term.detach() for name, term in output.loss_terms.items()}
        if bool((output.labels < 0).any()):  # images without labels
            return {"loss": output.loss, **terms}
        correct = (output.logits.detach().argmax(dim=-1) == output.labels).float().mean()
        return {"loss": output.loss, "accuracy": correct, **terms}

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute layer activations in the backward pass, in both towers."""
        unwrap(self.model).activation_checkpointing_enable(**kwargs)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Logits over all classes."""
        return self.objective.predict(self.model, batch)
