"""MaPLe as a PEFT tuner: text tokens as in PromptSRC, and vision tokens that are projected from them."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.adapters.context import complete_context, learned_token_pattern, learned_tokens
from peft_vlm.adapters.layer import PromptLayer, own_module
from peft_vlm.adapters.learned_tokens import DeepTokens, LearnedTokens, VisionTokens
from peft_vlm.adapters.tuner import VLMTuner
from peft_vlm.methods.maple.config import MaPLeConfig
from peft_vlm.models.towers import token_like, towers_of


class _Coupled(LearnedTokens):
    """Vision tokens of a layer: a linear map of the text tokens of the same layer, with a bias."""

    def couple(self, text: LearnedTokens, copied: "_Coupled | None", *, prefix: str) -> "_Coupled":
        """Replace the tokens of its own by a projection.

        Args:
            text: Layer of the text tower with the tokens.
            copied: Layer whose initial projection is copied; the official code makes deep copies of a single one.
            prefix: The method's parameter prefix.
        """
        delattr(self, f"{prefix}prompt")
        self.adapter_layer_names = (f"{prefix}weight", f"{prefix}bias")
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.sources = (text, copied)  # a tuple, so that torch does not take them for parts of this layer
        return self

    @property
    def projections(self) -> tuple[nn.ParameterDict, nn.ParameterDict]:
        """Weights, (width of the vision tower, width of the text tower), and biases, by adapter name."""
        weights, biases = (own_module(self, name) for name in self.adapter_layer_names)
        return weights, biases

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """A projection that begins as `nn.Linear` does.

        Args:
            adapter_name: Key of the new tensors.
            config: A `MaPLeConfig`.
        """
        text, copied = self.sources
        like = token_like(self.get_base_layer())
        width, bound = text.prompts[adapter_name].shape[-1], text.prompts[adapter_name].shape[-1] ** -0.5
        for index, part in enumerate(self.projections):
            if copied is None:  # drawn on the CPU in float32, as `nn.Linear` does
                shape = (like.shape[-1],) if index else (like.shape[-1], width)
                start = torch.empty(shape).uniform_(-bound, bound)
            else:
                start = copied.projections[index][adapter_name].detach().clone()
            part[adapter_name] = nn.Parameter(start if start.is_meta else start.to(like))

    def active_prompt(self, like: Tensor) -> Float[Tensor, "tokens width"] | None:
        """The projected tokens of the active adapter in the dtype of a tensor; None without one.

        Args:
            like: Tensor.
        """
        name = self.current_adapter
        if name is None:
            return None
        weight, bias = (part[name] for part in self.projections)
        text = self.sources[0].own_context(name).to(weight.dtype)  # (tokens, width of the text tower)
        return nn.functional.linear(text, weight, bias).to(like.dtype)


class CoupledTokens(_Coupled, VisionTokens):
    """CLIP's vision embeddings with projected tokens after the patches."""


class CoupledDeepTokens(_Coupled, DeepTokens):
    """A vision layer at whose input the learned tokens are replaced by newly projected ones."""


class MaPLeModel(VLMTuner):
    """The tuner behind `get_peft_model(clip, MaPLeConfig(...))`."""

    prefix = "maple_"

    def target_pattern(self, config: MaPLeConfig) -> str:
        """Names of the embeddings and layers with learned tokens.

        Args:
            config: The adapter's configuration; gets the ids of its initial words.

        Returns:
            Regular expression over full module names.
        """
        pattern = learned_token_pattern(self.model, text_depth=config.depth, vision_depth=config.depth)
        complete_context(config, self.model)
        return pattern

    def wrap(self, target: nn.Module) -> PromptLayer:
        """An embedding or a transformer layer with learned or projected tokens.

        Args:
            target: Module of the base model; those of the text tower come first.
        """
        towers = towers_of(self.model)
        if target is towers.vision_embeddings:
            return CoupledTokens(target, prefix=self.prefix).couple(towers.token_embedding, None, prefix=self.prefix)
        for index, layer in enumerate(towers.vision_layers):
            if target is layer:
                deep = CoupledDeepTokens(target, prefix=self.prefix, tower="vision")
                copied = towers.vision_layers[1] if index > 1 else None
                return deep.couple(towers.text_layers[index], copied, prefix=self.prefix)
        return learned_tokens(self.model, target, prefix=self.prefix)
