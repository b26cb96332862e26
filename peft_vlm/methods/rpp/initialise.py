"""Shared prompts of other methods that start from a pretrained RPP adapter."""

import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_vlm.adapters.context import TextContextConfig
from peft_vlm.adapters.learned_tokens import LearnedTokens
from peft_vlm.errors import AdapterError, PeftVLMWarning
from peft_vlm.files import WEIGHTS_NAME
from peft_vlm.methods.rpp.config import RPPConfig
from peft_vlm.models.towers import Towers, towers_of

#: One prompt (slots, width) per layer, from the first on.
Prompts = list[Tensor]


@torch.no_grad()
def start_shared_prompts(model: nn.Module, adapter: str | Path) -> None:
    """Set a model's learned tokens (CoOp, PromptSRC, PromptKD) to the prompts of a shared RPP adapter.

    With `slot_residual="replaced"` the text tower then gives the features that the RPP adapter gives, up to rounding.
    First vision tokens enter in front of CLIP's first norm here and behind it in RPP; they are set to what the norm
    maps closest to the RPP prompt. That, and prompts of the residual rule "stream", are starting points only, which a
    warning says.

    Args:
        model: CLIP with an adapter whose active learned tokens have the shapes of the RPP adapter's prompts.
        adapter: Folder of the RPP adapter.

    Raises:
        AdapterError: If the adapter has separate prompts, or other tokens or layers than the model.
    """
    folder = Path(adapter)
    config = RPPConfig.from_pretrained(str(folder))
    if not isinstance(config, RPPConfig) or config.share_qkv != "all":
        raise AdapterError(
            f"Expected an RPP adapter with `share_qkv`='all', got {str(folder)!r} with "
            f"{config.to_dict().get('share_qkv', config.peft_type)!r}: separate query, key and value prompts have no "
            "single tensor that shared tokens could start from. Pretrain with `share_qkv='all'`, or train this "
            "adapter on."
        )
    towers, state = towers_of(model), load_file(folder / WEIGHTS_NAME)
    inexact = [] if config.slot_residual == "replaced" else ["the residual rule 'stream' is not theirs"]
    target = model.active_peft_config if isinstance(model, PeftModel) else None
    position = target.text_position if isinstance(target, TextContextConfig) else "end"
    if config.depths["text"] and position != "end":
        inexact.append(f"the class name stands at the {position!r} of the context, and at the end of RPP's")
    for tower, depth in config.depths.items():
        layers = f"{tower}_model.encoder.layers"
        prompts = [state[f"base_model.model.{layers}.{number}.rpp_shared"] for number in range(depth)]
        targets = _learned_tokens(towers, tower)
        _check_shapes(tower, prompts, targets)
        if not prompts:
            continue
        if tower == "text":
            positions = towers.model.text_model.embeddings.position_embedding.weight
            prompts[0] = prompts[0].to(positions) - positions[1 : 1 + len(prompts[0])]
        else:
            norm = towers.model.vision_model.pre_layrnorm
            prompts[0] = (prompts[0].to(norm.weight) - norm.bias) / norm.weight
            inexact.append("first vision tokens pass a norm that RPP's do not")
        for target, prompt in zip(targets, prompts, strict=True):
            target.copy_(prompt)
    if inexact:
        text = "; ".join(inexact)
        warnings.warn(f"The prompts are a start, not the same function: {text}.", PeftVLMWarning, stacklevel=2)


def _learned_tokens(towers: Towers, tower: str) -> Prompts:
    """Active learned tokens of a tower, from its entrance upwards."""
    entrance = towers.token_embedding if tower == "text" else towers.model.vision_model.embeddings
    layers = towers.text_layers if tower == "text" else towers.vision_layers
    found = [module for module in (entrance, *layers) if isinstance(module, LearnedTokens)]
    return [module.prompts[module.current_adapter] for module in found if module.current_adapter is not None]


def _check_shapes(tower: str, prompts: Prompts, targets: Prompts) -> None:
    """Refuse prompts of other numbers or sizes."""
    here, there = ([tuple(prompt.shape) for prompt in part] for part in (targets, prompts))
    if here != there:
        raise AdapterError(
            f"Expected {len(here)} {tower} prompts of shape {here[:1]!r}, as the model has, got {len(there)} of shape "
            f"{there[:1]!r} in the RPP adapter. Give the model as many tokens and layers as the adapter's "
            f"`num_{tower}_tokens` and `{tower}_depth`."
        )
