"""Skip Tuning (CVPR 2025): tune the upper layers, cache what enters them, skip easy classes."""

from peft_vlm.methods.skip_tuning.answers import SkipTuningAnswerObjective
from peft_vlm.methods.skip_tuning.config import SkipTuningConfig
from peft_vlm.methods.skip_tuning.convert import OFFICIAL_FORMATS, convert_checkpoint, to_official
from peft_vlm.methods.skip_tuning.model import SkipTuningModel
from peft_vlm.methods.skip_tuning.objective import PAPER, PRESETS, SkipTuningObjective, preset_for, recommended
from peft_vlm.registry import AdapterType, TrainingMethod, register_adapter, register_method

register_adapter(
    AdapterType(
        name="skip_tuning",
        config=SkipTuningConfig,
        tuner=SkipTuningModel,
        title="Skip Tuning",
        trained="trained copies of the upper layers, final norms and projections of both towers",
        paper=PAPER,
        limits=("It replaces layers of the base model, so it fits this base model only.",),
        formats=OFFICIAL_FORMATS,
        export=to_official,
    )
)
register_method(
    TrainingMethod(
        name="skip_tuning",
        title="Skip Tuning",
        adapter="skip_tuning",
        paper=PAPER,
        objective=SkipTuningObjective,
        answer_objective=SkipTuningAnswerObjective,
        preset_for=preset_for,
        presets=tuple(PRESETS),
        recommended=recommended,
    )
)

__all__ = [
    "SkipTuningAnswerObjective",
    "SkipTuningConfig",
    "SkipTuningModel",
    "SkipTuningObjective",
    "convert_checkpoint",
    "preset_for",
]
