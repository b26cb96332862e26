"""PromptSRC (ICCV 2023): learned tokens in both towers, held close to the frozen model and averaged over epochs."""

from peft_vlm.methods.promptsrc.config import PromptSRCConfig
from peft_vlm.methods.promptsrc.convert import convert_checkpoint
from peft_vlm.methods.promptsrc.model import PromptSRCModel
from peft_vlm.methods.promptsrc.objective import PromptSRCObjective
from peft_vlm.methods.promptsrc.presets import preset_for
from peft_vlm.methods.promptsrc.templates import OFFICIAL_TEMPLATES
from peft_vlm.registry import register_method

register_method("promptsrc", config_cls=PromptSRCConfig, model_cls=PromptSRCModel)

__all__ = [
    "OFFICIAL_TEMPLATES",
    "PromptSRCConfig",
    "PromptSRCModel",
    "PromptSRCObjective",
    "convert_checkpoint",
    "preset_for",
]
