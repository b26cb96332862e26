"""ATPrompt (ICCV 2025): attribute words, each after learned vectors, before a learned context; on CoOp's adapter."""

from peft_vlm.methods.atprompt.objective import ATTRIBUTES, CONFIG, PAPER, ATPromptObjective, preset_for, recommended
from peft_vlm.methods.atprompt.search import AttributeSearch, search_attributes
from peft_vlm.registry import TrainingMethod, register_method

register_method(
    TrainingMethod(
        name="atprompt",
        title="ATPrompt",
        adapter="coop",
        paper=PAPER,
        objective=ATPromptObjective,
        preset_for=preset_for,
        presets=tuple(ATTRIBUTES),
        recommended=recommended,
        defaults=CONFIG,
    )
)

__all__ = ["ATTRIBUTES", "ATPromptObjective", "AttributeSearch", "preset_for", "search_attributes"]
