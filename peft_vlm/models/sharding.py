"""Frozen transformer layers divided among the processes of a training by torch's `fully_shard` (FSDP2)."""

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_vlm.distributed import from_all
from peft_vlm.errors import UnsupportedModelError
from peft_vlm.models.towers import unwrap


def shard_frozen_layers(model: nn.Module, device: torch.device, *, reshard_after_forward: bool = True) -> None:
    """Divide the frozen weights of every transformer layer among all processes.

    A layer gathers its weights when it runs, in the forward and again in the backward pass. Each layer is a unit of
    its own, not a part of one for the whole model, so that towers, caches and evaluation may call any of them from
    anywhere. What stays whole in every process: trainable parameters (DDP averages their gradients), embeddings,
    norms outside of layers, projections, CLIP's scalar `logit_scale`, and quantised weights of integers.

    Args:
        model: Model with its adapter, on the CPU or on `device`.
        device: Where this process computes; the divided weights are put there.
        reshard_after_forward: Free a layer's gathered weights after its forward pass, and gather them once more in
            the backward pass; False keeps them in between.

    Raises:
        UnsupportedModelError: If there is nothing to divide.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in _transformer_layers(unwrap(model)):
        if isinstance(layer, FSDPModule):
            continue  # of an earlier run
        whole = {p for p in layer.parameters() if p.requires_grad or not p.is_floating_point()}
        if len(whole) < len(list(layer.parameters())):
            fully_shard(layer, mesh=mesh, ignored_params=whole, reshard_after_forward=reshard_after_forward)
    if not has_sharded_layers(model):
        raise UnsupportedModelError(
            f"Expected frozen transformer layers to divide among processes, got none in "
            f"`{type(unwrap(model)).__name__}`. Train without `fsdp`."
        )


def _transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The items of lists of layers, each with what an adapter has put around it."""
    items = [item for m in model.modules() if isinstance(m, nn.ModuleList) for item in m]
    layers = [item for item in items if any(isinstance(m, GradientCheckpointingLayer) for m in item.modules())]
    inner = {id(m) for layer in layers for m in layer.modules() if m is not layer}
    return [layer for layer in layers if id(layer) not in inner]


def has_sharded_layers(model: nn.Module) -> bool:
    """Return whether a layer's weights are divided, so that every process must call it as often as the others.

    Args:
        model: Any model.
    """
    return any(isinstance(module, FSDPModule) for module in model.modules())


def most_of_all(model: nn.Module, count: int) -> int:
    """Return how often every process calls a model: as often as the one that calls it most, if layers are divided.

    Args:
        model: Any model.
        count: Calls that this process needs.
    """
    return max(from_all(count)) if has_sharded_layers(model) else count


def sharded_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are divided.

    Args:
        model: Any model.
    """
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
