"""Configuration of a PromptSRC adapter: learned tokens in both towers of a CLIP."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast, no_type_check

from peft import PeftType

from peft_vlm.adapters.context import AttributeContextConfig, check_count, fit_depths
from peft_vlm.registry import extend_peft_type

extend_peft_type("PROMPTSRC")


@no_type_check  # wrong types get the messages of `__post_init__`, in tests too
@dataclass
class PromptSRCConfig(AttributeContextConfig):
    """Independent vision-language prompting (IVLP): tokens and depth per tower.

    A tower with 0 tokens or depth 0 has none: text only with depth 1 is CoOp, vision only is VPT (deep from depth 2
    on).

    Args:
        num_text_tokens: Context vectors per prompt. Official `N_CTX_TEXT`, 4.
        text_depth: Text layers at whose input the context is learned, from the first on; 1 is the prompt itself.
            Official `PROMPT_DEPTH_TEXT`, 9 of 12. None: 9, in a smaller tower three quarters of its layers.
        num_vision_tokens: Learned tokens behind the image patches. Official `N_CTX_VISION`, 4.
        vision_depth: The same as `text_depth` for the vision tower. Official `PROMPT_DEPTH_VISION`, 9.

    References:
        Self-regulating Prompts: Foundational Model Adaptation without Forgetting, 2023, arXiv 2307.06948, Sec. 3.1.
    """

    text_depth: int | None = field(default=None)
    num_vision_tokens: int = field(default=4)
    vision_depth: int | None = field(default=None)

    fits_model: ClassVar[tuple[str, ...]] = ("text_depth", "vision_depth")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["PROMPTSRC"]
        for name in ("num_text_tokens", "num_vision_tokens"):
            check_count(self, name)
        for name in ("text_depth", "vision_depth"):
            check_count(self, name, optional=True)

    def fit(self, layers: Mapping[str, int], length: int | None) -> None:
        """Fill in depths that are None."""
        fit_depths(self, layers)

    @property
    def depths(self) -> tuple[int, int]:
        """Layers with learned tokens in the text and in the vision tower; 0 for a tower without tokens."""
        return (
            cast(int, self.text_depth) if self.num_text_tokens else 0,
            cast(int, self.vision_depth) if self.num_vision_tokens else 0,
        )
