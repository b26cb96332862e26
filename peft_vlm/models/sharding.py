"""Frozen transformer layers divided among the processes of a training by torch's `fully_shard` (FSDP2)."""

import math

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_vlm.distributed import from_all, in_passes, local_place
from peft_vlm.errors import UnsupportedModelError
from peft_vlm.models.towers import unwrap


def shard_frozen_layers(model: nn.Module, device: torch.device) -> None:
    """Divide the frozen weights of every transformer layer among all processes.

    A layer gathers its weights when it runs, in the forward and again in the backward pass, and frees them each time:
    kept ones would be freed on the process alone that saves a checkpoint, which then waits for the others. Each layer
    is a unit of its own, not a part of one for the whole model, so that towers, caches and evaluation may call any of
    them from anywhere; it is the layer without what an adapter puts around it and takes off again.

    What stays whole in every process: trainable parameters (DDP averages their gradients), embeddings, norms outside
    of layers, projections, and CLIP's scalar `logit_scale`.

    Args:
        model: Model with its adapter, on the CPU or on `device`.
        device: Where this process computes; the divided weights are put there.

    Raises:
        UnsupportedModelError: If there is nothing to divide, weights are quantised, an earlier run has divided what
            is trained now, or machines have different numbers of processes.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad and isinstance(p, DTensor)]
    if trained:
        raise UnsupportedModelError(
            f"Expected whole trainable parameters, got {len(trained)} that an earlier run has divided, first "
            f"{trained[0]!r}. Load the base model again."
        )
    quantised = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if quantised:
        raise UnsupportedModelError(
            f"Expected weights of floating-point numbers to divide, got {len(quantised)} quantised ones, which stay "
            f"whole, first {quantised[0]!r}. Train without `fsdp`, or load the base model unquantised."
        )
    per_machine = sorted(set(from_all(local_place()[1])))
    if len(per_machine) > 1:  # caches are divided on each machine, into other numbers of passes
        raise UnsupportedModelError(
            f"Expected equally many processes on every machine to divide layers, got {per_machine!r}. Start as many."
        )
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in _transformer_layers(unwrap(model)):
        if isinstance(layer, FSDPModule):
            continue  # of an earlier run
        whole = {p for p in layer.parameters() if p.requires_grad}
        if len(whole) < len(list(layer.parameters())):
            fully_shard(layer, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    if not has_sharded_layers(model):
        raise UnsupportedModelError(
            f"Expected frozen transformer layers to divide among processes, got none in "
            f"`{type(unwrap(model)).__name__}`. Train without `fsdp`."
        )


def _transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The layers themselves, inside of what an adapter has put around them."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(m) for layer in layers for m in layer.modules() if m is not layer}
    return [layer for layer in layers if id(layer) not in inner]


def has_sharded_layers(model: nn.Module) -> bool:
    """Return whether a layer's weights are divided, so that every process must call it as often as the others.

    Args:
        model: Any model.
    """
    return any(isinstance(module, FSDPModule) for module in model.modules())


def equal_chunks(model: nn.Module, rows: Tensor, size: int) -> list[Tensor]:
    """Return rows in chunks, as many on every process if layers are divided; whoever has too few repeats the last row.

    Args:
        model: Model that gets a chunk per call.
        rows: Rows of this process, at least one.
        size: Rows per chunk at most.
    """
    if not has_sharded_layers(model):
        return list(rows.split(size))
    return in_passes(rows, max(from_all(math.ceil(len(rows) / size))))


def sharded_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are divided.

    Args:
        model: Any model.
    """
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
