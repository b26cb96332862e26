"""How much memory a training will need, before its first step.

    weights      every parameter and buffer of the trained model and of the frozen ones beside it
    training     per trained number 4 bytes of gradient, and 4 (momentum) or 8 (Adam) of optimizer state
    activations  per tower: rows x tokens x width x (14 per layer with gradients, 20 where the layer is trained, 4 for
                 CLIP's last layer, which computes one token) numbers of 4 bytes, or 2 in half precision; recomputed
                 activations keep 1 per layer, and 20 for the one that is recomputed

14 widths are what a transformer layer with a four times wider MLP and fused attention keeps for its backward pass: the
inputs of both norms (2), queries, keys, values (3), the attended values (1), and input and factor of the GELU (8).
Trained matrices also keep their inputs (6). A layer below the lowest trained tensor keeps nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPModel

from peft_vlm.data.feature_store import free_ram
from peft_vlm.distributed import local_place
from peft_vlm.models.language_layers import is_multimodal, language_layers_of
from peft_vlm.models.towers import FAMILIES, towers_of, unwrap
from peft_vlm.objective import Objective

FROZEN_WIDTHS, TRAINED_WIDTHS, LAST_WIDTHS = 14, 20, 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for.

    Args:
        weights: Weights of all models.
        training: Gradients and optimizer state.
        activations: What is kept for the backward pass.
        elsewhere: The part of the weights that is not on the device yet.
    """

    weights: int
    training: int
    activations: int
    elsewhere: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.training + self.activations

    @property
    def needed(self) -> int:
        """What the run takes beside what is in use before its first step."""
        return self.elsewhere + self.training + self.activations

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients and optimizer": self.training, "activations": self.activations}
        return f"{in_words(self.total)} = " + " + ".join(f"{in_words(size)} {name}" for name, size in parts.items())


def in_words(size: int) -> str:
    """A number of bytes as people say it.

    Args:
        size: Bytes.
    """
    return f"{size / 2**30:.2f} GB" if size >= 2**30 else f"{size / 2**20:.1f} MB"


def estimate_memory(model: nn.Module, objective: Objective, dataset: Any, args: Any) -> MemoryEstimate:
    """What one process needs.

    Args:
        model: Model with its adapter.
        objective: Says how many texts a step runs through, and which frozen models stand beside the trained one.
        dataset: Training data; one row of questions tells how many tokens they have.
        args: Settings of the run.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # a method's own optimizer has no state
    states = 0 if objective.optimizer(model, learning_rate=0.0) is not None else 8 if "adam" in str(args.optim) else 4
    # by identity: models may share tensors
    tensors = {id(t): t for m in (model, *objective.frozen_models) for t in (*m.parameters(), *m.buffers())}.values()
    activations = _activations(model, objective, dataset, args)
    elsewhere = _bytes(tensor for tensor in tensors if tensor.device.type != args.device.type)
    return MemoryEstimate(_bytes(tensors), trained * (4 + states), activations, elsewhere)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free for this process; None where the system does not say.

    On a GPU that is also what torch holds and does not use; main memory is divided among the processes of the machine.

    Args:
        device: Where the run computes.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = free_ram() if device.type == "cpu" else None
    return None if free is None else free // local_place()[1]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _activations(model: nn.Module, objective: Objective, dataset: Any, args: Any) -> int:
    base = unwrap(model)
    if isinstance(base, tuple(FAMILIES)):
        loads = _image_text_loads(model, objective, args.per_device_train_batch_size)
    elif is_multimodal(model):
        loads = _question_loads(model, dataset.collate([dataset[0]]), args.per_device_train_batch_size)
    else:
        return 0
    widths = sum(load.numbers(recompute=args.activation_checkpointing) for load in loads)
    return widths * (2 if args.bf16 or args.fp16 else 4)


@dataclass(frozen=True)
class _Load:
    """One tower: which of its layers are trained, whether gradients pass below the first, and what runs through."""

    trained: list[bool]
    from_below: bool
    tokens: int
    width: int
    last_is_short: bool = False

    def numbers(self, *, recompute: bool) -> int:
        """Numbers that are kept for the backward pass."""
        if not self.from_below and not any(self.trained):
            return 0
        layers = self.trained[0 if self.from_below else self.trained.index(True) :]
        if recompute:
            return self.tokens * self.width * (len(layers) + TRAINED_WIDTHS)
        widths = [TRAINED_WIDTHS if trained else FROZEN_WIDTHS for trained in layers]
        if self.last_is_short:
            widths[-1] = LAST_WIDTHS
        return self.tokens * self.width * sum(widths)


def _trained_layers(layers: Iterable[nn.Module]) -> list[bool]:
    return [any(p.requires_grad for p in layer.parameters()) for layer in layers]


def _trains_embedding(model: nn.Module, *sides: str) -> bool:
    """Whether something is trained where pixels or tokens of a side are embedded."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return any("embed" in name and any(side in name for side in sides) for name in names)


def _image_text_loads(model: nn.Module, objective: Objective, batch: int) -> list[_Load]:
    towers, is_clip = towers_of(model), isinstance(unwrap(model), CLIPModel)
    config: Any = unwrap(model).config
    vision, rows = config.vision_config, objective.text_rows(batch)
    patches = batch * ((vision.image_size // vision.patch_size) ** 2 + 1)
    below = _trains_embedding(model, "vision_model")
    loads = [_Load(_trained_layers(towers.vision_layers), below, patches, vision.hidden_size, is_clip)]
    if rows:
        tokens, width = rows * objective.prompts.input_ids.shape[1], config.text_config.hidden_size
        below = _trains_embedding(model, "text_model")
        loads.append(_Load(_trained_layers(towers.text_layers), below, tokens, width, is_clip))
    return loads


def _question_loads(model: nn.Module, columns: dict[str, torch.Tensor], batch: int) -> list[_Load]:
    """Language model and, where a prompt sits in the pixels, vision side; language models with an encoder are left
    out.
    """
    config, loads = unwrap(model).config, []
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    from_pixels = _trains_embedding(model, "vision", "visual")
    if not text.is_encoder_decoder:
        tokens = batch * columns["input_ids"].shape[1]
        loads.append(_Load(_trained_layers(language_layers_of(model).layers), from_pixels, tokens, text.hidden_size))
    names = ("patch_size", "hidden_size", "num_hidden_layers")
    patch, width, count = (getattr(vision, name, None) for name in names)
    if from_pixels and isinstance(patch, int) and isinstance(width, int) and isinstance(count, int):
        tokens = batch * (columns["pixel_values"].numel() // (3 * patch**2))
        loads.append(_Load([False] * count, True, tokens, width))
    return loads
