"""Places in a tokenised prompt that learned context vectors take."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

POSITIONS = ("end", "middle", "front")
"""Positions of the class name relative to the context, as CoOp's `CLASS_TOKEN_POSITION`."""


@dataclass(frozen=True)
class Slots:
    """Number and position of the places that a prompt reserves.

    A reserved place holds the start-of-text token, which no tokenizer puts anywhere but at position 0: a tokenised
    prompt says by itself where its slots are, and nothing a user writes is overwritten by accident.

    Args:
        num_tokens: Context vectors per prompt.
        placeholder_id: The start-of-text token.
        position: `"end"`: context, then class name. `"middle"`: half of the context, class name, the other half.
            `"front"`: class name, then context. The rest of the template follows.
        initial_ids: Token ids of the words that the context was initialised from. A template that begins with these
            words gives them up as slots; before any other template the slots are inserted.
    """

    num_tokens: int
    placeholder_id: int
    position: str = "end"
    initial_ids: tuple[int, ...] | None = None


class SlotLayer(ABC):
    """A layer around the token embedding that fills slots: what texts are made for the model with its adapters."""

    @property
    @abstractmethod
    def slots(self) -> Slots | None:
        """Slots of the active adapter; None where the layer acts as the base layer."""


def slot_mask(input_ids: Int[Tensor, "prompts tokens"], placeholder_id: int) -> Bool[Tensor, "prompts tokens"]:
    """Mask of the slots of tokenised prompts: start-of-text tokens after the first position."""
    mask = input_ids == placeholder_id
    mask[:, 0] = False  # the start token itself
    return mask
