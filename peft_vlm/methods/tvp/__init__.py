"""TVP (CVPR 2024): one learned pixel prompt on every image, trained on one multimodal model, used on others."""

from peft_vlm.adapters.pixel_prompt import prompt_layer_of, prompt_of, render_prompt, show_prompted, without_prompt
from peft_vlm.methods.tvp.config import TVPConfig
from peft_vlm.methods.tvp.convert import OFFICIAL_FORMATS, convert_checkpoint, to_official
from peft_vlm.methods.tvp.model import TVPModel, set_normalization
from peft_vlm.methods.tvp.objective import PAPER, NormalizedGradient, TVPObjective, preset_for, recommended
from peft_vlm.methods.tvp.tasks import ClipGuide, Source, share_prompt
from peft_vlm.registry import AdapterType, TrainingMethod, register_adapter, register_method

register_adapter(
    AdapterType(
        name="tvp",
        config=TVPConfig,
        tuner=TVPModel,
        title="TVP",
        trained="one pixel prompt that is added to every image, in units of [0, 1]",
        paper=PAPER,
        limits=(
            "Unless `shrink` is `none`, images are shrunk to make room for the prompt.",
            "Measure what it gains on a model it was not trained on.",
        ),
        formats=OFFICIAL_FORMATS,
        export=to_official,
    )
)
register_method(
    TrainingMethod(
        name="tvp",
        title="TVP",
        adapter="tvp",
        paper=PAPER,
        objective=TVPObjective,
        answer_objective=TVPObjective,
        preset_for=preset_for,
        presets=("cifar10", "script"),
        recommended=recommended,
        guide=ClipGuide,
        guide_template="this is a photo of a {}",
    )
)

__all__ = [
    "ClipGuide",
    "NormalizedGradient",
    "Source",
    "TVPConfig",
    "TVPModel",
    "TVPObjective",
    "convert_checkpoint",
    "preset_for",
    "prompt_layer_of",
    "prompt_of",
    "render_prompt",
    "set_normalization",
    "share_prompt",
    "show_prompted",
    "without_prompt",
]
