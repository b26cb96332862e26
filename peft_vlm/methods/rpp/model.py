"""RPP as a PEFT tuner: slots at the entrance of both towers, and prompts in the attention of their lower layers."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_vlm.adapters.config import architecture_of
from peft_vlm.adapters.context import TextContextConfig, complete_context, learned_token_pattern
from peft_vlm.adapters.layer import PromptLayer
from peft_vlm.adapters.learned_tokens import INIT_STD, LearnedTokens, TextSlots, VisionSlots
from peft_vlm.adapters.qkv_prompt import ProjectionPrompts
from peft_vlm.adapters.tuner import VLMTuner
from peft_vlm.errors import AdapterError, PeftVLMWarning
from peft_vlm.files import WEIGHTS_NAME
from peft_vlm.methods.rpp.config import RPPConfig
from peft_vlm.models.towers import PROJECTIONS, Side, Towers, device_of, towers_of

#: Standard deviation of an initial prompt that only its layer's norm reads: far above the root of the norm's epsilon
#: (0.003), so that its function stays, and near that of embedded words.
WORD_STD = 0.1


@torch.no_grad()
def _start_from_words(model: nn.Module, adapter_name: str, config: TextContextConfig) -> None:
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
    if any(state.is_meta for state in states):
        return  # a model without weights, in a dry run
    for layer, state in zip(layers, states, strict=True):
        for part in (*PROJECTIONS, "shared"):
            prompts = layer.container(part)
            if adapter_name in prompts:
                # a prompt that slots carry is the words' state; of the others a norm reads no more than the direction
                start = state.cpu() if layer.carries(part, adapter_name) else _at_most(WORD_STD, state.cpu())
                noise = 0 if config.init_weights else INIT_STD * torch.randn(state.shape)
                prompts[adapter_name].copy_(start + noise)


def _at_most(std: float, prompt: Float[Tensor, "slots width"]) -> Float[Tensor, "slots width"]:
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
    towers, states = towers_of(model), []
    with _base_behaviour(model):
        ids = torch.tensor([[towers.start_token_id, *word_ids]], device=device_of(model))
        hidden = towers.embed_text(ids)
        for number in range(depth):
            states.append(hidden[0, 1:])  # (words, width), behind the start token
            hidden = towers.run_text(hidden, number, number + 1)
    return states


@contextmanager
def _base_behaviour(model: nn.Module) -> Iterator[None]:
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


#: One prompt (slots, width) per layer, from the first on.
Prompts = list[Tensor]


@torch.no_grad()
def start_shared_prompts(model: nn.Module, adapter: str | Path) -> None:
    """Set a model's learned tokens (CoOp, MaPLe, PromptSRC, PromptKD) to the prompts of a shared RPP adapter.

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
    if isinstance(target, TextContextConfig) and target.before:
        raise AdapterError("Expected a model without attribute words, which RPP's prompts do not have, got some.")
    if config.depths["text"] and position != "end":
        inexact.append(f"the class name stands at the {position!r} of the context, and at the end of RPP's")
    for tower, depth in config.depths.items():
        layers = towers.layers_paths[tower]
        prompts = [state[f"base_model.model.{layers}.{number}.rpp_shared"] for number in range(depth)]
        targets = _learned_tokens(towers, tower)
        if tower == "vision" and prompts and not targets and _entrance(towers, tower):
            inexact.append("vision tokens are projected from the text tokens, and the RPP adapter's are left out")
            continue
        _check_shapes(tower, prompts, targets)
        if not prompts:
            continue
        if tower == "text":  # learned tokens get positions added, RPP's prompts have them inside
            positions = towers.text_positions
            prompts[0] = prompts[0].to(positions) - positions[1 : 1 + len(prompts[0])]
        else:
            norm = towers.model.get_submodule(towers.vision_norm_paths[0])
            # back through the norm's shift and scale; its centring has no inverse
            prompts[0] = (prompts[0].to(norm.weight) - norm.bias) / norm.weight
            inexact.append("first vision tokens pass a norm that RPP's do not")
        for target, prompt in zip(targets, prompts, strict=True):
            target.copy_(prompt)
    if inexact:
        text = "; ".join(inexact)
        warnings.warn(f"The prompts are a start, not the same function: {text}.", PeftVLMWarning, stacklevel=2)


def _learned_tokens(towers: Towers, tower: str) -> Prompts:
    """Active learned tokens of a tower, from its entrance upwards; none where they are projected (MaPLe)."""
    layers = towers.text_layers if tower == "text" else towers.vision_layers
    found = [module for module in (_entrance(towers, tower), *layers) if isinstance(module, LearnedTokens)]
    own = [module for module in found if module.adapter_layer_names[0].endswith("prompt")]
    return [module.prompts[module.current_adapter] for module in own if module.current_adapter is not None]


def _entrance(towers: Towers, tower: str) -> LearnedTokens | None:
    """The embeddings of a tower, where they have learned tokens."""
    entrance = towers.token_embedding if tower == "text" else towers.vision_embeddings
    return entrance if isinstance(entrance, LearnedTokens) else None


def _check_shapes(tower: str, prompts: Prompts, targets: Prompts) -> None:
    """Refuse prompts of other numbers or sizes."""
    here, there = ([tuple(prompt.shape) for prompt in part] for part in (targets, prompts))
    if here != there:
        raise AdapterError(
            f"Expected {len(here)} {tower} prompts of shape {here[:1]!r}, as the model has, got {len(there)} of shape "
            f"{there[:1]!r} in the RPP adapter. Give the model as many tokens and layers as the adapter's "
            f"`num_{tower}_tokens` and `{tower}_depth`."
        )


class RPPModel(VLMTuner):
    """The tuner behind `get_peft_model(clip, RPPConfig(...))`."""

    prefix = "rpp_"

    def target_pattern(self, config: RPPConfig) -> str:
        """Names of the embeddings and layers that prompts enter.

        Args:
            config: The adapter's configuration; gets the ids of its initial words.

        Returns:
            Regular expression over full module names.
        """
        depths = config.depths
        pattern = learned_token_pattern(
            self.model, text_depth=depths["text"], vision_depth=depths["vision"], first_layer=0
        )
        config.base_architecture = architecture_of(self.model.config.to_dict())
        config.check_dead_prompts()
        if depths["text"]:
            complete_context(config, self.model)
        return pattern

    def wrap(self, target: nn.Module) -> PromptLayer:
        """An embedding with slots, or a transformer layer with prompts.

        Args:
            target: Module of the base model.
        """
        towers = towers_of(self.model)
        if target is towers.token_embedding:
            return TextSlots(target)
        if target is towers.vision_embeddings:
            return VisionSlots(target)
        layers: dict[Side, list[nn.Module]] = {"text": [*towers.text_layers], "vision": [*towers.vision_layers]}
        (place,) = [(tower, layers[tower].index(target)) for tower in layers if target in layers[tower]]
        return ProjectionPrompts(target, prefix=self.prefix, tower=place[0], number=place[1])

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, its text prompts at the states of their words."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _start_from_words(model, adapter_name, self.peft_config[adapter_name])

    def fold(self) -> None:
        """Project all prompts once, for inference: queries, keys and values of the slots become constants.

        Outputs stay the same bit for bit; under autocast folded rows are not used. `unfold()` and `train()` undo it,
        and so do loading and deleting adapters; changing a prompt in any other way while it is folded has no effect
        until then.
        """
        for layer in self._prompted_layers():
            layer.fold()

    def unfold(self) -> None:
        """Project the prompts in every forward pass again."""
        for layer in self._prompted_layers():
            layer.unfold()

    def _prompted_layers(self) -> list[ProjectionPrompts]:
        return [module for module in self.model.modules() if isinstance(module, ProjectionPrompts)]
