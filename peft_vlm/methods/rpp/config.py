"""Configuration of an RPP adapter: separate prompts for queries, keys and values in both towers of a CLIP."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast, no_type_check

from peft import PeftType

from peft_vlm.adapters.context import TextContextConfig, check_count, fit_depths
from peft_vlm.adapters.qkv_prompt import RESIDUALS, SHARING, dead_queries
from peft_vlm.errors import PeftVLMWarning, check_choice
from peft_vlm.registry import extend_peft_type

extend_peft_type("RPP")

DEAD_PROMPTS = ("refuse", "omit")


@no_type_check  # wrong types get the messages of `__post_init__`, in tests too
@dataclass
class RPPConfig(TextContextConfig):
    """Query, key and value prompts of the lower layers. All defaults are ours; the paper's settings are not published.

    A tower with 0 tokens or depth 0 has none.

    Args:
        num_text_tokens: Slots in front of the class name, behind the start token. Ours: 4.
        context_init: Words that the text prompts start from: in every layer what the frozen model carries at their
            places, so that an untrained text tower is that of the base model with these words, up to a norm's epsilon
            (see `word_start`). Ours: "a photo of a"; None: N(0, 0.02) in front of the template. Vision prompts always
            start there.
        text_depth: Text layers with prompts, from the first on. Ours: 9 of 12. None: 9, in a smaller tower three
            quarters of its layers.
        num_vision_tokens: Slots behind the image patches. Ours: 4.
        vision_depth: The same as `text_depth` for the vision tower. Ours: 9.
        share_qkv: `"none"`: the paper's separate prompts; `"all"`: one prompt for all three, as in POMP and deep
            prompt tuning.
        slot_residual: What the slots carry past the attention: `"stream"`: the layer's own input; `"replaced"`: the
            query prompt. Ours: "stream", with which every query prompt can act.
        dead_prompts: What to do about query prompts that cannot act (see `dead_queries`): `"refuse"`, or `"omit"`
            them with a warning.

    References:
        Revisiting Prompt Pretraining of Vision-Language Models, 2024, arXiv 2409.06166.
    """

    text_depth: int | None = field(default=None)
    num_vision_tokens: int = field(default=4)
    vision_depth: int | None = field(default=None)
    share_qkv: str = field(default="none")
    slot_residual: str = field(default="stream")
    dead_prompts: str = field(default="refuse")

    fits_model: ClassVar[tuple[str, ...]] = ("text_depth", "vision_depth")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["RPP"]
        for name in ("num_text_tokens", "num_vision_tokens"):
            check_count(self, name)
        for name in ("text_depth", "vision_depth"):
            check_count(self, name, optional=True)
        for name, known in (("share_qkv", SHARING), ("slot_residual", RESIDUALS), ("dead_prompts", DEAD_PROMPTS)):
            check_choice(name, getattr(self, name), known)

    def fit(self, layers: Mapping[str, int], length: int | None) -> None:
        """Fill in depths that are None."""
        fit_depths(self, layers)

    @property
    def depths(self) -> dict[str, int]:
        """Prompted layers by tower; 0 for a tower without tokens."""
        return {
            "text": cast(int, self.text_depth) if self.num_text_tokens else 0,
            "vision": cast(int, self.vision_depth) if self.num_vision_tokens else 0,
        }

    def dead_layers(self, tower: str) -> dict[int, str]:
        """Layers of a tower whose query prompt cannot act, with the reason; known once the adapter has a base model.

        Args:
            tower: `"text"` or `"vision"`.
        """
        if self.share_qkv == "all" or not self.depths[tower] or self.base_architecture is None:
            return {}
        num_layers = self.base_architecture[f"{tower}_num_hidden_layers"]
        return dead_queries(self.depths[tower], num_layers, slot_residual=self.slot_residual)

    def check_dead_prompts(self) -> None:
        """Refuse query prompts that cannot act, or warn that they are left out.

        Raises:
            ValueError: If there are any, unless `dead_prompts` is `"omit"`.
        """
        found = {tower: self.dead_layers(tower) for tower in self.depths}
        text = "; ".join(
            f"{tower} layers {sorted(dead)}: {[*dead.values()][0]}" for tower, dead in found.items() if dead
        )
        if not text:
            return
        if self.dead_prompts == "refuse":
            raise ValueError(
                f"Expected every prompt to have an effect, got query prompts without any ({text}). Prompt fewer "
                "layers than the tower has with `slot_residual`='stream', share one prompt (`share_qkv`='all'), or "
                "leave these prompts out (`dead_prompts`='omit')."
            )
        warnings.warn(f"Left out query prompts that cannot have an effect ({text}).", PeftVLMWarning, stacklevel=2)
