"""RPP (2024): prompts for queries, keys and values, pretrained once on thousands of classes with soft labels."""

from peft_vlm.methods.rpp.config import RPPConfig
from peft_vlm.methods.rpp.model import RPPModel, start_shared_prompts
from peft_vlm.methods.rpp.objective import PAPER, PRESETS, RPPObjective, preset_for, recommended
from peft_vlm.registry import AdapterType, TrainingMethod, register_adapter, register_method

register_adapter(
    AdapterType(
        name="rpp",
        config=RPPConfig,
        tuner=RPPModel,
        title="RPP",
        trained="prompts for the queries, keys and values of the lower layers of both towers",
        paper=PAPER,
        limits=(
            "The prompts take places in the class prompt: give class names, not whole sentences.",
            "The paper's code and settings are not published: residual, depth, soft-label weight and rate are choices "
            "of this package.",
        ),
    )
)
register_method(
    TrainingMethod(
        name="rpp",
        title="RPP",
        adapter="rpp",
        paper=PAPER,
        objective=RPPObjective,
        preset_for=preset_for,
        presets=tuple(PRESETS),
        recommended=recommended,
    )
)

__all__ = ["PRESETS", "RPPConfig", "RPPModel", "RPPObjective", "preset_for", "start_shared_prompts"]
