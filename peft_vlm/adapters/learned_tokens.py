"""Places for prompts of the attention blocks at the entrance of both towers, with nothing learned in them."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.adapters.layer import DelegatingLayer, LearnedPrompt, own_module
from peft_vlm.errors import AdapterError
from peft_vlm.models.packed_texts import OwnContexts
from peft_vlm.models.towers import Side, split_at_prompts, token_like
from peft_vlm.text.class_features import ConditionedContext
from peft_vlm.text.prompts import SlotLayer, Slots, slot_mask


class _ContextLayer(DelegatingLayer, SlotLayer):
    """CLIP's token embedding with slots per adapter.

    Args:
        base_layer: `nn.Embedding` of the text tower.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.context_slots: dict[str, Slots] = {}
        self.other_param_names = ("context_slots",)  # PEFT forgets an entry together with its adapter

    @property
    def slots(self) -> Slots | None:
        """Slots that prompts reserve for the active adapter; None when the layer must act as the base layer."""
        name = self.current_adapter
        return None if name is None else self.context_slots[name]


class TextSlots(_ContextLayer):
    """CLIP's token embedding whose reserved slots hold fixed vectors: the embeddings of the initial words, or zeros.

    Args:
        base_layer: `nn.Embedding` of the text tower.
    """

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
            words = embedded.new_zeros(slots.num_tokens, embedded.shape[-1])  # (slots, width)
        else:
            words = self.base_layer(torch.tensor(slots.initial_ids, device=input_ids.device))
        return fill_slots(embedded, input_ids, words, slots)


class VisionSlots(DelegatingLayer):
    """CLIP's vision embeddings with zero tokens after the patches, which the first norm turns into its bias.

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
        # (batch, tokens, width) -> (batch, tokens + slots, width)
        return embedded if name is None else nn.functional.pad(embedded, (0, 0, 0, self.num_slots[name]))


INIT_STD = 0.02
"""Standard deviation of randomly initialised prompts, in all official codes."""

ATTRIBUTE_STD = 0.01
"""That of the vectors before attribute words (official ATPrompt)."""


class LearnedTokens(LearnedPrompt):
    """A layer with one (tokens, width) tensor per adapter."""

    def active_prompt(self, like: Tensor) -> Float[Tensor, "tokens width"] | None:
        """Tokens of the active adapter in the dtype of a tensor; None when the layer must act as the base layer."""
        name = self.current_adapter
        return None if name is None else self.prompts[name].to(like.dtype)

    def own_context(self, adapter_name: str) -> Float[Tensor, "tokens width"]:
        """The tokens that replace those of the layer below; all that are learned.

        Args:
            adapter_name: Name of the adapter.
        """
        return self.prompts[adapter_name]

    def _random(self, tokens: int, like: Tensor) -> nn.Parameter:
        """N(0, 0.02) on the device of a weight, in its dtype."""
        # Drawn on the CPU in float32, so that a seed gives the same prompt on every device and in every type.
        return nn.Parameter((INIT_STD * torch.randn(tokens, like.shape[-1])).to(like))


class TextContext(LearnedTokens, _ContextLayer):
    """CLIP's token embedding whose reserved slots are filled with learned context vectors, before positions are added.

    Before the context there may be fixed words, each after learned vectors of its own. These vectors are the first
    rows of the learned tensor; the words are no part of it.

    Args:
        base_layer: `nn.Embedding` of the text tower.
        prefix: The method's parameter prefix.
    """

    def __init__(self, base_layer: nn.Module, *, prefix: str) -> None:
        super().__init__(base_layer, prefix=prefix)
        self.places_before: dict[str, list[int | None]] = {}
        self.other_param_names = (*self.other_param_names, "places_before")

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Context from the embeddings of `context_init_ids`, or random; random vectors before fixed words.

        Args:
            adapter_name: Key of the new tensor.
            config: A `TextContextConfig`, completed by `complete_context`.
        """
        weight, slots, before = self.get_base_layer().weight, config.slots, config.before
        if slots.initial_ids is None:
            context = self._random(config.num_text_tokens, weight)
        else:
            context = nn.Parameter(weight.detach()[list(slots.initial_ids)].clone())  # (slots, width)
            if not config.init_weights:
                context.data += INIT_STD * torch.randn(context.shape).to(context)
        if config.num_vectors_before:
            own = self._random(config.num_vectors_before, weight) * (ATTRIBUTE_STD / INIT_STD)
            context = nn.Parameter(torch.cat([own.detach(), context.detach()]))
        self.prompts[adapter_name], self.context_slots[adapter_name] = context, slots
        self.places_before[adapter_name] = before

    def own_context(self, adapter_name: str) -> Float[Tensor, "tokens width"]:
        """The learned vectors after the last fixed word.

        Args:
            adapter_name: Name of the adapter.
        """
        return self.prompts[adapter_name][self.places_before[adapter_name].count(None) :]

    def context(self, adapter_name: str) -> Float[Tensor, "*classes tokens width"]:
        """The learned vectors of an adapter as prompts get them.

        Args:
            adapter_name: Name of the adapter.
        """
        return self.prompts[adapter_name]

    def with_words(
        self, adapter_name: str, vectors: Float[Tensor, "*parts tokens width"]
    ) -> Float[Tensor, "*parts slots width"]:
        """Vectors for all slots: the learned ones, and the embeddings of the fixed words between them.

        Args:
            adapter_name: Name of the adapter.
            vectors: The learned ones.
        """
        before = self.places_before[adapter_name]
        ids = [token for token in before if token is not None]
        if not ids:
            return vectors
        words = self.base_layer(torch.tensor(ids, device=vectors.device)).detach().to(vectors.dtype)
        count = vectors.shape[-2]
        # Rows of `vectors` are numbered first, those of `words` after them: the places before the context take from
        # both in their order, and what is left of the vectors is the context.
        learned, fixed = itertools.count(), itertools.count(count)
        order = [next(learned if token is None else fixed) for token in before]
        order += range(before.count(None), count)
        return torch.cat([vectors, words.expand(*vectors.shape[:-2], -1, -1)], dim=-2)[..., order, :]

    def active_prompt(self, like: Tensor) -> Float[Tensor, "*parts slots width"] | None:
        """Vectors for all slots of the active adapter in the dtype of a tensor; None without one.

        Args:
            like: Tensor.
        """
        name = self.current_adapter
        return None if name is None else self.with_words(name, self.context(name)).to(like.dtype)

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


#: The layer whose context is shifted now, and the vector that shifts it; every thread has its own.
_SHIFT: ContextVar[tuple[nn.Module, Tensor] | None] = ContextVar("shift", default=None)


class ShiftedContext(TextContext, ConditionedContext, OwnContexts):
    """A context to all of whose vectors the same vector is added, one of `shifts`.

    Args:
        base_layer: `nn.Embedding` of the text tower.
        prefix: The method's parameter prefix.
    """

    #: Says why there are no text features as the model is.
    without_shift: str

    @contextmanager
    def shifted_by(self, shifts: Float[Tensor, "shifts width"]) -> Iterator[None]:
        """The class prompts shifted, all by the first, then all by the second, ...; in this thread, while it is open.

        Args:
            shifts: Some of `shifts`.
        """
        token = _SHIFT.set((self, shifts))
        try:
            yield
        finally:
            _SHIFT.reset(token)

    @property
    def contexts_differ(self) -> bool:
        """Not among the prompts of one shift."""
        return False

    @property
    def num_repeats(self) -> int:
        """Once for each shift."""
        active = _SHIFT.get()
        return 1 if active is None or active[0] is not self else len(active[1])

    def context(self, adapter_name: str) -> Float[Tensor, "*shifts tokens width"]:
        """The learned vectors, those after the last fixed word shifted; one set for each of several shifts.

        Args:
            adapter_name: Name of the adapter.

        Raises:
            AdapterError: If nothing shifts them now.
        """
        active, vectors = _SHIFT.get(), self.prompts[adapter_name]
        if active is None or active[0] is not self:
            raise AdapterError(self.without_shift)
        count, shifts = self.places_before[adapter_name].count(None), active[1][:, None]
        fixed = vectors[:count].expand(len(shifts), -1, -1)
        shifted = torch.cat([fixed, vectors[count:] + shifts], dim=1)  # (shifts, tokens, width)
        return shifted[0] if len(shifted) == 1 else shifted


class _Perceptron(nn.Module):
    """Two linear layers with a ReLU between them; flat, as PEFT strips adapter names from two levels only."""

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        first, second = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.weight1, self.bias1, self.weight2, self.bias2 = first.weight, first.bias, second.weight, second.bias

    def forward(self, vectors: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Each vector by itself."""
        hidden = nn.functional.linear(vectors, self.weight1, self.bias1).relu()
        return nn.functional.linear(hidden, self.weight2, self.bias2)


class _AlongContext(nn.LSTM):
    """One bidirectional LSTM along the context vectors, half the width per direction."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width // 2, bidirectional=True, batch_first=True)

    def forward(self, vectors: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """The outputs of both directions."""
        return super().forward(vectors)[0]


NETWORKS: dict[str, type[nn.Module]] = {"lstm": _AlongContext, "mlp": _Perceptron}


class EncodedContext(TextContext):
    """A context that a network may encode while it is trained: the vectors plus what the network makes of them.

    Args:
        base_layer: `nn.Embedding` of the text tower.
        prefix: The method's parameter prefix.
    """

    def __init__(self, base_layer: nn.Module, *, prefix: str) -> None:
        super().__init__(base_layer, prefix=prefix)
        self.adapter_layer_names = (*self.adapter_layer_names, f"{prefix}network")
        setattr(self, self.adapter_layer_names[1], nn.ModuleDict())

    @property
    def networks(self) -> nn.ModuleDict:
        """Networks by adapter name, for those that have one."""
        return own_module(self, self.adapter_layer_names[1])

    def add_network(self, adapter_name: str, kind: str) -> None:
        """Give an adapter a network.

        Args:
            adapter_name: Name of the adapter, which has its context already.
            kind: Key of `NETWORKS`.
        """
        like = self.prompts[adapter_name]
        network = NETWORKS[kind](like.shape[-1])
        self.networks[adapter_name] = network if like.is_meta else network.to(like)

    def context(self, adapter_name: str) -> Float[Tensor, "*classes slots width"]:
        """The context of an adapter as prompts get it, in float32 where a network encodes it.

        Args:
            adapter_name: Name of the adapter.
        """
        vectors = self.prompts[adapter_name]
        if adapter_name not in self.networks:
            return vectors
        with torch.autocast(vectors.device.type, enabled=False):
            return vectors + self.networks[adapter_name](vectors)

    @torch.no_grad()
    def collapse(self, adapter_name: str) -> None:
        """Put the encoded context in the place of the vectors, and drop the network: the same outputs.

        Args:
            adapter_name: Name of the adapter.
        """
        self.prompts[adapter_name].copy_(self.context(adapter_name))
        if adapter_name in self.networks:
            del self.networks[adapter_name]


def fill_slots(
    embedded: Float[Tensor, "prompts tokens width"],
    input_ids: Int[Tensor, "prompts tokens"],
    vectors: Float[Tensor, "*parts slots width"],
    slots: Slots,
) -> Float[Tensor, "prompts tokens width"]:
    """Put vectors into the reserved places of every prompt: the same ones, or own ones of each of some equal parts.

    Args:
        embedded: Embeddings of the prompts.
        input_ids: Their token ids, which say where the places are.
        vectors: One per place, for all prompts or for each of as many parts of them, at most for each prompt.
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
            f"{slots.num_tokens} times first, as in '{'<|startoftext|>' * min(slots.num_tokens, 2)} ... a cat.'"
        )
    # `masked_scatter` reads its source row by row: vectors, (slots, width), per prompt.
    per_part = vectors if vectors.ndim == 3 else vectors[None]
    rows = per_part.repeat_interleave(len(input_ids) // len(per_part), dim=0).flatten(0, 1)
    return embedded.masked_scatter(mask[..., None], rows)


class VisionTokens(LearnedTokens):
    """CLIP's vision embeddings with learned tokens after the patches: no positions, before the first norm.

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
        like = token_like(self.get_base_layer())
        self.prompts[adapter_name] = self._random(config.num_vision_tokens, like)

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, "batch tokens width"]:
        """Patch and class embeddings, then the learned tokens."""
        embedded = self.base_layer(*args, **kwargs)
        prompt = self.active_prompt(embedded)
        # (batch, tokens, width) -> (batch, tokens + learned, width); `expand` copies nothing
        return embedded if prompt is None else torch.cat([embedded, prompt.expand(len(embedded), -1, -1)], dim=1)


class DeepTokens(LearnedTokens):
    """A transformer layer at whose input the learned tokens are replaced by new ones.

    Args:
        base_layer: `CLIPEncoderLayer`.
        prefix: The method's parameter prefix.
        tower: `"text"`: the n positions after the start token and fixed words, if any; `"vision"`: the last n.
    """

    def __init__(self, base_layer: nn.Module, *, prefix: str, tower: Side) -> None:
        super().__init__(base_layer, prefix=prefix)
        self.tower = tower
        self.num_before: dict[str, int] = {}
        self.other_param_names = ("num_before",)

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Random tokens.

        Args:
            adapter_name: Key of the new tensor.
            config: Configuration with `num_text_tokens` or `num_vision_tokens`.
        """
        is_text = self.tower == "text"
        tokens = config.num_text_tokens if is_text else config.num_vision_tokens
        self.prompts[adapter_name] = self._random(tokens, token_like(self.get_base_layer()))
        self.num_before[adapter_name] = len(config.before) if is_text else 0

    @property
    def num_entering(self) -> int:
        """Positions after the start token that the active adapter replaces."""
        name = self.current_adapter
        return 0 if name is None else self.num_before.get(name, 0) + len(self.prompts[name])

    def enter(self, hidden: Float[Tensor, "rows tokens width"]) -> Float[Tensor, "rows tokens width"]:
        """Return the layer's input with the learned tokens in place.

        Args:
            hidden: Output of the layer below.
        """
        prompt = self.active_prompt(hidden)
        if prompt is None:
            return hidden
        skipped = self.num_before.get(self.current_adapter or "", 0)  # fixed words and their vectors flow on
        before, after = split_at_prompts(hidden, len(prompt), side=self.tower, skipped=skipped)
        return torch.cat([before, prompt.expand(len(hidden), -1, -1), after], dim=1)

    def forward(self, hidden: Float[Tensor, "rows tokens width"], *args: Any, **kwargs: Any) -> Any:
        """The layer on its input with the learned tokens in place.

        Args:
            hidden: Output of the layer below.
            *args: Passed on.
            **kwargs: Passed on.
        """
        return self.base_layer(self.enter(hidden), *args, **kwargs)
