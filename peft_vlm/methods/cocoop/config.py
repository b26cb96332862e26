"""Configuration of a CoCoOp adapter."""

from dataclasses import dataclass, field
from typing import no_type_check

from peft import PeftType

from peft_vlm.adapters.adapter_files import Shape
from peft_vlm.adapters.context import AttributeContextConfig, check_count
from peft_vlm.registry import extend_peft_type

extend_peft_type("COCOOP")


@no_type_check  # wrong types get the messages of `__post_init__`, in tests too
@dataclass
class CoCoOpConfig(AttributeContextConfig):
    """Context vectors that a small network shifts by the image; the class name stands behind them.

    Args:
        num_text_tokens: Context vectors per prompt. Paper: M; official `N_CTX`, 4. With `context_init` it becomes the
            number of the words' tokens, as in the official code.

    References:
        Conditional Prompt Learning for Vision-Language Models, 2022, arXiv 2203.05557, Sec. 3.2.
    """

    num_text_tokens: int = field(default=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["COCOOP"]
        check_count(self, "num_text_tokens", minimum=1)

    def file_shapes(self) -> dict[str, Shape]:
        """The shape of the context; the base model decides those of the network."""
        layer = r".*\btext_model\..*cocoop_"
        return self.text_shapes("cocoop_prompt") | {f"{layer}weight[12]": (None, None), f"{layer}bias[12]": (None,)}
