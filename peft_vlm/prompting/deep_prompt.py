"""Learned tokens in CLIP's towers: context in the class prompts, tokens beside the patches, and their deep versions.

Independent vision-language prompting: a tower has `n` learned tokens and a depth. Depth 1 puts them at the input of
layer 0 only; depth d also replaces them at the input of layers 1 to d - 1, each time by tensors of their own. Behind
that their outputs flow on. Depth 0 means none.

References:
    MaPLe: Multi-modal Prompt Learning, 2023, arXiv 2210.03117, Sec. 3.2; Visual Prompt Tuning, 2022, arXiv 2203.12119
    (there the deep prompts of the vision tower); placement from the official code of PromptSRC.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.errors import AdapterError
from peft_vlm.prompting.layer import LearnedPrompt
from peft_vlm.slots import Slots, slot_mask

INIT_STD = 0.02
"""Standard deviation of randomly initialised prompts, in all official codes."""


class LearnedTokens(LearnedPrompt):
    """A layer with one (tokens, width) tensor per adapter."""

    def active_prompt(self, like: Tensor) -> Float[Tensor, "tokens width"] | None:
        """Tokens of the active adapter in the dtype of a tensor; None when the layer must act as the base layer."""
        name = self.current_adapter
        return None if name is None else self.prompts[name].to(like.dtype)

    def _random(self, tokens: int, like: Tensor) -> nn.Parameter:
        """N(0, 0.02) on the device of a weight, in its dtype."""
        return nn.Parameter((INIT_STD * torch.randn(tokens, like.shape[-1])).to(like))


class TextContext(LearnedTokens):
    """CLIP's token embedding whose reserved slots are filled with learned context vectors, before positions are added.

    Args:
        base_layer: `nn.Embedding` of the text tower.
        prefix: The method's parameter prefix.
    """

    def __init__(self, base_layer: nn.Module, *, prefix: str) -> None:
        super().__init__(base_layer, prefix=prefix)
        self.context_slots: dict[str, Slots] = {}
        self.other_param_names = ("context_slots",)  # PEFT forgets an entry together with its adapter

    @property
    def slots(self) -> Slots | None:
        """What the active adapter needs reserved in a prompt; None when there is none."""
        name = self.current_adapter
        return None if name is None else self.context_slots[name]

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Context from the embeddings of `context_init_ids`, or random.

        Args:
            adapter_name: Key of the new tensor.
            config: A `TextContextConfig`, completed by `complete_context`.
        """
        weight, slots = self.get_base_layer().weight, config.slots
        if slots.initial_ids is None:
            context = self._random(slots.num_tokens, weight)
        else:
            context = nn.Parameter(weight.detach()[list(slots.initial_ids)].clone())
            if not config.init_weights:
                context.data += INIT_STD * torch.randn(context.shape).to(context)
        self.prompts[adapter_name], self.context_slots[adapter_name] = context, slots

    def forward(self, input_ids: Int[Tensor, "prompts tokens"]) -> Float[Tensor, "prompts tokens width"]:
        """Embeddings with the context in the slots.

        Args:
            input_ids: Token ids with reserved slots.
        """
        embedded = self.base_layer(input_ids)
        context, slots = self.active_prompt(embedded), self.slots
        if context is None or slots is None:
            return embedded
        return fill_slots(embedded, input_ids, context, slots)


def fill_slots(
    embedded: Float[Tensor, "prompts tokens width"],
    input_ids: Int[Tensor, "prompts tokens"],
    vectors: Float[Tensor, "slots width"],
    slots: Slots,
) -> Float[Tensor, "prompts tokens width"]:
    """Put the same vectors into the reserved places of every prompt.

    Args:
        embedded: Embeddings of the prompts.
        input_ids: Their token ids, which say where the places are.
        vectors: One per place.
        slots: Places that the active adapter needs.

    Raises:
        AdapterError: If a prompt does not have exactly these places.
    """
    mask = slot_mask(input_ids, slots.placeholder_id)
    counts = mask.sum(dim=-1)
    if bool((counts != slots.num_tokens).any()):
        raise AdapterError(
            f"Expected {slots.num_tokens} reserved context slots in every prompt, got "
            f"{sorted(set(counts.tolist()))!r}. Tokenise with `reserve_slots(model, tokenize_for_model(...))` of "
            "`peft_vlm.text`; in texts of your own write the tokenizer's start token "
            f"{slots.num_tokens} times in front, as in '{'<|startoftext|>' * min(slots.num_tokens, 2)} ... a cat.'"
        )
    return embedded.masked_scatter(mask[..., None], vectors.repeat(len(input_ids), 1))


class VisionTokens(LearnedTokens):
    """CLIP's vision embeddings with learned tokens behind the patches: no positions, before the first norm.

    Args:
        base_layer: `CLIPVisionEmbeddings`.
        prefix: The method's parameter prefix.
    """

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Random tokens.

        Args:
            adapter_name: Key of the new tensor.
            config: Configuration with `num_vision_tokens`.
        """
        weight = self.get_base_layer().position_embedding.weight
        self.prompts[adapter_name] = self._random(config.num_vision_tokens, weight)

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, "batch tokens width"]:
        """Patch and class embeddings, then the learned tokens."""
        embedded = self.base_layer(*args, **kwargs)
        prompt = self.active_prompt(embedded)
        return embedded if prompt is None else torch.cat([embedded, prompt.expand(len(embedded), -1, -1)], dim=1)


class DeepTokens(LearnedTokens):
    """A transformer layer at whose input the learned tokens are replaced by new ones.

    Args:
        base_layer: `CLIPEncoderLayer`.
        prefix: The method's parameter prefix.
        tower: `"text"`: positions 1 to n, behind the start token; `"vision"`: the last n.
    """

    def __init__(self, base_layer: nn.Module, *, prefix: str, tower: str) -> None:
        super().__init__(base_layer, prefix=prefix)
        self.tower = tower

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Random tokens.

        Args:
            adapter_name: Key of the new tensor.
            config: Configuration with `num_text_tokens` or `num_vision_tokens`.
        """
        tokens = config.num_text_tokens if self.tower == "text" else config.num_vision_tokens
        self.prompts[adapter_name] = self._random(tokens, self.get_base_layer().layer_norm1.weight)

    def forward(self, hidden: Float[Tensor, "rows tokens width"], *args: Any, **kwargs: Any) -> Any:
        """The layer on its input with the learned tokens in place.

        Args:
            hidden: Output of the layer below.
            *args: Passed on.
            **kwargs: Passed on.
        """
        prompt = self.active_prompt(hidden)
        if prompt is not None:
            count, prompt = len(prompt), prompt.expand(len(hidden), -1, -1)
            if self.tower == "text":
                hidden = torch.cat([hidden[:, :1], prompt, hidden[:, 1 + count :]], dim=1)
            else:
                hidden = torch.cat([hidden[:, :-count], prompt], dim=1)
        return self.base_layer(hidden, *args, **kwargs)
