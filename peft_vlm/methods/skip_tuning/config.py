"""Configuration of a Skip Tuning adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast, no_type_check

from peft import PeftType

from peft_vlm.adapters.config import DTYPES, VLMConfig, fit_fields, fitted
from peft_vlm.errors import check_choice
from peft_vlm.registry import extend_peft_type

extend_peft_type("SKIP_TUNING")

START_LAYER = 6
"""Official `START_LAYER`, for 12 layers."""


@no_type_check  # wrong types get the messages of `__post_init__`, in tests too
@dataclass
class SkipTuningConfig(VLMConfig):
    """Which layers of a CLIP-like model are tuned; the adapter holds exactly their tensors.

    Tuned are the transformer layers from `start_layer` on, the final norms and the projections of both towers. Frozen
    are the embeddings, CLIP's first vision norm, the layers below, and the logit scale. In a multimodal model, tuned
    are the layers of its language model from `start_layer` on and the final norm; the vision side, the embeddings and
    the head stay frozen.

    Args:
        start_layer: First tuned layer, counted from 0; also the number of layers whose output can be cached. Paper:
            omega; official flag `START_LAYER`, 6 of 12 layers. None: 6, in a smaller tower half of its layers.
        text_start_layer: First tuned text layer where the towers differ in depth; None means `start_layer`, and where
            that is None too, it fits the text tower.
        adapter_dtype: dtype in which the tuned tensors are kept and saved: `"float32"`, `"float16"`, `"bfloat16"`.
            None follows PEFT: the base model's dtype, raised to float32 while training a half-precision base.

    References:
        Skip Tuning: Pre-trained Vision-Language Models are Effective and Efficient Adapters Themselves, 2025,
        arXiv 2412.11509, Sec. 4.
    """

    start_layer: int | None = field(default=None)
    text_start_layer: int | None = field(default=None)
    adapter_dtype: str | None = field(default=None)

    fits_model: ClassVar[tuple[str, ...]] = ("start_layer",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["SKIP_TUNING"]
        check_choice("adapter_dtype", self.adapter_dtype, (None, *DTYPES))
        for name in ("start_layer", "text_start_layer"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Expected `{name}` to be an integer, got {value!r}.")
            if value < 0:
                raise ValueError(f"Expected `{name}` to be 0 or more, got {value!r}.")

    def fit(self, layers: Mapping[str, int], length: int | None) -> None:
        """Fill in start layers that are None; those of a language model count as text."""
        if self.start_layer is not None:
            return
        vision, text = (fitted(START_LAYER, layers.get(tower), least=0) for tower in ("vision", "text"))
        fits = {"start_layer": vision} | ({} if text == vision else {"text_start_layer": text})
        fit_fields(self, dict.fromkeys(fits, START_LAYER), fits)

    @property
    def start_layers(self) -> tuple[int, int]:
        """First tuned layer of the vision tower and of the text tower."""
        vision = cast(int, self.start_layer)  # filled in when the model is wrapped
        return vision, vision if self.text_start_layer is None else self.text_start_layer
