"""PromptKD (CVPR 2024): distil a large prompted CLIP into a small one on images without labels."""

from peft_vlm.methods.promptkd.classes import texts_are_stored_classes
from peft_vlm.methods.promptkd.config import PromptKDConfig
from peft_vlm.methods.promptkd.convert import convert_checkpoint, export_checkpoint
from peft_vlm.methods.promptkd.model import PromptKDModel
from peft_vlm.methods.promptkd.objective import PromptKDObjective
from peft_vlm.methods.promptkd.paper import PAPER
from peft_vlm.methods.promptkd.presets import preset_for
from peft_vlm.methods.promptkd.teacher import Teacher
from peft_vlm.objective import About
from peft_vlm.registry import Recipe, register_method

register_method(
    "promptkd",
    config_cls=PromptKDConfig,
    model_cls=PromptKDModel,
    about=About(
        title="PromptKD",
        trained="visual prompt tokens, a projector, and the class vectors of the teacher that it was distilled from",
        paper=PAPER,
        limits=("It classifies with stored class vectors: only the classes listed here, no free text.",),
    ),
    recipe=Recipe(objective=PromptKDObjective, preset_for=preset_for),
)

__all__ = [
    "PromptKDConfig",
    "PromptKDModel",
    "PromptKDObjective",
    "Teacher",
    "convert_checkpoint",
    "export_checkpoint",
    "preset_for",
    "texts_are_stored_classes",
]
