"""Copies the image tower of a CLIP-like model, with its active adapter, into the plain tower of `peft_vlm.serving`.

Besides `towers.py`, which runs Hugging Face's vision towers, this is the one file that knows their insides: it takes
them apart.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import CLIPModel

from peft_vlm.adapters.layer import PromptLayer
from peft_vlm.adapters.learned_tokens import DeepTokens, VisionSlots, VisionTokens
from peft_vlm.adapters.pixel_prompt import PixelPrompt, resized_prompt, window_of
from peft_vlm.adapters.qkv_prompt import ProjectionPrompts, SlotProjection
from peft_vlm.errors import UnsupportedModelError
from peft_vlm.models.towers import towers_of
from peft_vlm.serving import tower as plain_towers

LAYER_PARTS = {
    **{f"attention.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    **{"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
}
HEAD_TYPES = tuple(plain_towers.HEAD_LAYERS.values())


def copy_tower(model: nn.Module) -> tuple[dict[str, Any], plain_towers.ImageTower]:
    """The image tower of a model as a plain module, and the sizes it is built from.

    Args:
        model: `CLIPModel`, `SiglipModel` or a `PeftModel` around one; copied as its active adapter makes it.

    Raises:
        UnsupportedModelError: If something in the tower has no plain form.
    """
    base = towers_of(model).model
    config, embeddings, tokens = base.config.vision_config, base.vision_model.embeddings, {}
    if config.hidden_act not in plain_towers.ACTIVATIONS:
        raise UnsupportedModelError(
            f"Expected an activation of {sorted(plain_towers.ACTIVATIONS)!r} in the vision tower, got "
            f"{config.hidden_act!r}."
        )
    if isinstance(embeddings, VisionTokens | VisionSlots):
        # keys of `tokens` say where they enter: "input" behind the patches, a number at the input of that layer
        tokens["input"], embeddings = _tokens_after_patches(embeddings), embeddings.base_layer
    size = (config.image_size, config.image_size)
    pixel_shape, state = _copy_pixel_prompt(embeddings.patch_embedding, size)
    layers, slots = _layers(towers_of(model).vision_layers, tokens)
    state |= layers
    state |= {f"tokens.{index}": prompt for index, prompt in tokens.items() if prompt is not None}
    shape, ends = _ends(base, embeddings)
    state |= ends
    shape |= {"pixel_prompt": pixel_shape, "image_size": list(size), "layers": config.num_hidden_layers}
    shape |= {"width": config.hidden_size, "heads": config.num_attention_heads, "mlp": config.intermediate_size}
    shape |= {"activation": config.hidden_act, "eps": config.layer_norm_eps}
    shape["slots"] = slots
    shape["tokens"] = {index: len(prompt) for index, prompt in tokens.items() if prompt is not None}
    with torch.device("meta"):  # its tensors are assigned below
        tower = plain_towers.ImageTower(shape)
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    tower.load_state_dict(copies, assign=True)
    return shape, tower.requires_grad_(False).eval()


def _tokens_after_patches(embeddings: VisionTokens | VisionSlots) -> Tensor | None:
    """Learned tokens, or the zeros of slots; None without an active adapter."""
    weight = embeddings.position_embedding.weight
    if isinstance(embeddings, VisionTokens):
        return embeddings.active_prompt(weight)
    name = embeddings.current_adapter
    return None if name is None else weight.new_zeros(embeddings.num_slots[name], weight.shape[-1])


def _layers(
    layers: nn.ModuleList, tokens: dict[str, Tensor | None]
) -> tuple[dict[str, Tensor], dict[str, dict[str, int]]]:
    """Tensors of the transformer layers, and their numbers of slots with fixed queries, keys and values.

    Learned tokens at the layers' inputs are added to `tokens`.
    """
    state: dict[str, Tensor] = {}
    slots: dict[str, dict[str, int]] = {}
    for index, layer in enumerate(layers):
        inner: Any = layer
        if isinstance(inner, DeepTokens):
            tokens[str(index)], inner = inner.active_prompt(inner.layer_norm1.weight), inner.base_layer
        elif isinstance(inner, ProjectionPrompts):
            # rows of queries, keys and values that stand in place of projected tokens, each (slots, width)
            tokens[str(index)], rows = inner.input_prompt, inner.fixed_rows()
            state |= {f"layers.{index}.attention.slots.{name}": tensor for name, tensor in rows.items()}
            slots[str(index)] = {name: len(tensor) for name, tensor in rows.items()}
            inner = inner.base_layer
        for ours, theirs in LAYER_PARTS.items():
            state |= _named(f"layers.{index}.{ours}", _plain(inner.get_submodule(theirs)))
    return state, slots


def _ends(base: Any, embeddings: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes and tensors of the parts before and after the layers."""
    vision, patches = base.vision_model, embeddings.patch_embedding
    if isinstance(patches, PixelPrompt):
        patches = patches.base_layer
    is_clip = isinstance(base, CLIPModel)
    state = _named("patches", patches) | {"positions": embeddings.position_embedding.weight}
    state |= _named("post_norm", _plain(vision.post_layernorm))
    head: list[nn.Module] = []
    if is_clip:
        state |= {"class_token": embeddings.class_embedding} | _named("pre_norm", _plain(vision.pre_layrnorm))
        projection = _plain(base.visual_projection)
        head = list(projection) if isinstance(projection, nn.Sequential) else [projection]
        state |= _named("head", nn.Sequential(*head))
    else:
        state |= _attention_pool(vision.head)
    shape = {
        "patch_size": list(patches.kernel_size),
        "patch_bias": patches.bias is not None,
        "positions": len(embeddings.position_embedding.weight),
        "class_token": is_clip,
        "pre_norm": is_clip,
        "attention_pool": not is_clip,
        "head": [_layer_sizes(layer) for layer in head],
    }
    return shape, state


def _attention_pool(head: Any) -> dict[str, Tensor]:
    """SigLIP's pooling head; PyTorch's attention keeps the three input projections in one matrix."""
    state = {"pool.probe": head.probe}
    for kind in ("weight", "bias"):
        parts = getattr(head.attention, f"in_proj_{kind}").chunk(3)  # rows for queries, keys, values
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            state[f"pool.attention.{name}.{kind}"] = part
    state |= _named("pool.attention.out_proj", head.attention.out_proj)
    for ours, theirs in (("norm", "layernorm"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
        state |= _named(f"pool.{ours}", _plain(head.get_submodule(theirs)))
    return state


def _copy_pixel_prompt(layer: nn.Module, size: tuple[int, int]) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Sizes and tensors of the pixel prompt of an adapter; None and nothing without one."""
    name = layer.current_adapter if isinstance(layer, PixelPrompt) else None
    if name is None:
        return None, {}
    settings = layer.settings[name]
    if settings.shrink == "processor":
        raise UnsupportedModelError(
            "Expected an adapter that shrinks images in the model (`shrink='model'`) or not at all, got "
            "`shrink='processor'`: the processor that it needs is not part of an exported classifier."
        )
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (settings.image_mean, settings.image_std))
    prompt = torch.zeros(3, *size) if layer.prompt_is_off else resized_prompt(layer.effective_prompt(name), size)
    state = {"picture": prompt, "mean": mean, "std": std}
    window = None
    if settings.shrink == "model" and settings.border:
        (top, rows), (left, cols) = (window_of(side, settings) for side in size)
        window = [top, left, rows, cols]  # shrinking is linear in the image: a matrix per side does it
        state |= {"shrink_rows": _shrinking(size[0], rows), "shrink_cols": _shrinking(size[1], cols).T}
    shape = {"image_size": list(size), "window": window, "clamp": settings.clamp}
    return shape, {f"pixel_prompt.{key}": tensor for key, tensor in state.items()}


def _shrinking(size: int, target: int) -> Tensor:
    """Matrix (target, size) of the bicubic antialiased resize of one side: its result for each unit vector."""
    unit = torch.eye(size)[None, None]  # an image whose rows are unit vectors
    return interpolate(unit, size=(target, size), mode="bicubic", align_corners=False, antialias=True)[0, 0]


def _plain(module: nn.Module) -> nn.Module:
    """A layer of the tower as a module of torch."""
    if isinstance(module, SlotProjection):
        module = module.projection
    layer = module.plain() if isinstance(module, PromptLayer) else module
    if not isinstance(layer, nn.Sequential) and type(layer) not in HEAD_TYPES:
        raise UnsupportedModelError(
            f"Expected plain torch layers and adapters of peft_vlm in the image tower, got `{type(layer).__name__}`. "
            "Merge other adapters into the model first (`model.merge_and_unload()`), and load it unquantised."
        )
    return layer


def _named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """Tensors of a module under a prefix."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def _layer_sizes(layer: nn.Module) -> list[Any]:
    """Name and arguments that build a layer of the head again."""
    if isinstance(layer, nn.Linear):
        return ["Linear", layer.in_features, layer.out_features, layer.bias is not None]
    if isinstance(layer, nn.LayerNorm):
        return ["LayerNorm", layer.normalized_shape[0], layer.eps]
    if isinstance(layer, nn.BatchNorm1d):
        return ["BatchNorm1d", layer.num_features, layer.eps]
    return [type(layer).__name__]
