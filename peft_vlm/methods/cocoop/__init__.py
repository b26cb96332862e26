"""CoCoOp (CVPR 2022): a learned context that a small network shifts by the image."""

from peft_vlm.methods.cocoop.config import CoCoOpConfig
from peft_vlm.methods.cocoop.convert import OFFICIAL_FORMATS, convert_checkpoint, to_official
from peft_vlm.methods.cocoop.model import CoCoOpModel
from peft_vlm.methods.cocoop.objective import PAPER, CoCoOpObjective, preset_for, recommended
from peft_vlm.registry import AdapterType, TrainingMethod, register_adapter, register_method

register_adapter(
    AdapterType(
        name="cocoop",
        config=CoCoOpConfig,
        tuner=CoCoOpModel,
        title="CoCoOp",
        trained="context vectors in every class prompt, and a network that shifts them by the image",
        paper=PAPER,
        limits=(
            "Class prompts are computed for every image: classifying takes one pass of the text tower per image.",
            "It has no class features of its own, so the model's own forward refuses and it cannot be exported; use "
            "`PromptedClassifier`.",
        ),
        formats=OFFICIAL_FORMATS,
        export=to_official,
    )
)
register_method(
    TrainingMethod(
        name="cocoop",
        title="CoCoOp",
        adapter="cocoop",
        paper=PAPER,
        objective=CoCoOpObjective,
        preset_for=preset_for,
        presets=("base_to_new",),
        recommended=recommended,
    )
)

__all__ = [
    "CoCoOpConfig",
    "CoCoOpModel",
    "CoCoOpObjective",
    "convert_checkpoint",
    "preset_for",
]
