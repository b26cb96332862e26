"""Places for prompts of the attention blocks at the entrance of both towers, with nothing learned in them."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.prompting.deep_prompt import fill_slots
from peft_vlm.prompting.layer import StandInLayer
from peft_vlm.slots import Slots


class TextSlots(StandInLayer):
    """CLIP's token embedding whose reserved slots hold fixed vectors: the embeddings of the initial words, or zeros.

    Args:
        base_layer: `nn.Embedding` of the text tower.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.context_slots: dict[str, Slots] = {}
        self.other_param_names = ("context_slots",)  # PEFT forgets an entry together with its adapter

    @property
    def slots(self) -> Slots | None:
        """Slots of the active adapter; None when the layer must act as the base layer."""
        name = self.current_adapter
        return None if name is None else self.context_slots[name]

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Note an adapter's slots.

        Args:
            adapter_name: Name of the adapter.
            config: A `TextContextConfig`, completed by `complete_context`.
        """
        self.context_slots[adapter_name] = config.slots

    def forward(self, input_ids: Int[Tensor, "prompts tokens"]) -> Float[Tensor, "prompts tokens width"]:
        """Embeddings with the fixed vectors in the slots.

        Args:
            input_ids: Token ids with reserved slots.
        """
        embedded, slots = self.base_layer(input_ids), self.slots
        if slots is None:
            return embedded
        if slots.initial_ids is None:
            words = embedded.new_zeros(slots.num_tokens, embedded.shape[-1])
        else:
            words = self.base_layer(torch.tensor(slots.initial_ids, device=input_ids.device))
        return fill_slots(embedded, input_ids, words, slots)


class VisionSlots(StandInLayer):
    """CLIP's vision embeddings with zero tokens behind the patches, which the first norm turns into its bias.

    Args:
        base_layer: `CLIPVisionEmbeddings`.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.num_slots: dict[str, int] = {}
        self.other_param_names = ("num_slots",)

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Note an adapter's number of slots.

        Args:
            adapter_name: Name of the adapter.
            config: Configuration with `num_vision_tokens`.
        """
        self.num_slots[adapter_name] = config.num_vision_tokens

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, "batch tokens width"]:
        """Patch and class embeddings, then the slots."""
        embedded, name = self.base_layer(*args, **kwargs), self.current_adapter
        return embedded if name is None else nn.functional.pad(embedded, (0, 0, 0, self.num_slots[name]))
