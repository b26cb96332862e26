"""Separate prompts for query, key and value of an attention block, at fixed slots of its input.

With Rep(X, P) = X with its slots overwritten by P, layer l computes its queries from LN(Rep(X, P_Q)), its keys from
LN(Rep(X, P_K)) and its values from LN(Rep(X, P_V)), through its own norm and its own frozen projections. Only rows of
slots differ from the layer's usual queries, keys and values, so a prompt is projected once per forward pass, whatever
the batch, and the result is a constant once training is over (`fold`).

What the slots carry past the attention is the residual rule: "stream": the layer's own input X, untouched by the
prompts; "replaced": Rep(X, P_Q). The rule decides which query prompts can act at all, see `dead_queries`.

References:
    Revisiting Prompt Pretraining of Vision-Language Models (RPP), 2024, arXiv 2409.06166 (the three equations; the
    residual is not published).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.adapters.layer import DelegatingLayer, own_module
from peft_vlm.adapters.learned_tokens import INIT_STD
from peft_vlm.models.towers import (
    PROJECTIONS,
    Side,
    attention_norm_of,
    attention_of,
    split_at_prompts,
    token_like,
)

SHARING = ("none", "all")
RESIDUALS = ("stream", "replaced")


def dead_queries(depth: int, num_layers: int, *, slot_residual: str) -> dict[int, str]:
    """Layers whose query prompt cannot change any output, each with the reason.

    The attention output of a slot depends on that slot's query alone, and keys and values of every prompted layer are
    overwritten at the slots. A query prompt therefore acts only through what a later, unprompted layer reads there.

    Args:
        depth: Prompted layers, from the first on.
        num_layers: Layers of the tower.
        slot_residual: One of `RESIDUALS`.
    """
    if depth == num_layers:
        reason = "no unprompted layer follows that could read what a slot's query brings about"
        return dict.fromkeys(range(depth), reason)
    if slot_residual == "replaced":
        return dict.fromkeys(range(depth - 1), "the next layer overwrites what the slots carry")
    return {}


class SlotProjection(nn.Module):
    """A query, key or value projection whose output at the slots comes from a prompt of the layer around it.

    Args:
        projection: The frozen projection.
        owner: The layer with the prompts.
        part: Key of `PROJECTIONS`.
    """

    def __init__(self, projection: nn.Module, *, owner: "ProjectionPrompts", part: str) -> None:
        super().__init__()
        self.projection, self.part = projection, part
        self._owner = (owner,)  # in a tuple: as a submodule it would contain itself

    @property
    def projection(self) -> nn.Module:
        """The frozen projection."""
        return own_module(self, "projection")

    def forward(self, normed: Float[Tensor, "rows tokens width"]) -> Float[Tensor, "rows tokens width"]:
        """Projections of all tokens; those of the slots are the same in every row.

        Args:
            normed: The layer's input after its norm.
        """
        (owner,) = self._owner
        prompt = owner.projected(self.part, normed)
        if prompt is None:
            return self.projection(normed)
        before, after = split_at_prompts(normed, len(prompt), side=owner.tower)
        rows = prompt.expand(len(normed), -1, -1)  # (slots, width) -> (rows, slots, width)
        if not after.shape[1]:  # the slots are last: the rest is one slice, which needs no copy
            return torch.cat([self.projection(before), rows], dim=1)
        # Rows of slots are left out of the product, and its result is cut where they belong.
        rest = self.projection(torch.cat([before, after], dim=1))
        return torch.cat([rest[:, : before.shape[1]], rows, rest[:, before.shape[1] :]], dim=1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "projection" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("projection"), name)


class ProjectionPrompts(DelegatingLayer):
    """A transformer layer with prompts for its queries, keys and values.

    Args:
        base_layer: `CLIPEncoderLayer`.
        prefix: The method's parameter prefix.
        tower: `"text"`: slots at positions 1 to n, after the start token; `"vision"`: the last n.
        number: Position of the layer in its tower, from 0.
    """

    def __init__(self, base_layer: nn.Module, *, prefix: str, tower: Side, number: int) -> None:
        super().__init__(base_layer)
        self.tower, self.number = tower, number
        self.adapter_layer_names = tuple(f"{prefix}{part}" for part in (*PROJECTIONS, "shared"))
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.residuals: dict[str, str] = {}
        self.other_param_names = ("residuals",)
        self._constants: dict[tuple[str, str], Tensor] = {}
        attention = attention_of(base_layer)
        for part, leaf in PROJECTIONS.items():
            setattr(attention, leaf, SlotProjection(getattr(attention, leaf), owner=self, part=part))

    def release(self) -> None:
        """Give the attention block its own projections back."""
        attention = attention_of(self.base_layer)
        for leaf in PROJECTIONS.values():
            setattr(attention, leaf, getattr(attention, leaf).projection)

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Random prompts, N(0, 0.02): one per part, or one for all; a dead query prompt is left out.

        Args:
            adapter_name: Key of the new tensors.
            config: Configuration with tokens, `share_qkv`, `slot_residual` and `dead_layers(tower)`.
        """
        tokens = config.num_text_tokens if self.tower == "text" else config.num_vision_tokens
        weight = token_like(self.base_layer)
        self.residuals[adapter_name] = config.slot_residual
        for part in self.parts_of(config):
            prompt = INIT_STD * torch.randn(tokens, weight.shape[-1])  # (slots, width)
            self.container(part)[adapter_name] = nn.Parameter(prompt.to(weight))

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter, with what `fold` has computed of it.

        Args:
            adapter_name: Its name.
        """
        self.unfold()
        super().delete_adapter(adapter_name)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Forget folded constants: they are of the prompts before."""
        self.unfold()
        super()._load_from_state_dict(*args, **kwargs)

    def parts_of(self, config: Any) -> tuple[str, ...]:
        """Names of the prompts that an adapter has in this layer.

        Args:
            config: The adapter's configuration.
        """
        if config.share_qkv == "all":
            return ("shared",)
        dead = self.number in config.dead_layers(self.tower)
        return tuple(part for part in PROJECTIONS if part != "query" or not dead)

    def container(self, part: str) -> nn.ParameterDict:
        """Prompts of one part by adapter name.

        Args:
            part: Key of `PROJECTIONS`, or `"shared"`.
        """
        return own_module(self, self.adapter_layer_names[(*PROJECTIONS, "shared").index(part)])

    def carries(self, part: str, adapter_name: str) -> bool:
        """Return whether the slots carry a prompt past the attention, so that its size counts.

        Args:
            part: Key of `PROJECTIONS`, or `"shared"`.
            adapter_name: Name of the adapter.
        """
        return self.residuals[adapter_name] == "replaced" and part in ("query", "shared")

    def prompt(self, part: str) -> Float[Tensor, "slots width"] | None:
        """Prompt of the active adapter for one part; None where it has none.

        Args:
            part: Key of `PROJECTIONS`.
        """
        name = self.current_adapter
        if name is None:
            return None
        shared = self.container("shared")  # one prompt for all three parts, under the key of no part
        own = shared if name in shared else self.container(part)
        return own[name] if name in own else None

    def projected(self, part: str, normed: Float[Tensor, "rows tokens width"]) -> Float[Tensor, "slots width"] | None:
        """Projections of a prompt that replace those of the slots; None where the layer's own are right.

        Args:
            part: Key of `PROJECTIONS`.
            normed: The layer's input after its norm, for device and dtype.
        """
        name, prompt = self.current_adapter, self.prompt(part)
        if name is None or prompt is None:
            return None
        if self.carries("shared" if name in self.container("shared") else part, name):
            return None  # the input already has the prompt in its slots
        constant = self._constants.get((name, part))
        if constant is not None and self._fits(constant, normed):
            return constant
        return self._project(part, prompt.to(normed.dtype))

    @staticmethod
    def _fits(constant: Tensor, normed: Tensor) -> bool:
        """Return whether a folded constant is what would be computed; under autocast projections have another type."""
        same = (constant.device, constant.dtype) == (normed.device, normed.dtype)
        return same and not torch.is_autocast_enabled(normed.device.type)

    @property
    def input_prompt(self) -> Float[Tensor, "slots width"] | None:
        """Prompt that the slots of the layer's input carry, by the rule "replaced"; None otherwise."""
        name = self.current_adapter
        return self.prompt("query") if name is not None and self.residuals[name] == "replaced" else None

    @torch.no_grad()
    def fixed_rows(self) -> dict[str, Float[Tensor, "slots width"]]:
        """Projected prompts of the active adapter, by the name of the projection."""
        like = token_like(self.base_layer)  # (width,), read as (1, 1, width): only device and dtype count
        rows = {leaf: self.projected(part, like[None, None]) for part, leaf in PROJECTIONS.items()}
        return {leaf: tensor for leaf, tensor in rows.items() if tensor is not None}

    def _project(self, part: str, prompt: Float[Tensor, "slots width"]) -> Float[Tensor, "slots width"]:
        # What the layer makes of a token that is this prompt: its norm works on each token alone.
        leaf = getattr(attention_of(self.base_layer), PROJECTIONS[part])
        return leaf.projection(attention_norm_of(self.base_layer)(prompt))

    @torch.no_grad()
    def fold(self) -> None:
        """Compute the projected prompts of all adapters once, for inference; `unfold` or `train()` forgets them."""
        weight = token_like(self.base_layer)
        for part in PROJECTIONS:
            for container in (self.container(part), self.container("shared")):
                for name, prompt in container.items():
                    self._constants[name, part] = self._project(part, prompt.to(weight.dtype))

    def unfold(self) -> None:
        """Project prompts in every forward pass again."""
        self._constants.clear()

    def train(self, mode: bool = True) -> "ProjectionPrompts":
        """Switch the mode; training forgets folded constants, which would hide what is learned.

        Args:
            mode: True for training.
        """
        if mode:
            self.unfold()
        return super().train(mode)

    @property
    def num_entering(self) -> int:
        """Positions after the start token that have prompts of the active adapter."""
        prompts = (self.prompt(part) for part in PROJECTIONS)
        return max((len(prompt) for prompt in prompts if prompt is not None), default=0)

    def enter(self, hidden: Float[Tensor, "rows tokens width"]) -> Float[Tensor, "rows tokens width"]:
        """Return the layer's input, by the rule "replaced" with the query prompt in its slots.

        Args:
            hidden: Output of the layer below.
        """
        prompt = self.input_prompt
        if prompt is None:
            return hidden
        rows = prompt.to(hidden.dtype).expand(len(hidden), -1, -1)
        before, after = split_at_prompts(hidden, len(prompt), side=self.tower)
        return torch.cat([before, rows, after], dim=1)

    def forward(self, hidden: Float[Tensor, "rows tokens width"], *args: Any, **kwargs: Any) -> Any:
        """The layer; its projections ask for the prompts themselves.

        Args:
            hidden: Output of the layer below.
            *args: Passed on.
            **kwargs: Passed on.
        """
        return self.base_layer(self.enter(hidden), *args, **kwargs)
