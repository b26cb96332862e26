"""Full fine-tuning and linear probe in the same harness as the methods. They are yardsticks, not PEFT methods."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.models.towers import image_features, text_features, towers_of
from peft_vlm.objective import ObjectiveOutput
from peft_vlm.shapes import Batch
from peft_vlm.text.class_features import PromptObjective
from peft_vlm.text.prompts import ClassPrompts


class FullFineTuningObjective(PromptObjective):
    """Mean cross-entropy of scaled cosines over all classes; both towers run whole, with autograd, in every step.

    Args:
        prompts: Tokenised class prompts with one template. Cut to their longest prompt they are the fast variant;
            padded to the context length they are what the official codes run.

    Raises:
        ValueError: If the prompts have more than one template.

    Requirements:
        Batches with `pixel_values` and `labels`; a plain model whose parameters to train require gradients.
    """

    def __init__(self, prompts: ClassPrompts) -> None:
        if len(prompts.templates) != 1:
            raise ValueError(f"Expected class prompts with one template, got {len(prompts.templates)}.")
        super().__init__(prompts)

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Loss over all classes.

        Args:
            model: The model being trained.
            batch: `pixel_values` and `labels`.
        """
        towers = towers_of(model)
        text = text_features(model, self.prompts.input_ids.to(batch["labels"].device))
        logits = towers.similarity_logits(image_features(model, batch["pixel_values"]), text)
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        return ObjectiveOutput({"cross_entropy": loss}, logits, batch["labels"])

    def check_stream(self) -> None:
        """A stream will do: nothing is kept."""

    def config_dict(self) -> dict[str, Any]:
        """Nothing to report but the length of the text."""
        return {"text_tokens": self.prompts.input_ids.shape[1]}


class LinearProbe(nn.Module):
    """Multinomial logistic regression on frozen image features, fitted by L-BFGS, as in CLIP's linear-probe
    evaluation.

    It knows nothing of class names, so it has no answer for new classes.

    Args:
        dim: Size of the image features.
        num_classes: Number of classes.
        inverse_regularisation: scikit-learn's `C`; the penalty on the weights is ||W||^2 / (2 C n) beside the mean
            loss. 0.316 is the value of CLIP's example code.

    References:
        Learning Transferable Visual Models From Natural Language Supervision, 2021, arXiv 2103.00020, Sec. 3.2.
    """

    def __init__(self, dim: int, num_classes: int, *, inverse_regularisation: float = 0.316) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.inverse_regularisation = inverse_regularisation

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """Logits of projected image features that are not normalised."""
        return self.linear(features)

    def fit(
        self, features: Float[Tensor, "images dim"], labels: Int[Tensor, " images"], *, max_steps: int = 300
    ) -> float:
        """Fit to convergence.

        Args:
            features: Projected image features, not normalised.
            labels: Class of each image.
            max_steps: Iterations at most.

        Returns:
            The final objective value.
        """
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=max_steps, line_search_fn="strong_wolfe")
        penalty = 0.5 / (self.inverse_regularisation * len(features))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.linear(features), labels)
            loss = loss + penalty * self.linear.weight.square().sum()
            loss.backward()
            return loss

        return float(optimizer.step(closure).detach())
