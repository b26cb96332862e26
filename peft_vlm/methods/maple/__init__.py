"""MaPLe (CVPR 2023): learned text tokens in many layers, and vision tokens that are projected from them."""

from peft_vlm.methods.maple.config import MaPLeConfig
from peft_vlm.methods.maple.convert import OFFICIAL_FORMATS, convert_checkpoint, fold, to_official
from peft_vlm.methods.maple.model import MaPLeModel
from peft_vlm.methods.maple.objective import PAPER, PROTOCOLS, MaPLeObjective, preset_for, recommended
from peft_vlm.registry import AdapterType, TrainingMethod, register_adapter, register_method

register_adapter(
    AdapterType(
        name="maple",
        config=MaPLeConfig,
        tuner=MaPLeModel,
        title="MaPLe",
        trained="learned text tokens of several layers, and projections that make vision tokens of them",
        paper=PAPER,
        limits=("The learned tokens take places in the class prompt: give class names, not whole sentences.",),
        formats=OFFICIAL_FORMATS,
        export=to_official,
    )
)
register_method(
    TrainingMethod(
        name="maple",
        title="MaPLe",
        adapter="maple",
        paper=PAPER,
        objective=MaPLeObjective,
        preset_for=preset_for,
        presets=tuple(PROTOCOLS),
        recommended=recommended,
    )
)

__all__ = [
    "MaPLeConfig",
    "MaPLeModel",
    "MaPLeObjective",
    "convert_checkpoint",
    "fold",
    "preset_for",
]
