"""Class prompts with the places that an adapter's learned context takes."""

import dataclasses

import torch
from jaxtyping import Int
from torch import Tensor, nn

from peft_vlm.errors import ClassNameError
from peft_vlm.models.towers import towers_of
from peft_vlm.slots import Slots
from peft_vlm.text.prompts import ClassPrompts


def slots_of(model: nn.Module) -> Slots | None:
    """The slots that the active adapter fills; None without learned context, or while adapters are switched off."""
    return getattr(towers_of(model).token_embedding, "slots", None)


def reserve_slots(model: nn.Module, prompts: ClassPrompts) -> ClassPrompts:
    """Class prompts as the model with its active adapter takes them.

    Args:
        model: CLIP-like model, with or without adapters.
        prompts: Plain class prompts, or prompts that already have this adapter's slots.

    Returns:
        `prompts` itself when the active adapter has no learned context.

    Raises:
        ClassNameError: If a prompt gets too long, was tokenised with other slots, or its template has no room.
    """
    slots = slots_of(model)
    if prompts.slots == slots:
        return prompts
    if prompts.slots is not None:
        raise ClassNameError(
            f"Expected plain class prompts or ones with {slots!r}, got prompts with {prompts.slots!r}. "
            "Pass what `tokenize_classes` gave; the slots of the active adapter are added where they are needed."
        )
    assert slots is not None
    ids = _with_slots(prompts, slots)
    limit = towers_of(model).model.config.text_config.max_position_embeddings
    if ids.shape[1] > limit:
        raise ClassNameError(
            f"The longest of the class prompts needs {ids.shape[1]} tokens with the {slots.num_tokens} context "
            f"tokens of the adapter, the limit of the text tower is {limit}. Shorten class names or template."
        )
    return dataclasses.replace(prompts, input_ids=ids, slots=slots)


def _with_slots(prompts: ClassPrompts, slots: Slots) -> Int[Tensor, "prompts tokens"]:
    """Token ids with the slots reserved."""
    ids, count = prompts.input_ids, slots.num_tokens
    places = torch.full((len(ids), count), slots.placeholder_id, dtype=ids.dtype, device=ids.device)
    if slots.position == "end":
        words = torch.tensor(slots.initial_ids or (), dtype=ids.dtype, device=ids.device)
        spelled = 0 < len(words) == count and bool((ids[:, 1 : 1 + count] == words).all())
        return torch.cat([ids[:, :1], places, ids[:, 1 + (count if spelled else 0) :]], dim=1)
    if prompts.name_lengths is None or not all(text.startswith("{}") for text in prompts.templates):
        raise ClassNameError(
            f"Expected a template that begins with the class name, such as '{{}}.', for context in the "
            f"{slots.position!r} position, got {list(prompts.templates)!r}. Change the template."
        )
    before = count // 2 if slots.position == "middle" else 0
    lengths = prompts.name_lengths * len(prompts.templates)
    rows = [
        torch.cat([row[:1], place[:before], row[1 : 1 + length], place[before:], row[1 + length :]])
        for row, place, length in zip(ids, places, lengths, strict=True)
    ]
    return torch.stack(rows)
