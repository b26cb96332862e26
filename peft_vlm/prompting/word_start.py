"""Text prompts that start where the frozen model carries the words of a template.

Under the causal mask the states of the words behind the start token do not depend on the class name that follows, so
one short forward pass gives them for all classes.

What a layer carries grows with its height, up to a hundred times the size of embedded words, while a prompt that only
the layer's norm reads is the same function at any size: at rate r its normalised value moves by about r / size**2 per
step. Such prompts therefore start at one small size, without which those of upper layers would hardly ever move.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.adapters.context import TextContextConfig
from peft_vlm.adapters.layer import PromptLayer
from peft_vlm.adapters.learned_tokens import INIT_STD
from peft_vlm.adapters.qkv_prompt import PARTS, ProjectionPrompts
from peft_vlm.models.towers import towers_of

#: Standard deviation of an initial prompt that only its layer's norm reads: far above the root of the norm's epsilon
#: (0.003), so that its function stays, and near that of embedded words.
WORD_STD = 0.1


@torch.no_grad()
def start_from_words(model: nn.Module, adapter_name: str, config: TextContextConfig) -> None:
    """Set an adapter's text prompts to the states of its initial words; nothing to do without words.

    Args:
        model: CLIP with the adapter.
        adapter_name: Name of the adapter.
        config: Its configuration, completed by `complete_context`.
    """
    slots = config.slots
    if slots is None or slots.initial_ids is None:
        return
    layers = [layer for layer in towers_of(model).text_layers if isinstance(layer, ProjectionPrompts)]
    states = word_states(model, slots.initial_ids, depth=len(layers))
    for layer, state in zip(layers, states, strict=True):
        for part in (*PARTS, "shared"):
            prompts = layer.container(part)
            if adapter_name in prompts:
                start = state.cpu() if layer.carries(part, adapter_name) else at_most(WORD_STD, state.cpu())
                noise = 0 if config.init_weights else INIT_STD * torch.randn(state.shape)
                prompts[adapter_name].copy_(start + noise)


def at_most(std: float, prompt: Float[Tensor, "slots width"]) -> Float[Tensor, "slots width"]:
    """A prompt whose slots have a standard deviation of at most some size.

    Args:
        std: The size.
        prompt: A prompt; scaling a slot changes nothing behind a norm, but for the norm's epsilon.
    """
    return prompt * (std / prompt.std(dim=-1, keepdim=True)).clamp(max=1.0)


@torch.no_grad()
def word_states(model: nn.Module, word_ids: tuple[int, ...], *, depth: int) -> list[Float[Tensor, "tokens width"]]:
    """What the base model carries at the places of some words, at the input of its lower text layers.

    Args:
        model: CLIP, with or without adapters.
        word_ids: Token ids of the words that follow the start token.
        depth: Number of layers, from the first on.
    """
    towers, text = towers_of(model), towers_of(model).model.config.text_config
    start = text.vocab_size - 2 if text.eos_token_id == 2 else text.bos_token_id
    states = []
    with base_behaviour(model):
        hidden = towers.embed_text(torch.tensor([[start, *word_ids]], device=model.logit_scale.device))
        for number in range(depth):
            states.append(hidden[0, 1:])
            hidden = towers.run_text(hidden, number, number + 1)
    return states


@contextmanager
def base_behaviour(model: nn.Module) -> Iterator[None]:
    """Inside, every layer of this package acts as the layer that it wraps.

    Args:
        model: Model with adapters.
    """
    layers = [module for module in model.modules() if isinstance(module, PromptLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
