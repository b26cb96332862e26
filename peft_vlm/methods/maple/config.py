"""Configuration of a MaPLe adapter: learned text tokens, and projections that make vision tokens of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, no_type_check

from peft import PeftType

from peft_vlm.adapters.adapter_files import Shape
from peft_vlm.adapters.config import fit_fields, fitted
from peft_vlm.adapters.context import AttributeContextConfig, check_count
from peft_vlm.registry import extend_peft_type

extend_peft_type("MAPLE")

DEPTH = 9


@no_type_check  # wrong types get the messages of `__post_init__`, in tests too
@dataclass
class MaPLeConfig(AttributeContextConfig):
    """Multi-modal prompts: the vision tokens of each layer are a linear function of its text tokens.

    Args:
        num_text_tokens: Context vectors per prompt, and as many vision tokens. Paper: b; official `N_CTX`, 2.
        depth: Layers of either tower at whose input there are learned tokens, from the first on. Paper: J; official
            `PROMPT_DEPTH`, 9 of 12. None: 9, in a smaller tower three quarters of its layers.

    References:
        MaPLe: Multi-modal Prompt Learning, 2022, arXiv 2210.03117, Sec. 3.2.
    """

    num_text_tokens: int = field(default=2)
    depth: int | None = field(default=None)

    fits_model: ClassVar[tuple[str, ...]] = ("depth",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["MAPLE"]
        check_count(self, "num_text_tokens", minimum=1)
        check_count(self, "depth", minimum=1, optional=True)

    def fit(self, layers: Mapping[str, int], length: int | None) -> None:
        """Fill in a depth that is None."""
        fit_fields(self, {"depth": DEPTH}, {"depth": fitted(DEPTH, min(layers.values(), default=None))})

    def file_shapes(self) -> dict[str, Shape]:
        """The shapes of the text tokens; the base model decides those of the projections."""
        vision = r".*\bvision_model\..*maple_"
        shapes = self.text_shapes("maple_prompt")
        return shapes | {rf"{vision}weight": (None, None), rf"{vision}bias": (None,)}
