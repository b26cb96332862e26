"""The form of a row of `tests/cases.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from peft_vlm.adapters.config import VLMConfig
from peft_vlm.objective import Objective
from peft_vlm.registry import METHODS


@dataclass(frozen=True)
class Case:
    """A training method and its adapters as the contract tests see them.

    Args:
        method: Registered name of the training method.
        config: Builds a configuration of its adapter type for the tiny model.
        objective: Builds its objective for class prompts; keyword arguments override settings.
        other_shape: Settings of a second adapter with another shape, None if every adapter looks the same.
        starts_as_base: Whether an untrained adapter leaves the base model's output as it is.
        text_free: Whether the model with its adapter takes `pixel_values` alone.
        image_conditioned: Whether class prompts are shifted, by the image or by noise, so that the model's own forward
            refuses.
        saved_module: A module outside the method's own targets, for PEFT's `modules_to_save`.
        can_merge: Whether merging into the base weights is exact.
        fits_any_base: Whether an adapter is meant for base models of other sizes too.
        zero_gradients: Endings of trainable tensors whose gradient is analytically zero, with the reason.
        batch_dependent: Why the loss of a batch is not the mean of the losses of its halves; empty if it is.
        bad_settings: Impossible configurations: (settings, text that the message must hold).
    """

    method: str
    config: Callable[..., PeftConfig]
    objective: Callable[..., Objective]
    other_shape: dict[str, Any] | None = None
    starts_as_base: bool = True
    text_free: bool = False
    image_conditioned: bool = False
    saved_module: str = "token_embedding"
    can_merge: bool = False
    fits_any_base: bool = False
    zero_gradients: dict[str, str] = field(default_factory=dict)
    batch_dependent: str = ""
    bad_settings: Sequence[tuple[dict[str, Any], str]] = ()

    @property
    def adapter(self) -> str:
        """Name of the adapter type that the method trains."""
        return METHODS[self.method].adapter

    @property
    def is_own(self) -> bool:
        """Whether the adapter type is of this package, not of PEFT."""
        return issubclass(METHODS[self.method].adapter_type.config, VLMConfig)
