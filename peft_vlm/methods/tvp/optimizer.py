"""The update rule of TVP: a step along the gradient's direction, whose length the learning rate sets alone.

Exploring the Transferability of Visual Prompting for Multimodal Large Language Models, 2024, arXiv 2404.11207; the
rule is that of the official code (`train_with_prompt`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 1e-10
"""Added to the norm, as in the official code."""


class NormalizedGradient(torch.optim.Optimizer):
    """p <- p - lr * mask * g / (||g||_2 + 1e-10), with the norm over all entries of the gradient.

    The mask comes after the norm, so a prompt with a frozen centre takes steps shorter than the learning rate by the
    share of the gradient that lies in the centre. There is no momentum and no weight decay, hence no state.

    A step sees the gradient that backward passes left: summed over accumulated batches, averaged over processes, and
    unscaled by a gradient scaler. A factor on the loss changes nothing, as long as the gradient is above 1e-10.

    Args:
        params: Tensors to train, or parameter groups.
        lr: Step length in [0, 1] pixel units. Official: 10.
        masks: Entries that may move, 1 or 0, by parameter and of its shape; a parameter without a mask moves as a
            whole.

    Raises:
        ValueError: If the rate is negative, or a mask belongs to no trained parameter or has another shape.

    References:
        arXiv 2404.11207; official `transfer_cls.py`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | int = 10.0,
        *,
        masks: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        if lr < 0:
            raise ValueError(f"Expected `lr` of 0 or more, got {lr!r}.")
        super().__init__(params, {"lr": lr})
        self.masks = dict(masks or {})
        trained = {parameter for group in self.param_groups for parameter in group["params"]}
        for parameter, mask in self.masks.items():
            if parameter not in trained or mask.shape != parameter.shape:
                raise ValueError(
                    "Expected each mask to belong to a trained parameter and to have its shape, got a mask of shape "
                    f"{tuple(mask.shape)} for a parameter of shape {tuple(parameter.shape)}, which is "
                    f"{'' if parameter in trained else 'not '}among `params`."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient.

        Args:
            closure: Computes the loss and its gradients anew.

        Returns:
            What the closure gave, None without one.

        Raises:
            FloatingPointError: If a gradient is not finite: one such step would make every pixel NaN.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"])
        return loss

    def _move(self, parameter: nn.Parameter, rate: float) -> None:
        gradient = parameter.grad.float()
        norm = torch.linalg.vector_norm(gradient)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"Expected a finite gradient, got one of norm {float(norm)!r}. Use bf16 or float32 instead of fp16, "
                "or a loss scaler, which skips such steps."
            )
        direction = gradient / (norm + EPSILON)
        mask = self.masks.get(parameter)
        if mask is not None:
            direction = direction * mask.to(direction)
        parameter.sub_((rate * direction).to(parameter.dtype))
