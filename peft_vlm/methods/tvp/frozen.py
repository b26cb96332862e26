"""Batches for a frozen model, and the mode it answers in."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


def hold_still(model: nn.Module) -> None:
    """Evaluation mode for everything but layers that recompute their activations, which do so in training mode only.

    The frozen model then answers as its users see it, without dropout; a rate that such a layer applies by itself, as
    OPT's do, is set to 0. The mode stays until something else sets it, because layers are recomputed in the backward
    pass.

    Args:
        model: Model with its adapter.
    """
    for module in model.modules():
        module.training = recomputes(module)
        if module.training and isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0


def recomputes(module: nn.Module) -> bool:
    """Whether a module is a layer that computes its activations again in the backward pass.

    Args:
        module: Any module.
    """
    return isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """A batch with its tensors on a device.

    Args:
        batch: What a collator made.
        device: Where they are wanted.
    """
    return {name: column.to(device) for name, column in batch.items()}


def batch_at(dataset: Any, positions: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """The batch of some positions of a dataset.

    Args:
        dataset: Images, or questions about images.
        positions: Positions.
        device: Where the batch is wanted.
    """
    return on_device(dataset.collate([dataset[position] for position in positions]), device)
