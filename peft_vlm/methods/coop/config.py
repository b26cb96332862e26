"""Configuration of a CoOp adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, no_type_check

from peft import PeftType

from peft_vlm.adapters.adapter_files import Shape
from peft_vlm.adapters.config import fit_fields
from peft_vlm.adapters.context import AttributeContextConfig, check_count
from peft_vlm.adapters.learned_tokens import NETWORKS
from peft_vlm.errors import check_choice, shown
from peft_vlm.registry import extend_peft_type
from peft_vlm.text.prompts import POSITIONS

extend_peft_type("COOP")

NUM_TOKENS = 16
"""Official `N_CTX`."""


@no_type_check  # wrong types get the messages of `__post_init__`, in tests too
@dataclass
class CoOpConfig(AttributeContextConfig):
    """Context vectors in the class prompts of a CLIP, shared by all classes or one set per class; nothing else trains.

    Args:
        num_text_tokens: Context vectors per prompt. Paper: M; official `N_CTX`, 16. With `context_init` it becomes the
            number of the words' tokens, as in the official code. None: 16, at most a quarter of what the text tower
            reads.
        context_init: Words whose embeddings the context starts from, such as `"a photo of a"`. None: N(0, 0.02).
        class_position: Where the class name stands: `"end"`: behind the context, `"middle"`: between its halves,
            `"front"`: before it. Official `CLASS_TOKEN_POSITION`.
        class_specific: A context for each class of a fixed list, official `CSC`. Needs `class_names` and `template`
            (or `class_token_ids`); the adapter then classifies with those prompts alone.
        class_token_ids: Token ids of the plain class prompts, in label order; with `class_specific` only. Filled in
            from the base model's tokenizer; give them (`prompts.input_ids.tolist()`) where there is none.
        network: Network that encodes the context while it is trained: `"lstm"` along the vectors, `"mlp"` on each.
            Set by PRE, which collapses it into the vectors at the end of a run; None: the vectors as they are.

    References:
        Learning to Prompt for Vision-Language Models, 2022, arXiv 2109.01134, Sec. 3.2.
    """

    num_text_tokens: int | None = field(default=None)
    context_init: str | None = field(default=None)
    class_position: str = field(default="end")
    class_specific: bool = field(default=False)
    class_token_ids: list[list[int]] | None = field(default=None)
    network: str | None = field(default=None)

    fits_model: ClassVar[tuple[str, ...]] = ("num_text_tokens",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["COOP"]
        check_count(self, "num_text_tokens", minimum=1, optional=True)
        check_choice("class_position", self.class_position, POSITIONS)
        if self.network is not None:
            check_choice("network", self.network, sorted(NETWORKS))
        if self.class_specific and self.class_token_ids is None and (self.class_names is None or not self.template):
            raise ValueError(
                "Expected `class_names` and `template` (or `class_token_ids`) with `class_specific`=True, got "
                f"{shown(self.class_names)} and {shown(self.template)}. A context per class fits one fixed class list "
                "and has nothing to say about new classes. Name the classes, or use the shared context."
            )
        if self.class_specific and (self.context_init is not None or self.context_init_ids is not None):
            raise ValueError(
                f"Expected `context_init`=None with `class_specific`=True, got {shown(self.context_init)}. The "
                "official code starts contexts per class from random vectors only; leave the words out."
            )
        if (self.class_specific or self.network) and (self.attributes or self.attribute_ids):
            raise ValueError(
                f"Expected no `attributes` with `class_specific` or `network`, got {shown(self.attributes)}. "
                "ATPrompt's context is shared by all classes and trained as it is: leave one out."
            )
        if self.class_token_ids is not None and not self.class_specific:
            raise ValueError("Expected no `class_token_ids` without `class_specific`=True. Leave them out.")

    def file_shapes(self) -> dict[str, Shape]:
        """The shape of the context: (tokens, width), with one such table per class where it is class-specific."""
        shapes = self.text_shapes("coop_prompt")
        if self.class_specific:
            classes = len(self.class_token_ids or self.class_names or ())
            shapes[r".*\btext_model\..*coop_prompt"] = (classes, self.num_text_tokens, None)
        return shapes | ({r".*\btext_model\..*coop_network\..*": ...} if self.network else {})

    def fit(self, layers: Mapping[str, int], length: int | None) -> None:
        """Fill in a number of context vectors that is None."""
        is_counted = self.context_init is not None or self.context_init_ids is not None
        count = NUM_TOKENS if length is None or is_counted else min(NUM_TOKENS, max(1, length // 4))
        fit_fields(self, {"num_text_tokens": NUM_TOKENS}, {"num_text_tokens": count})

    @property
    def text_position(self) -> str:
        """Where the class name stands."""
        return self.class_position
