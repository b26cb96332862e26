"""Many prompts as one row of tokens: what all of them begin with once, then each prompt's own tokens without padding.

Under the causal mask a token's state depends on the tokens before it alone. Start token and learned context are the
same in every class prompt, so their states are the same in every layer: one copy serves all prompts, whose own tokens
attend to its keys and values. Tokens after the pooled one change nothing and are left out. Everything but attention
works on single tokens, so layers, and the prompts and tuners in them, run on the packed row as on one long prompt.

The sums are the same as in the model's own forward, in another order: results differ by rounding only.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

#: Longest packed row, in tokens, whose attention is one call with a mask, by device. A GPU waits for kernels to start,
#: not for their sums, so it gains by few kernels; a CPU gains by few sums.
LONGEST_MASKED = {"cuda": 2048}

#: Passes of the text tower by the way they took: `"packed"`, or `"plain: <reason>"`. Tests read it.
passes: Counter[str] = Counter()


class OwnContexts(ABC):
    """A layer around the token embedding that may put other vectors into every prompt, where token ids are equal."""

    @property
    @abstractmethod
    def contexts_differ(self) -> bool:
        """Whether it does so with the active adapter."""

    @property
    def num_repeats(self) -> int:
        """How often the same prompts follow each other, each time with another context for all of them."""
        return 1


@runtime_checkable
class _EntersLayer(Protocol):
    """A wrapper that changes what enters a transformer layer at fixed positions, and nothing else."""

    base_layer: nn.Module

    def enter(self, hidden: Float[Tensor, "rows tokens width"]) -> Float[Tensor, "rows tokens width"]:
        """Return what the wrapped layer is given in place of `hidden`.

        Args:
            hidden: Output of the layer below.
        """
        ...

    @property
    def num_entering(self) -> int:
        """Positions after the first that `enter` may change."""
        ...


@dataclass(frozen=True, eq=False)
class PackedTexts:
    """Where the tokens of a list of prompts are in the packed row: the shared ones, then each prompt's own.

    Args:
        num_shared: Leading tokens that are the same in all prompts; at least the pooled token is each prompt's own.
        rows: Prompt of each own token, in packed order.
        columns: Position of each own token in its prompt.
        own: Place of each prompt's own tokens among all own tokens; padded with 0.
        real: Which entries of `own` are no padding.
        pooled: Place of each prompt's pooled token among all own tokens.
    """

    num_shared: int
    rows: Int[Tensor, " own"]
    columns: Int[Tensor, " own"]
    own: Int[Tensor, "prompts longest"]
    real: Bool[Tensor, "prompts longest"]
    pooled: Int[Tensor, " prompts"]

    @classmethod
    def of(cls, input_ids: Int[Tensor, "prompts tokens"], pooled_positions: Int[Tensor, " prompts"]) -> "PackedTexts":
        """Return the layout of tokenised prompts.

        Args:
            input_ids: Token ids, slots reserved.
            pooled_positions: Position of each prompt's pooled token.
        """
        ids, last = input_ids.cpu(), pooled_positions.cpu()
        equal = (ids == ids[:1]).all(dim=0).int().cumprod(dim=0).sum()
        num_shared = min(int(equal), int(last.min()))
        lengths = last + 1 - num_shared
        places = torch.arange(int(lengths.max()))
        real = places < lengths[:, None]
        starts = lengths.cumsum(0) - lengths
        own = torch.where(real, starts[:, None] + places, 0)
        rows, columns = real.nonzero(as_tuple=True)
        parts = (rows, columns + num_shared, own, real, starts + lengths - 1)
        return cls(num_shared, *(part.to(input_ids.device) for part in parts))

    @property
    def is_full(self) -> bool:
        """No prompt is shorter than the longest, so that the own tokens are a plain table."""
        return self.real.numel() == len(self.rows)

    @cached_property
    def visible(self) -> Bool[Tensor, "packed packed"]:
        """Which tokens of the packed row (columns) each of them (rows) attends to."""
        first = torch.arange(self.num_shared, device=self.rows.device)
        prompt = torch.cat([torch.full_like(first, -1), self.rows])  # (packed,): -1 where all prompts share the token
        column = torch.cat([first, self.columns])
        is_seen = (prompt == -1) | (prompt == prompt[:, None])
        return is_seen & (column <= column[:, None])

    def pack(self, hidden: Float[Tensor, "rows tokens width"]) -> Float[Tensor, "repeats packed width"]:
        """Return the packed rows of hidden states.

        Args:
            hidden: States of the prompts, padded; perhaps several times the prompts, with other states.
        """
        hidden = hidden.unflatten(0, (-1, len(self.own)))
        return torch.cat([hidden[:, 0, : self.num_shared], hidden[:, self.rows, self.columns]], dim=1)

    def table(self, own: Float[Tensor, "own *rest"]) -> Float[Tensor, "prompts longest *rest"]:
        """Return values of own tokens as one row per prompt; padding holds some token's values.

        Args:
            own: Values in packed order.
        """
        return own.view(*self.own.shape, *own.shape[1:]) if self.is_full else own[self.own]

    def untable(self, table: Float[Tensor, "prompts longest *rest"]) -> Float[Tensor, "own *rest"]:
        """Return the packed order of what `table` gave.

        Args:
            table: One row per prompt.
        """
        return table.flatten(0, 1) if self.is_full else table[self.rows, self.columns - self.num_shared]


def run_packed(
    layers: Sequence[nn.Module],
    hidden: Float[Tensor, "prompts tokens width"],
    input_ids: Int[Tensor, "prompts tokens"],
    pooled_positions: Int[Tensor, " prompts"],
    *,
    embedding: nn.Module | None,
) -> Float[Tensor, "prompts width"] | None:
    """Return each prompt's pooled state after text layers; None where these must run as they are.

    The last layer computes the pooled tokens only. `passes` counts both ways.

    Args:
        layers: The layers that are to run.
        hidden: What enters the first of them.
        input_ids: Token ids, slots reserved.
        pooled_positions: Position of each prompt's pooled token.
        embedding: The token embedding, or the layer around it, where `hidden` comes from there.
    """
    contexts = embedding if isinstance(embedding, OwnContexts) else None
    reason = _reason_against(layers) if layers else "no layer is left"
    if contexts is not None and contexts.contexts_differ:
        reason = "each class has a context of its own"
    if reason is None:
        # With a context repeated, the prompts come several times: their layout is that of the first time.
        count = len(input_ids) // (1 if contexts is None else contexts.num_repeats)
        texts = PackedTexts.of(input_ids[:count], pooled_positions[:count])
        if texts.num_shared >= _num_required(layers):
            passes["packed"] += 1
            packed = texts.pack(hidden)  # (repeats, packed, width)
            for layer in layers[:-1]:
                packed = _layer(layer, packed, texts, pooled_only=False)
            return _layer(layers[-1], packed, texts, pooled_only=True).flatten(0, 1)
        reason = "prompts differ where a layer is prompted"
    passes[f"plain: {reason}"] += 1
    return None


def _unwrapped(layer: nn.Module) -> Any:
    """The transformer layer inside wrappers that change what enters it."""
    while isinstance(layer, _EntersLayer):
        layer = layer.base_layer
    return layer


def _reason_against(layers: Sequence[nn.Module]) -> str | None:
    """Why text layers must run as they are; None where the packed row gives the same."""
    for layer in map(_unwrapped, layers):
        if not isinstance(layer, CLIPEncoderLayer):
            return f"a layer is a {type(layer).__name__}"
        # Layer and attention are not called as a whole, so their hooks would not run; those further inside do.
        if any(module._forward_hooks or module._forward_pre_hooks for module in (layer, layer.self_attn)):
            return "a hook watches a layer"
        if layer.self_attn.training and layer.self_attn.dropout:
            return "attention has dropout"
        # Dropout is drawn for each prompt; shared tokens would have one draw for all.
        if layer.training and any(isinstance(module, nn.Dropout) and module.p for module in layer.modules()):
            return "a layer has dropout"
    return None


def _num_required(layers: Sequence[nn.Module]) -> int:
    """How many leading tokens must be shared, so that what enters the layers is in their part of the row."""
    return 1 + max((layer.num_entering for layer in layers if isinstance(layer, _EntersLayer)), default=0)


def _layer(
    layer: Any, hidden: Float[Tensor, "repeats packed width"], texts: PackedTexts, *, pooled_only: bool
) -> Float[Tensor, "repeats positions width"]:
    """One layer, recomputed in the backward pass where the model's gradient checkpointing says so."""
    inner = _unwrapped(layer)
    if inner.training and torch.is_grad_enabled() and getattr(inner, "gradient_checkpointing", False):
        return checkpoint(_run_layer, layer, hidden, texts, pooled_only, use_reentrant=False)
    return _run_layer(layer, hidden, texts, pooled_only)


def _run_layer(
    layer: Any, hidden: Float[Tensor, "repeats packed width"], texts: PackedTexts, pooled_only: bool
) -> Float[Tensor, "repeats positions width"]:
    is_wrapped = isinstance(layer, _EntersLayer)
    while isinstance(layer, _EntersLayer):
        hidden, layer = layer.enter(hidden), layer.base_layer
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    keys, values = attention.k_proj(normed), attention.v_proj(normed)
    if not pooled_only:
        queries = attention.q_proj(normed)
    else:
        places = texts.num_shared + texts.pooled
        hidden = hidden[:, places]
        # prompts of queries know their places in the whole row alone
        queries = attention.q_proj(normed)[:, places] if is_wrapped else attention.q_proj(normed[:, places])
    attended = _attention(attention, queries, keys, values, texts, pooled_only=pooled_only)
    hidden = hidden + attention.out_proj(attended)
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def _heads(attention: Any, tokens: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens heads size"]:
    return tokens.unflatten(-1, (attention.num_heads, attention.head_dim))


def _attention(
    attention: Any,
    queries: Float[Tensor, "repeats asking width"],
    keys: Float[Tensor, "repeats packed width"],
    values: Float[Tensor, "repeats packed width"],
    texts: PackedTexts,
    *,
    pooled_only: bool,
) -> Float[Tensor, "repeats asking width"]:
    """Attend within the shared tokens, and from each prompt's own tokens, or its pooled one, to these and its own."""
    if keys.shape[1] <= LONGEST_MASKED.get(keys.device.type, 0):
        visible = texts.visible[texts.num_shared + texts.pooled] if pooled_only else texts.visible
        return _masked_attention(attention, queries, keys, values, visible)
    in_parts = _pooled_in_parts if pooled_only else _attention_in_parts
    rows = zip(queries, keys, values, strict=True)
    return torch.stack([in_parts(attention, *row, texts) for row in rows])


def _masked_attention(
    attention: Any,
    queries: Float[Tensor, "repeats asking width"],
    keys: Float[Tensor, "repeats packed width"],
    values: Float[Tensor, "repeats packed width"],
    visible: Bool[Tensor, "asking packed"],
) -> Float[Tensor, "repeats asking width"]:
    """Attend from some tokens to those of the packed row that they see, in one call."""
    q, k, v = (_heads(attention, tokens).transpose(1, 2) for tokens in (queries, keys, values))
    attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=attention.scale)
    return attended.transpose(1, 2).flatten(2)


def _attention_in_parts(
    attention: Any,
    queries: Float[Tensor, "packed width"],
    keys: Float[Tensor, "packed width"],
    values: Float[Tensor, "packed width"],
    texts: PackedTexts,
) -> Float[Tensor, "packed width"]:
    """Attend without computing what the mask hides."""
    q, k, v = (_heads(attention, tokens) for tokens in (queries, keys, values))
    count, longest = texts.num_shared, texts.own.shape[1]
    shared = (tensor[None, :count].transpose(1, 2) for tensor in (q, k, v))  # 1, heads, shared, size
    first = nn.functional.scaled_dot_product_attention(*shared, is_causal=True, scale=attention.scale)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=q.device).tril()
    own = (texts.table(tensor[count:]) for tensor in (q, k, v))  # prompts, longest, heads, size
    rest = _own_attention(*own, k[:count], v[:count], causal & texts.real[:, None, None], scale=attention.scale)
    return torch.cat([first[0].transpose(0, 1), texts.untable(rest)]).flatten(1)


def _pooled_in_parts(
    attention: Any,
    queries: Float[Tensor, "prompts width"],
    keys: Float[Tensor, "packed width"],
    values: Float[Tensor, "packed width"],
    texts: PackedTexts,
) -> Float[Tensor, "prompts width"]:
    """The same from the pooled tokens alone."""
    q, k, v = (_heads(attention, tokens) for tokens in (queries, keys, values))
    count, visible = texts.num_shared, texts.real[:, None, None]
    own = (texts.table(tensor[count:]) for tensor in (k, v))
    return _own_attention(q[:, None], *own, k[:count], v[:count], visible, scale=attention.scale)[:, 0].flatten(1)


def _own_attention(
    queries: Float[Tensor, "prompts asking heads size"],
    keys: Float[Tensor, "prompts longest heads size"],
    values: Float[Tensor, "prompts longest heads size"],
    shared_keys: Float[Tensor, "shared heads size"],
    shared_values: Float[Tensor, "shared heads size"],
    visible: Bool[Tensor, "prompts 1 _asking longest"],
    *,
    scale: float,
) -> Float[Tensor, "prompts asking heads size"]:
    """One softmax over shared and own tokens, without a copy of the shared keys and values per prompt."""
    prompts, asking = queries.shape[:2]
    by_head = queries.flatten(0, 1).transpose(0, 1)  # heads, prompts * asking, size
    to_shared = (by_head @ shared_keys.permute(1, 2, 0)).unflatten(1, (prompts, asking)).transpose(0, 1)
    to_own = queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1)  # prompts, heads, asking, longest
    to_own = to_own.masked_fill(~visible, -torch.inf)
    scores = torch.cat([to_shared, to_own], dim=-1).float() * scale
    weights = scores.softmax(dim=-1).to(values.dtype)
    count = len(shared_keys)
    from_shared = weights[..., :count].transpose(0, 1).flatten(1, 2) @ shared_values.transpose(0, 1)
    from_own = weights[..., count:] @ values.transpose(1, 2)
    return (from_shared.unflatten(1, (prompts, asking)).transpose(0, 1) + from_own).transpose(1, 2)
