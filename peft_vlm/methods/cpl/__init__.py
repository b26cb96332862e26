"""CPL (EMNLP 2022): CoCoOp with a contrast to counterfactual image features; it trains a CoCoOp adapter."""

from peft_vlm.methods.cpl.objective import PAPER, CPLObjective, greedy_target, preset_for, recommended
from peft_vlm.registry import TrainingMethod, register_method

register_method(
    TrainingMethod(
        name="cpl",
        title="CPL",
        adapter="cocoop",
        paper=PAPER,
        objective=CPLObjective,
        preset_for=preset_for,
        presets=("base_to_new",),
        recommended=recommended,
    )
)

__all__ = ["CPLObjective", "greedy_target", "preset_for"]
