"""KgCoOp (CVPR 2023): CoOp's context, held close to hand-written prompts; it trains a CoOp adapter."""

from peft_vlm.methods.kgcoop.objective import PAPER, KgCoOpObjective, preset_for, recommended
from peft_vlm.registry import TrainingMethod, register_method

register_method(
    TrainingMethod(
        name="kgcoop",
        title="KgCoOp",
        adapter="coop",
        paper=PAPER,
        objective=KgCoOpObjective,
        preset_for=preset_for,
        presets=("base_to_new",),
        recommended=recommended,
    )
)

__all__ = ["KgCoOpObjective", "preset_for"]
