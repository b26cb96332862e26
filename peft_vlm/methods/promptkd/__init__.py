"""PromptKD (CVPR 2024): distil a large prompted CLIP into a small one on images without labels."""

from peft_vlm.methods.promptkd.classes import texts_are_stored_classes
from peft_vlm.methods.promptkd.config import PromptKDConfig
from peft_vlm.methods.promptkd.convert import OFFICIAL_FORMATS, convert_checkpoint, to_official
from peft_vlm.methods.promptkd.model import PromptKDModel
from peft_vlm.methods.promptkd.objective import PAPER, VISION_DEPTHS, PromptKDObjective, preset_for, recommended
from peft_vlm.methods.promptkd.teacher import Teacher
from peft_vlm.registry import AdapterType, TrainingMethod, register_adapter, register_method

register_adapter(
    AdapterType(
        name="promptkd",
        config=PromptKDConfig,
        tuner=PromptKDModel,
        title="PromptKD",
        trained="visual prompt tokens, a projector, and the class vectors of the teacher that it was distilled from",
        paper=PAPER,
        limits=("It classifies with stored class vectors: only the classes listed here, no free text.",),
        stores_classes=True,
        formats=OFFICIAL_FORMATS,
        export=to_official,
    )
)
register_method(
    TrainingMethod(
        name="promptkd",
        title="PromptKD",
        adapter="promptkd",
        paper=PAPER,
        objective=PromptKDObjective,
        preset_for=preset_for,
        presets=tuple(VISION_DEPTHS),
        recommended=recommended,
    )
)

__all__ = [
    "PromptKDConfig",
    "PromptKDModel",
    "PromptKDObjective",
    "Teacher",
    "convert_checkpoint",
    "preset_for",
    "texts_are_stored_classes",
]
