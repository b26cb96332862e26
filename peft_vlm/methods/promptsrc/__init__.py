"""PromptSRC (ICCV 2023): learned tokens in both towers, held close to the frozen model and averaged over epochs."""

from peft_vlm.methods.promptsrc.config import PromptSRCConfig
from peft_vlm.methods.promptsrc.convert import OFFICIAL_FORMATS, convert_checkpoint, to_official
from peft_vlm.methods.promptsrc.model import PromptSRCModel
from peft_vlm.methods.promptsrc.objective import (
    OFFICIAL_TEMPLATES,
    PAPER,
    PRESETS,
    PromptSRCObjective,
    preset_for,
    recommended,
)
from peft_vlm.registry import AdapterType, TrainingMethod, register_adapter, register_method

register_adapter(
    AdapterType(
        name="promptsrc",
        config=PromptSRCConfig,
        tuner=PromptSRCModel,
        title="PromptSRC",
        trained="learned tokens in the text and the vision tower",
        paper=PAPER,
        limits=("The learned tokens take places in the class prompt: give class names, not whole sentences.",),
        formats=OFFICIAL_FORMATS,
        export=to_official,
    )
)
register_method(
    TrainingMethod(
        name="promptsrc",
        title="PromptSRC",
        adapter="promptsrc",
        paper=PAPER,
        objective=PromptSRCObjective,
        preset_for=preset_for,
        presets=tuple(PRESETS),
        recommended=recommended,
        anchor_templates=OFFICIAL_TEMPLATES,
    )
)

__all__ = [
    "OFFICIAL_TEMPLATES",
    "PromptSRCConfig",
    "PromptSRCModel",
    "PromptSRCObjective",
    "convert_checkpoint",
    "preset_for",
]
