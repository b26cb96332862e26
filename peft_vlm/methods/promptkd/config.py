"""Configuration of a PromptKD student."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, no_type_check

from peft import PeftType

from peft_vlm.adapters.adapter_files import Shape
from peft_vlm.adapters.config import VLMConfig
from peft_vlm.adapters.context import check_count, fit_depths
from peft_vlm.errors import AdapterError, check_choice
from peft_vlm.registry import extend_peft_type

extend_peft_type("PROMPTKD")

PROJECTOR_NORMS = ("batchnorm", "layernorm", "none")
MAX_PROJECTOR_DEPTH = 3


@no_type_check  # wrong types get the messages of `__post_init__`, in tests too
@dataclass
class PromptKDConfig(VLMConfig):
    """A student that classifies with the class vectors of its teacher: visual prompts, a projector, the vectors.

    Args:
        class_dim: Width of the teacher's class vectors, which is its projection width:
            `teacher.config.projection_dim`. Also the hidden width of the projector.
        num_vision_tokens: Learned tokens in the vision tower. Official `N_CTX_VISION`, 4.
        vision_depth: Layers whose input has learned tokens; 0 trains the projector alone. Official
            `PROMPT_DEPTH_VISION`: 9 of 12 for base-to-new, 3 across datasets. None: 9, in a smaller tower three
            quarters of its layers, and 0 with `tune_vision`.
        projector_depth: Linear layers of the projector, 1 to 3; normalisation and ReLU between them. Official: 2.
        projector_norm: `"batchnorm"` (official), `"layernorm"` or `"none"`.
        tune_vision: Train a copy of every vision layer and norm instead of visual prompts (the paper's "full
            fine-tune" ablation); needs `vision_depth=0`.
        num_classes: Number of stored class vectors. Written when they are stored.
        teacher_name_or_path: Whose vectors they are. Written when they are stored.
        student_logit_scale: The factor (after exp) in the student's logits, the base model's own. Written with them.
        teacher_logit_scale: The factor in the teacher's logits. Written with them.

    References:
        PromptKD: Unsupervised Prompt Distillation for Vision-Language Models, 2024, arXiv 2403.02781, Sec. 3.3.
    """

    class_dim: int | None = field(default=None)
    num_vision_tokens: int = field(default=4)
    vision_depth: int | None = field(default=None)
    projector_depth: int = field(default=2)
    projector_norm: str = field(default="batchnorm")
    tune_vision: bool = field(default=False)
    num_classes: int = field(default=0)
    teacher_name_or_path: str | None = field(default=None)
    student_logit_scale: float | None = field(default=None)
    teacher_logit_scale: float | None = field(default=None)

    @property
    def adapter_dtype(self) -> str | None:
        """None: copies of layers follow PEFT's rule for the type of adapter tensors."""
        return None

    def file_shapes(self) -> dict[str, Shape]:
        """The shapes of class vectors, learned tokens and projector."""
        shapes: dict[str, Shape] = {r".*\.promptkd_linear1\.weight": (self.class_dim, None)}
        if self.num_classes:
            shapes[r".*\.promptkd_class_vectors"] = (self.num_classes, self.class_dim)
        if self.vision_depth:
            shapes[r".*\.promptkd_prompt"] = (self.num_vision_tokens, None)
        return shapes

    def fit(self, layers: Mapping[str, int], length: int | None) -> None:
        """Fill in a depth that is None."""
        if self.tune_vision and self.vision_depth is None:
            self.vision_depth = 0
        fit_depths(self, layers)

    fits_model: ClassVar[tuple[str, ...]] = ("vision_depth",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["PROMPTKD"]
        if self.class_dim is not None:
            check_count(self, "class_dim", minimum=1)
        check_count(self, "num_vision_tokens", minimum=1)
        check_count(self, "vision_depth", optional=True)
        check_count(self, "num_classes")
        check_count(self, "projector_depth", minimum=1)
        if self.projector_depth > MAX_PROJECTOR_DEPTH:
            raise ValueError(
                f"Expected `projector_depth` from 1 to {MAX_PROJECTOR_DEPTH}, got {self.projector_depth!r}."
            )
        check_choice("projector_norm", self.projector_norm, PROJECTOR_NORMS)
        if self.tune_vision and self.vision_depth:
            raise ValueError(
                f"Expected `vision_depth`=0 with `tune_vision`=True, got {self.vision_depth!r}: the whole vision "
                "tower is trained, without visual prompts."
            )
        if self.num_classes and self.class_names is not None and len(self.class_names) != self.num_classes:
            raise AdapterError(
                f"Expected one class name per stored class vector, got {len(self.class_names)} names and "
                f"`num_classes`={self.num_classes!r}. The adapter_config.json is damaged or was edited by hand; "
                "`keep_classes` and `add_classes` change classes."
            )
