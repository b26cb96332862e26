"""CoOp (IJCV 2022): learned context vectors in the class prompts."""

from peft_vlm.methods.coop.config import CoOpConfig
from peft_vlm.methods.coop.convert import OFFICIAL_FORMATS, convert_checkpoint, to_official
from peft_vlm.methods.coop.model import CoOpModel
from peft_vlm.methods.coop.objective import CONFIGS, PAPER, CoOpObjective, preset_for, recommended
from peft_vlm.registry import AdapterType, TrainingMethod, register_adapter, register_method

register_adapter(
    AdapterType(
        name="coop",
        config=CoOpConfig,
        tuner=CoOpModel,
        title="CoOp",
        trained="context vectors that stand around the class name in every class prompt",
        paper=PAPER,
        limits=("Class names that were not trained on can be given, but may score lower than without the adapter.",),
        formats=OFFICIAL_FORMATS,
        export=to_official,
    )
)
register_method(
    TrainingMethod(
        name="coop",
        title="CoOp",
        adapter="coop",
        paper=PAPER,
        objective=CoOpObjective,
        preset_for=preset_for,
        presets=tuple(CONFIGS),
        recommended=recommended,
    )
)

__all__ = ["CoOpConfig", "CoOpModel", "CoOpObjective", "convert_checkpoint", "preset_for", "to_official"]
